"""Settings of config.json that do not fit, are odd or hostile: each is one error that names setting and file."""

import json

import pytest
import torch

from nondual.pretrained import from_clip, from_siglip, load_clip, load_siglip
from nondual.pretrained.clip import from_hugging_face
from nondual.pretrained.clip_config import read_settings


@pytest.fixture(scope="module")
def kept(two_towers, tmp_path_factory):
    """A folder for each kind; what a test changes in config.json, it puts back."""
    folders = {}
    for kind in ("clip", "siglip"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        two_towers(kind).save_pretrained(folders[kind])
    return folders


def refused(folder, load, part, settings, says):
    file = folder / "config.json"
    before = file.read_text()
    config = json.loads(before)
    (config[part] if part else config).update(settings)
    try:
        file.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=says) as error:
            load(folder)
        assert str(folder) in str(error.value)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize(
    "settings, says",
    [
        ({"hidden_size": "24"}, r"hidden_size must be an integer from 1 to 16777215 in \w+ of .*config.json, got '24'"),
        ({"hidden_size": 2**60}, r"hidden_size must be an integer"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be an integer from 1"),
        ({"num_attention_heads": 7}, r"hidden_size must be a multiple of num_attention_heads in .*, got 2\d and 7"),
        ({"intermediate_size": True}, r"intermediate_size must be an integer .*, got True"),
        ({"intermediate_size": 37}, r"of another shape: \w+_tower.encoder.layers.0.feed_forward.linear1"),
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers are 1000000\d in .*, and .* holds \d+ tensors in all"),
        ({"num_hidden_layers": 1}, r"unexpected: \w+_tower.encoder.layers.1"),
        ({"hidden_act": "swish"}, r"hidden_act must be one of quick_gelu, .*, got 'swish'"),
        ({"hidden_act": ["gelu"]}, r"hidden_act must be one of quick_gelu, .*, got \['gelu'\]"),
        ({"layer_norm_eps": "0"}, r"layer_norm_eps must be a number, 0 or more, in .*, got '0'"),
        ({"layer_norm_eps": float("nan")}, r"layer_norm_eps must be a number, 0 or more, in .*, got nan"),
        ({"attention_dropout": 0.1}, r"attention_dropout must be 0 in .*, got 0.1"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit(kept, part, settings, says):
    refused(kept["clip"], load_clip, part, settings, says)
    refused(kept["siglip"], load_siglip, part, settings, says)


@pytest.mark.parametrize(
    "kind, part, settings, says",
    [
        ("clip", None, {"model_type": "chinese_clip"}, r"model_type must be 'clip' in .*, got 'chinese_clip'"),
        ("siglip", None, {"model_type": "siglip2"}, r"model_type must be 'siglip' in .*, got 'siglip2'"),
        ("clip", None, {"projection_dim": None}, r"projection_dim must be an integer .*, got None"),
        ("clip", None, {"text_config": 3}, r"text_config must be an object in .*, got 3"),
        ("clip", None, {"vision_config_dict": "x"}, r"vision_config must be an object in .*, got 'x'"),
        ("clip", "text_config", {"eos_token_id": [52]}, r"eos_token_id must be an integer .*, got \[52\]"),
        ("clip", "vision_config", {"image_size": [12, 12]}, r"image_size must be an integer .*, got \[12, 12\]"),
        ("clip", "vision_config", {"patch_size": 13}, r"patch_size must be at most image_size in .*, got 13 and 12"),
        ("clip", "vision_config", {"patch_size": 3}, r"of another shape: image_tower"),
        ("siglip", "text_config", {"projection_size": 21}, r"projection_size of the texts .*, got 21 and 20"),
        ("siglip", "text_config", {"max_position_embeddings": 0}, r"max_position_embeddings must be an integer"),
        ("siglip", "vision_config", {"vision_use_head": False}, r"vision_use_head must be true in .*, got False"),
    ],
    ids=str,
)
def test_a_setting_of_one_kind_that_does_not_fit(kept, kind, part, settings, says):
    refused(kept[kind], {"clip": load_clip, "siglip": load_siglip}[kind], part, settings, says)


def test_what_is_left_out_is_what_transformers_takes():
    from transformers import CLIPConfig, SiglipConfig

    for kind, config in (("clip", CLIPConfig()), ("siglip", SiglipConfig())):
        found = read_settings({"model_type": kind}, kind, "here")
        whole = read_settings(config.to_dict(), kind, "there")
        for part in ("text", "vision"):
            assert {name: whole[part][name] for name in found[part]} == found[part]
        assert found.get("projection_dim") == whole.get("projection_dim")


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


@pytest.mark.parametrize(
    "kind, settings, weights",
    [
        ("clip", {}, 151_277_313),  # openai/clip-vit-base-patch32
        ("siglip", {}, 203_155_970),  # google/siglip-base-patch16-224
        (  # google/siglip-so400m-patch14-384: 27 patches of 14 pixels leave 6 of 384 over
            "siglip",
            {"text_config": SO400M, "vision_config": SO400M | {"image_size": 384, "patch_size": 14}},
            877_960_498,
        ),
    ],
    ids=["clip base", "siglip base", "siglip so400m"],
)
def test_the_released_sizes_have_their_weights_by_name_and_shape(kind, settings, weights):
    """On the meta device: nothing is computed, and nothing takes memory."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    with torch.device("meta"):
        if kind == "clip":
            theirs = CLIPModel(CLIPConfig(**settings))
            ours = from_clip(theirs)
        else:
            theirs = SiglipModel(SiglipConfig(**settings))
            ours = from_siglip(theirs)
    assert sum(p.numel() for p in ours.parameters()) == weights
    expected = {name: x.shape for name, x in from_hugging_face(theirs.state_dict()).items()}
    assert {name: x.shape for name, x in ours.state_dict().items()} == expected
