"""ViT, DeiT and DINOv2 in our own class against transformers' own: outputs, gradients, other sizes, files."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nondual import CLIP
from nondual.pretrained import from_vit, load_vit
from nondual.pretrained.vit import from_hugging_face
from nondual.vision_transformers import VisionTransformer

B = 3
SIZES = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "image_size": 12, "patch_size": 4}
OTHER = {"hidden_act": "gelu_new", "layer_norm_eps": 0.1, "qkv_bias": False, "num_channels": 2}
FLAT = {"image_size": [8, 15], "patch_size": [4, 5]}
SWIGLU = {"use_swiglu_ffn": True, "mlp_ratio": 3}
# name: transformers' class without its kind, settings
VARIANTS = {
    "ViT": ("ViTModel", {}),
    "ViT, classes": ("ViTForImageClassification", {}),
    "ViT, other settings": ("ViTForImageClassification", OTHER | FLAT),
    "DeiT": ("DeiTModel", {}),
    "DeiT, one head": ("DeiTForImageClassification", FLAT),
    "DeiT, two heads": ("DeiTForImageClassificationWithTeacher", OTHER),
    "DINOv2": ("Dinov2Model", {}),
    "DINOv2, classes": ("Dinov2ForImageClassification", {"hidden_act": "relu", "qkv_bias": False}),
    "DINOv2, gated": ("Dinov2ForImageClassification", SWIGLU),
    "registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
    "registers, classes": ("Dinov2WithRegistersForImageClassification", {}),
    "registers, gated": ("Dinov2WithRegistersModel", SWIGLU),
}


@pytest.fixture(scope="session")
def judge():
    """A function: transformers' model of one of the variants, with random weights, each at a value of its own."""
    import transformers

    def make(variant, **more):
        torch.manual_seed(0)
        name, settings = VARIANTS[variant]
        kind = name.removesuffix("WithTeacher").removesuffix("ForImageClassification").removesuffix("Model")
        own = {} if kind.startswith("Dino") else {"intermediate_size": 31}
        config = getattr(transformers, f"{kind}Config")(**(SIZES | own | {"num_labels": 7} | settings | more))
        made = getattr(transformers, name)(config)
        with torch.no_grad():
            for name, p in made.named_parameters():
                p.uniform_(0.5, 1.5) if "norm" in name or "lambda" in name else p.normal_(std=0.3)
        return made.eval()

    return make


