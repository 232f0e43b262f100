"""Settings of ViT, DeiT and DINOv2 checkpoints: transformers' own defaults, and one error for each that is odd."""

import pytest
from transformers import DeiTConfig, Dinov2Config, Dinov2WithRegistersConfig, ViTConfig

from nondual.pretrained.vit_config import DEFAULTS, read_settings

SMALL = {"hidden_size": 20, "num_attention_heads": 5, "image_size": 12, "patch_size": 4}


@pytest.mark.parametrize("kind", [ViTConfig, DeiTConfig, Dinov2Config, Dinov2WithRegistersConfig])
def test_what_is_left_out_is_what_transformers_takes(kind):
    theirs = kind().to_dict()
    ours = DEFAULTS[kind.model_type]
    assert {name: theirs[name] for name in ours} == ours
    found, told = read_settings({"model_type": kind.model_type}, "here"), read_settings(theirs, "here")
    assert found == {name: told[name] for name in found}
    assert found["intermediate_size"] == 3072 and found["image_size"] == (224, 224)


def test_widths_of_the_gated_network_are_dinov2_giants():
    """1536 wide, a ratio of 4, three matrices of 4096."""
    config = {"model_type": "dinov2", "hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True}
    assert read_settings(config, "here")["intermediate_size"] == 4096


def test_sizes_may_be_two_numbers():
    found = read_settings({"model_type": "vit", "image_size": [32, 48], "patch_size": (8, 16)}, "here")
    assert (found["image_size"], found["patch_size"], found["num_register_tokens"]) == ((32, 48), (8, 16), 0)


@pytest.mark.parametrize(
    "kind, setting, says",
    [
        ("clip", {}, r"model_type must be one of 'vit', 'deit', 'dinov2', .* in config.json, got 'clip'"),
        (["vit"], {}, r"model_type must be one of"),
        (None, {}, r"model_type must be one of .*, got None"),
        ("vit", {"hidden_size": 0}, "hidden_size must be an integer from 1 to"),
        ("vit", {"hidden_size": 2**30}, "hidden_size must be an integer from 1 to"),
        ("vit", {"hidden_size": 21}, "hidden_size must be a multiple of num_attention_heads in .*, got 21 and 5"),
        ("vit", {"hidden_act": "tanh"}, "hidden_act must be one of"),
        ("vit", {"hidden_act": ["gelu"]}, "hidden_act must be one of"),
        ("vit", {"layer_norm_eps": -1}, "layer_norm_eps must be a number, 0 or more"),
        ("deit", {"layer_norm_eps": float("nan")}, "layer_norm_eps must be a number, 0 or more"),
        ("vit", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob must be 0 in"),
        ("deit", {"attention_probs_dropout_prob": 0.1}, "attention_probs_dropout_prob must be 0 in"),
        ("vit", {"qkv_bias": "yes"}, "qkv_bias must be true or false"),
        ("vit", {"image_size": [12]}, "image_size must be one integer or two"),
        ("vit", {"image_size": 12.0}, "image_size must be an integer"),
        ("vit", {"patch_size": 5}, r"patch_size must divide image_size in .*, got \(5, 5\) and \(12, 12\)"),
        ("vit", {"intermediate_size": None}, "intermediate_size must be an integer"),
        ("dinov2", {"mlp_ratio": 0}, "mlp_ratio must be an integer from 1"),
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio must be a number"),
        ("dinov2", {"use_swiglu_ffn": 1}, "use_swiglu_ffn must be true or false"),
        ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate must be 0"),
        ("dinov2", {"layerscale_value": None}, "layerscale_value must be a number"),
        ("dinov2_with_registers", {"num_register_tokens": -1}, "num_register_tokens must be an integer from 0"),
    ],
)
def test_settings_that_this_library_does_not_have(kind, setting, says):
    with pytest.raises(ValueError, match=says):
        read_settings(SMALL | {"model_type": kind} | setting, "config.json")
