"""CLIP and SigLIP in our own classes against transformers' own: outputs, losses, gradients, files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nondual import CLIP, SigLIP
from nondual.pretrained import from_clip, from_siglip, load_clip, load_siglip
from nondual.pretrained.clip import from_hugging_face

B, N, V, SIZE, EOS = 5, 13, 53, 12, 52
VARIANTS = {
    "clip": {},
    "clip, the old end": {"text": {"eos_token_id": 2}},
    "clip, other sizes": {
        "text": {"hidden_act": "gelu", "layer_norm_eps": 0.1, "num_attention_heads": 2},
        "vision": {"hidden_act": "gelu", "layer_norm_eps": 0.1, "num_channels": 1, "image_size": 14, "patch_size": 3},
        "projection_dim": 7,
    },
    "siglip": {},
    "siglip, other sizes": {
        "text": {"hidden_act": "quick_gelu", "layer_norm_eps": 0.1, "hidden_size": 12},
        "vision": {"hidden_act": "relu", "layer_norm_eps": 0.1, "num_channels": 2, "image_size": 9, "patch_size": 3},
    },
}
KINDS = {"clip": (from_clip, load_clip, CLIP), "siglip": (from_siglip, load_siglip, SigLIP)}


@pytest.fixture(scope="session")
def judge(two_towers):
    """A function: transformers' model of one of the variants."""
    return lambda variant, **more: two_towers(variant.split(",")[0], **(VARIANTS[variant] | more))


def copied(model):
    return KINDS[model.config.model_type][0](model)


def loaded(folder, **more):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    return KINDS[kind][1](folder, **more)


def batch(model, texts=B, dtype=torch.float32):
    """Images, and texts of several lengths that end in the end-of-text token; after it anything may stand."""
    vision, draw = model.config.vision_config, torch.Generator().manual_seed(1)
    pixels = torch.randn(B, vision.num_channels, vision.image_size, vision.image_size, generator=draw, dtype=dtype)
    ids = torch.randint(3, EOS, (texts, N), generator=draw)
    ids[torch.arange(texts), torch.tensor([12, 3, 0, 7, 9])[:texts]] = EOS
    ids[1, 5] = EOS  # padding with the same token
    return pixels, ids


def judged(model, pixels, ids):
    return model(input_ids=ids, pixel_values=pixels, return_loss=len(pixels) == len(ids))


