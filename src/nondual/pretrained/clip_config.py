"""config.json of a CLIP or SigLIP checkpoint: Hugging Face's settings of both towers, with their defaults.

Every setting that matters here is checked, so that a file that is odd or hostile is one error that names the setting
and the file.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from nondual.multimodal.towers import quick_gelu

Kind = Literal["clip", "siglip"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
LARGEST = 2**24  # what an integer must be below: no width, count or size of a real model comes near it
OLD_EOS = 2  # what config.json of CLIP's first conversions says for eos_token_id: the true one has the highest id

# What Hugging Face takes for a setting that config.json leaves out.
WIDE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "attention_dropout": 0.0,
}
NARROW = WIDE | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
IMAGES: dict[str, Any] = {"num_channels": 3, "image_size": 224}
OF_CLIP: dict[str, Any] = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
OF_SIGLIP: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("clip", "text"): NARROW | OF_CLIP | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
    ("clip", "vision"): WIDE | OF_CLIP | IMAGES | {"patch_size": 32},
    ("siglip", "text"): WIDE | OF_SIGLIP | {"vocab_size": 32000, "max_position_embeddings": 64},
    ("siglip", "vision"): WIDE | OF_SIGLIP | IMAGES | {"patch_size": 16, "vision_use_head": True},
}
INTEGERS: tuple[str, ...] = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OF_PART: dict[str, tuple[str, ...]] = {
    "text": ("vocab_size", "max_position_embeddings"),
    "vision": ("num_channels", "image_size", "patch_size"),
}


def read_settings(config: Mapping[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """Hugging Face's settings of a model, "text" and "vision", with defaults for what is left out; each is checked.

    Args:
        config: what config.json holds.
        kind: "clip" or "siglip".
        where: the file or class, for the errors.

    Raises:
        ValueError: another kind of model, or a setting that this library does not have.
    """
    if config.get("model_type") != kind:
        raise ValueError(f"model_type must be {kind!r} in {where}, got {config.get('model_type')!r:.100}")
    found: dict[str, Any] = {}
    for part in ("text", "vision"):
        given = config.get(f"{part}_config_dict")  # older files have both, and this one counts
        given = config.get(f"{part}_config") if given is None else given
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"{part}_config must be an object in {where}, got {given!r:.100}")
        found[part] = _checked(DEFAULTS[kind, part] | dict(given), part, where)
    text, vision = found["text"], found["vision"]
    if kind == "clip":
        found["projection_dim"] = _integer({"projection_dim": 512} | dict(config), "projection_dim", where)
        text["eos_token_id"] = _integer(text, "eos_token_id", where)
    else:
        if text.get("projection_size") is None:
            text["projection_size"] = text["hidden_size"]
        if _integer(text, "projection_size", where) != vision["hidden_size"]:
            raise ValueError(
                f"projection_size of the texts must be hidden_size of the images in {where}, "
                f"got {text['projection_size']} and {vision['hidden_size']}"
            )
        if vision["vision_use_head"] is not True:
            raise ValueError(f"vision_use_head must be true in {where}, got {vision['vision_use_head']!r:.100}")
    return found


def _checked(config: dict[str, Any], part: str, where: str) -> dict[str, Any]:
    where = f"{part}_config of {where}"
    for name in (*INTEGERS, *OF_PART[part]):
        _integer(config, name, where)
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads in {where}, "
            f"got {config['hidden_size']} and {config['num_attention_heads']}"
        )
    if part == "vision" and config["patch_size"] > config["image_size"]:
        raise ValueError(
            f"patch_size must be at most image_size in {where}, got {config['patch_size']} and {config['image_size']}"
        )
    if not isinstance(config["hidden_act"], str) or config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act must be one of {', '.join(ACTIVATIONS)} in {where}, got {config['hidden_act']!r:.100}"
        )
    eps = config["layer_norm_eps"]
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"layer_norm_eps must be a number, 0 or more, in {where}, got {eps!r:.100}")
    if isinstance(config["attention_dropout"], bool) or config["attention_dropout"] not in (0, None):
        raise ValueError(f"attention_dropout must be 0 in {where}, got {config['attention_dropout']!r:.100}")
    return config


def _integer(config: Mapping[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value < LARGEST:
        raise ValueError(f"{name} must be an integer from 1 to {LARGEST - 1} in {where}, got {value!r:.100}")
    return value
