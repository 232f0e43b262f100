"""config.json of a ViT, DeiT or DINOv2 checkpoint: Hugging Face's settings with their defaults, each checked."""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from nondual.pretrained.clip_config import ACTIVATIONS, LARGEST

Kind = Literal["vit", "deit", "dinov2", "dinov2_with_registers"]

# What Hugging Face takes for a setting that config.json leaves out.
SHARED: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "image_size": 224,
    "num_channels": 3,
    "qkv_bias": True,
}
OF_VIT: dict[str, Any] = SHARED | {"intermediate_size": 3072, "layer_norm_eps": 1e-12, "patch_size": 16}
OF_DINO: dict[str, Any] = SHARED | {
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "layerscale_value": 1.0,
    "drop_path_rate": 0.0,
    "use_swiglu_ffn": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": OF_VIT,
    "deit": OF_VIT,
    "dinov2": OF_DINO,
    "dinov2_with_registers": OF_DINO | {"patch_size": 16, "num_register_tokens": 4},
}


def read_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Hugging Face's settings of a model, with defaults for what is left out; each that matters here is checked.

    Args:
        config: what config.json holds.
        where: the file or class, for the errors.

    Returns:
        The settings; image_size and patch_size as (height, width), intermediate_size in every case.

    Raises:
        ValueError: another kind of model, or a setting that this library does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        kinds = ", ".join(map(repr, get_args(Kind)))
        raise ValueError(f"model_type must be one of {kinds} in {where}, got {kind!r:.100}")
    found = DEFAULTS[kind] | dict(config)
    dino = "mlp_ratio" in DEFAULTS[kind]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels"):
        _integer(found[name], name, where)
    if found["hidden_size"] % found["num_attention_heads"]:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads in {where}, "
            f"got {found['hidden_size']} and {found['num_attention_heads']}"
        )
    if not isinstance(found["hidden_act"], str) or found["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act must be one of {', '.join(ACTIVATIONS)} in {where}, got {found['hidden_act']!r:.100}"
        )
    for name in ("qkv_bias", *(("use_swiglu_ffn",) if dino else ())):
        if not isinstance(found[name], bool):
            raise ValueError(f"{name} must be true or false in {where}, got {found[name]!r:.100}")
    _number(found["layer_norm_eps"], "layer_norm_eps", where)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", *(("drop_path_rate",) if dino else ())):
        if _number(found[name], name, where) != 0:
            raise ValueError(f"{name} must be 0 in {where}, got {found[name]!r:.100}")
    for name in ("image_size", "patch_size"):
        found[name] = _sides(found[name], name, where)
    if any(side % of for side, of in zip(found["image_size"], found["patch_size"])):
        raise ValueError(
            f"patch_size must divide image_size in {where}, got {found['patch_size']} and {found['image_size']}"
        )
    if kind == "dinov2_with_registers":
        _integer(found["num_register_tokens"], "num_register_tokens", where, least=0)
    else:
        found["num_register_tokens"] = 0
    if dino:
        _number(found["layerscale_value"], "layerscale_value", where)
        width = int(found["hidden_size"] * _number(found["mlp_ratio"], "mlp_ratio", where))
        if found["use_swiglu_ffn"]:  # three matrices instead of two: 2/3 of the width, rounded up to a multiple of 8
            width = (int(width * 2 / 3) + 7) // 8 * 8
        found["intermediate_size"] = width
    _integer(found["intermediate_size"], "mlp_ratio" if dino else "intermediate_size", where)
    return found


def _integer(value: Any, name: str, where: str, least: int = 1) -> int:
    if type(value) is not int or not least <= value < LARGEST:
        raise ValueError(f"{name} must be an integer from {least} to {LARGEST - 1} in {where}, got {value!r:.100}")
    return value


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number, 0 or more, in {where}, got {value!r:.100}")
    return value


def _sides(value: Any, name: str, where: str) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be one integer or two in {where}, got {value!r:.100}")
    return _integer(sides[0], name, where), _integer(sides[1], name, where)