def pixels(model, height=None, width=None, dtype=torch.float32, batch=B):
    size = model.config.image_size
    own = size if isinstance(size, list | tuple) else (size, size)
    shape = (batch, model.config.num_channels, height or own[0], width or own[1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def answer(model, x, **options):
    """Scores where there is a head, else every token's vector."""
    out = model(pixel_values=x, **options)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def ours_answer(model, theirs, x):
    return model(x) if hasattr(theirs, "classifier") or hasattr(theirs, "cls_classifier") else model.features(x)


# --- outputs and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_outputs_and_every_gradient_are_transformers_own(variant, dtype, tolerance, judge, in_float64):
    theirs = judge(variant).to(dtype)
    ours, x = from_vit(theirs), pixels(theirs, dtype=dtype)
    assert type(ours) is VisionTransformer and not ours.training
    if dtype == torch.float64:
        with in_float64:
            right = answer(theirs, x)
    else:
        right = answer(theirs, x)
    found = ours_answer(ours, theirs, x)
    assert right.std() > 0.1 and (right[0] - right[1]).abs().max() > 0.01, "the judge tells images apart"
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(found, right, **close)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (found * weight).sum().backward(), (right * weight).sum().backward()
    named = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = from_hugging_face(named)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    zeros = {name for name in gradients if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    assert gradients.keys() - (set() if theirs.config.qkv_bias else zeros) == expected.keys()
    for name, gradient in expected.items():  # sums over many patches
        torch.testing.assert_close(
            gradients[name], gradient, atol=10 * tolerance, rtol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
@pytest.mark.parametrize("variant", [name for name in VARIANTS if VARIANTS[name][1].get("image_size") is None])
def test_images_of_other_sizes(variant, judge):
    """Positions are interpolated as transformers interpolates them, to larger grids and smaller ones."""
    theirs = judge(variant)
    ours = from_vit(theirs)
    options = {} if "Dinov2" in type(theirs).__name__ else {"interpolate_pos_encoding": True}
    for height, width in ((20, 20), (8, 24), (4, 8), (12, 16)):
        x = pixels(theirs, height, width)
        torch.testing.assert_close(ours_answer(ours, theirs, x), answer(theirs, x, **options), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_a_head_it_gives_the_class_tokens_vector(judge):
    for variant in ("ViT", "DeiT", "DINOv2", "registers"):
        theirs = judge(variant)
        x = pixels(theirs)
        torch.testing.assert_close(from_vit(theirs)(x), answer(theirs, x)[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_heads_of_deit_by_themselves_in_training(judge):
    theirs = judge("DeiT, two heads")
    x, ours = pixels(theirs), from_vit(theirs).train()
    right = theirs(x)
    torch.testing.assert_close(ours(x)[0], right.cls_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(x)[1], right.distillation_logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_weights_of_attention(judge):
    for variant in ("ViT", "registers"):
        theirs = judge(variant)
        theirs.set_attn_implementation("eager")
        x = pixels(theirs)
        _, weights = from_vit(theirs).features(x, return_weights=True)
        right = torch.stack(theirs(x, output_attentions=True).attentions)
        torch.testing.assert_close(weights, right, atol=1e-5, rtol=1e-5)


def test_the_copy_has_weights_of_its_own(judge):
    for variant in ("ViT, classes", "DeiT, two heads", "registers, gated"):
        theirs = judge(variant).bfloat16()
        ours = from_vit(theirs)
        before = {name: p.clone() for name, p in ours.named_parameters()}
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            for p in theirs.parameters():
                p += 1
        assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_vit_base_is_transformers_default_tensor_by_tensor():
    """12 heads in each of 12 layers, 86.6 M weights: our default and theirs, on the meta device."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        ours, theirs = VisionTransformer(), ViTForImageClassification(ViTConfig(num_labels=1000))
    shapes = {name: tuple(x.shape) for name, x in from_hugging_face(theirs.state_dict()).items()}
    assert shapes == {name: tuple(x.shape) for name, x in ours.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 86_567_656
    heads = {layer.mixer.n_heads for layer in ours.encoder.layers}
    assert heads == {12} == {layer.attention.num_attention_heads for layer in theirs.vit.layers}


# --- files -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_that_transformers_wrote(variant, judge, tmp_path):
    theirs = judge(variant)
    theirs.save_pretrained(tmp_path)
    ours, x = load_vit(tmp_path), pixels(theirs)
    assert not ours.training and all(p.requires_grad and not p.is_meta for p in ours.parameters())
    torch.testing.assert_close(ours_answer(ours, theirs, x), answer(theirs, x), atol=1e-5, rtol=1e-5)


def renamed(state, version):
    """The names that transformers 4 or 5 gives these tensors, from those that the installed one has in memory."""
    old = {".q_proj.": ".attention.query.", ".k_proj.": ".attention.key.", ".v_proj.": ".attention.value."}
    old |= {"attention.o_proj.": "attention.output.dense."}
    vit = {"layers.": "encoder.layer.", "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense."}
    out = {}
    for name, tensor in state.items():
        if version == 4:
            for new, before in (old | ({} if "encoder.layer" in name else vit)).items():
                name = name.replace(new, before)
        out[name] = tensor
    for name in [name for name in out if version == 4 and "mlp.gate_proj." in name]:
        up, joint = name.replace("gate_proj", "up_proj"), name.replace("gate_proj", "weights_in")
        out[joint] = torch.cat([out.pop(name), out.pop(up)])
    return {name.replace("mlp.down_proj", "mlp.weights_out") if version == 4 else name: x for name, x in out.items()}


@torch.no_grad()
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("variant", ["ViT", "ViT, classes", "DeiT, two heads", "DINOv2, gated", "registers, classes"])
def test_the_names_of_transformers_4_and_5(variant, version, judge, tmp_path):
    theirs = judge(variant)
    theirs.save_pretrained(tmp_path)
    state = {name: x.clone().contiguous() for name, x in renamed(theirs.state_dict(), version).items()}
    layers = {name.split("0.")[0] for name in state if "layer" in name and ".0." in name}
    assert any(("encoder.layer" in name) or version == 5 for name in layers)
    assert version == 5 or any(name.endswith("attention.attention.query.weight") for name in state)
    save_file(state, tmp_path / "model.safetensors")
    x = pixels(theirs)
    found = ours_answer(load_vit(tmp_path), theirs, x)
    torch.testing.assert_close(found, answer(theirs, x), atol=1e-5, rtol=1e-5)


def test_dtypes_of_files_are_kept_unless_told(judge, tmp_path):
    judge("registers").half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_vit(tmp_path).parameters()} == {torch.float16}
    assert {p.dtype for p in load_vit(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"dtype must be one of torch.float16, .*, got torch.int8"):
        load_vit(tmp_path, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got str"):
        load_vit(tmp_path, dtype="float32")


def test_files_that_do_not_fit(judge, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"load_vit\('vit-base-patch16-224'\)"):
        load_vit("google/vit-base-patch16-224")
    judge("ViT, classes").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    token = next(name for name in state if name.endswith("cls_token"))
    for changed, says in (
        ({name: x for name, x in state.items() if name != token}, "missing: class_token"),
        (state | {"extra": torch.ones(1)}, "unexpected: extra"),
        (state | {token: torch.ones(1, 1, 3)}, r"of another shape: class_token \(3,\), not \(20,\)"),
        (state | {"classifier.weight": torch.ones(())}, r"missing|unexpected: head"),
        (state | {"embeddings.cls_token": torch.ones(1, 1, 20)}, "two tensors for class_token"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=says) as error:
            load_vit(tmp_path)
        assert str(tmp_path) in str(error.value)
    save_file(state, tmp_path / "model.safetensors")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 999999'))
    with pytest.raises(ValueError, match=r"num_hidden_layers is 999999 in .* holds \d+ tensors in all"):
        load_vit(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"is no whole safetensors file"):
        load_vit(tmp_path)


def test_what_is_no_vision_transformer_is_refused(judge):
    from transformers import ViTConfig, ViTForMaskedImageModeling

    says = "model must be a ViT, DeiT or DINOv2 of transformers, got "
    for wrong in (nn.Linear(2, 2), None, CLIP(nn.Identity(), nn.Identity(), 4, d_image=4, d_text=4)):
        with pytest.raises(TypeError, match=says + type(wrong).__name__):
            from_vit(wrong)
    with pytest.raises(TypeError, match=says + "ViTForMaskedImageModeling"):
        from_vit(ViTForMaskedImageModeling(ViTConfig(**SIZES, encoder_stride=4)))
    theirs = judge("ViT")
    theirs.config.hidden_act = "relu6"
    with pytest.raises(ValueError, match=r"hidden_act must be one of .* in the model's ViTConfig"):
        from_vit(theirs)