# --- outputs and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_similarities_loss_and_every_gradient_are_transformers_own(variant, dtype, tolerance, judge, in_float64):
    theirs = judge(variant).to(dtype)
    ours, (pixels, ids) = copied(theirs), batch(theirs, dtype=dtype)
    assert type(ours) is KINDS[theirs.config.model_type][2] and not ours.training
    if dtype == torch.float64:
        with in_float64:
            right = judged(theirs, pixels, ids)
    else:
        right = judged(theirs, pixels, ids)
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(ours(pixels, ids), right.logits_per_image, **close)
    torch.testing.assert_close(ours(pixels, ids).T, right.logits_per_text, **close)
    torch.testing.assert_close(ours.encode_images(pixels), right.image_embeds, **close)
    torch.testing.assert_close(ours.encode_texts(ids), right.text_embeds, **close)
    loss = ours.loss(pixels, ids)
    torch.testing.assert_close(loss, right.loss, **close)
    loss.backward(), right.loss.backward()
    expected = from_hugging_face({name: p.grad for name, p in theirs.named_parameters()})
    found = {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **close, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
@pytest.mark.parametrize("variant", ["clip", "siglip"])
def test_any_number_of_texts_of_any_integer_dtype(variant, judge):
    theirs = judge(variant)
    ours, (pixels, ids) = copied(theirs), batch(theirs, texts=3)
    right = judged(theirs, pixels, ids).logits_per_image
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        torch.testing.assert_close(ours(pixels, ids.to(dtype)), right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["clip", "siglip"])
def test_images_of_other_sizes(variant, judge):
    """Positions are resampled as transformers resamples them."""
    theirs = judge(variant)
    ours, (_, ids) = copied(theirs), batch(theirs)
    for height, width in ((20, 20), (8, 24), (12, 16)):
        pixels = torch.randn(B, 3, height, width)
        right = theirs(input_ids=ids, pixel_values=pixels, interpolate_pos_encoding=True).image_embeds
        torch.testing.assert_close(ours.encode_images(pixels), right, atol=1e-5, rtol=1e-5)


def test_after_the_end_of_the_text_nothing_counts_in_clip_and_everything_in_siglip(judge):
    for variant, counts in (("clip", False), ("siglip", True)):
        theirs = judge(variant)
        ours, ids = copied(theirs), batch(theirs)[1]
        other = ids.clone()
        other[1, 6:] = 7  # its end is at 3
        assert torch.equal(ours.encode_texts(ids)[1], ours.encode_texts(other)[1]) != counts


def test_the_copy_has_weights_of_its_own(judge):
    for variant in ("clip", "siglip"):
        theirs = judge(variant).bfloat16()
        ours = copied(theirs)
        before = {name: p.clone() for name, p in ours.named_parameters()}
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            for p in theirs.parameters():
                p += 1
        assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


# --- files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_that_transformers_wrote(variant, judge, tmp_path):
    theirs = judge(variant)
    theirs.save_pretrained(tmp_path)
    ours, (pixels, ids) = loaded(tmp_path), batch(theirs)
    assert not ours.training and all(p.requires_grad and not p.is_meta for p in ours.parameters())
    right = judged(theirs, pixels, ids).logits_per_image
    torch.testing.assert_close(ours(pixels, ids), right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_names_of_older_versions(judge, tmp_path):
    """position_ids among the tensors, towers nested once more, settings of one number, and in config_dict too."""
    for variant in ("clip", "siglip"):
        theirs = judge(variant)
        theirs.save_pretrained(tmp_path)
        pixels, ids = batch(theirs)
        right = judged(theirs, pixels, ids).logits_per_image
        state, file = load_file(tmp_path / "model.safetensors"), tmp_path / "config.json"
        config = json.loads(file.read_text())
        state = {name.replace("text_model.", "text_model.text_model."): tensor for name, tensor in state.items()}
        state["text_model.embeddings.position_ids"] = torch.arange(N)[None]
        state["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
        save_file(state, tmp_path / "model.safetensors")
        config |= {"text_config_dict": config["text_config"], "vision_config_dict": None, "torch_dtype": "float32"}
        config["text_config"] = {"hidden_size": 999, "transformers_version": "4.16.0"}
        file.write_text(json.dumps(config))
        torch.testing.assert_close(loaded(tmp_path)(pixels, ids), right, atol=1e-5, rtol=1e-5)


def test_dtypes_of_files_are_kept_unless_told(judge, tmp_path):
    judge("clip").half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_clip(tmp_path).parameters()} == {torch.float16}
    assert {p.dtype for p in load_clip(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*, got torch.int8"):
        load_clip(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got str"):
        load_clip(tmp_path, dtype="float32")


def test_files_that_do_not_fit(judge, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_clip\('clip-vit-base-patch32'\)"):
        load_clip("openai/clip-vit-base-patch32")
    judge("clip").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    more = {"text_model.text_model.final_layer_norm.weight": torch.ones(24)}
    for changed, says in (
        ({name: x for name, x in state.items() if "logit" not in name}, "missing: log_scale"),
        (state | {"extra": torch.ones(1)}, "unexpected: extra"),
        (state | {"logit_scale": torch.ones(2)}, r"of another shape: log_scale \(2,\), not \(\)"),
        (state | more, "two tensors for text_tower.encoder.norm.weight: one of them is named text_model.text_model"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=says) as error:
            load_clip(tmp_path)
        assert str(tmp_path) in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"is no whole safetensors file") as error:
        load_clip(tmp_path)
    assert str(error.value).count(str(tmp_path)) == 1


def test_what_is_no_clip_is_refused(judge):
    with pytest.raises(TypeError, match=r"model must be a CLIPModel of transformers, got Linear"):
        from_clip(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a CLIPModel of transformers, got SiglipModel"):
        from_clip(judge("siglip"))
    with pytest.raises(TypeError, match=r"model must be a SiglipModel of transformers, got SiglipVisionModel"):
        from_siglip(judge("siglip").vision_model)
    theirs = judge("clip")
    theirs.config.vision_config.hidden_act = "relu6"
    with pytest.raises(ValueError, match=r"hidden_act must be one of .* in vision_config of the model's CLIPConfig"):
        from_clip(theirs)
