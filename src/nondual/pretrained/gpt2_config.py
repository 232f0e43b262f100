"""config.json of a GPT-2 or GPT-1 checkpoint: Hugging Face's settings with their defaults, each checked."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from nondual.language_models.gpt_family import gelu_new
from nondual.pretrained.clip_config import ACTIVATIONS as NAMED
from nondual.pretrained.clip_config import LARGEST

Kind = Literal["gpt2", "openai-gpt"]

# What Hugging Face takes for a setting that config.json leaves out.
SHARED: dict[str, Any] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": SHARED | {"vocab_size": 50257, "n_positions": 1024, "n_inner": None, "activation_function": "gelu_new"},
    "openai-gpt": SHARED | {"vocab_size": 40478, "n_positions": 512, "afn": "gelu"},
}
ACTIVATIONS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "gpt2": NAMED,
    "openai-gpt": {"gelu": gelu_new, "relu": F.relu, "silu": F.silu, "swish": F.silu},  # its "gelu" is the tanh form
}
OTHER_MODELS: dict[str, bool] = {  # what must be so in a GPT-2 where config.json says it
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Hugging Face's settings of a model, with defaults for what is left out; each that matters here is checked.

    Args:
        config: what config.json holds.
        where: the file or class, for the errors.

    Returns:
        The settings; "activation" is the function, and n_inner the feed-forward width in every case.

    Raises:
        ValueError: another kind of model, or a setting that this library does not have.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        kinds = ", ".join(map(repr, get_args(Kind)))
        raise ValueError(f"model_type must be one of {kinds} in {where}, got {kind!r:.100}")
    found = DEFAULTS[kind] | dict(config)
    if kind == "openai-gpt" or found["n_inner"] is None:
        width = found["n_embd"]
        found["n_inner"] = 4 * width if type(width) is int else width
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        value = found[name]
        if type(value) is not int or not 1 <= value < LARGEST:
            raise ValueError(f"{name} must be an integer from 1 to {LARGEST - 1} in {where}, got {value!r:.100}")
    if found["n_embd"] % found["n_head"]:
        raise ValueError(f"n_embd must be a multiple of n_head in {where}, got {found['n_embd']} and {found['n_head']}")
    name = "afn" if kind == "openai-gpt" else "activation_function"
    if not isinstance(found[name], str) or found[name] not in ACTIVATIONS[kind]:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS[kind])} in {where}, got {found[name]!r:.100}")
    found["activation"] = ACTIVATIONS[kind][found[name]]
    eps = found["layer_norm_epsilon"]
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"layer_norm_epsilon must be a number, 0 or more, in {where}, got {eps!r:.100}")
    if not isinstance(found["tie_word_embeddings"], bool):
        raise ValueError(f"tie_word_embeddings must be true or false in {where}, got {found['tie_word_embeddings']!r}")
    for name, value in OTHER_MODELS.items() if kind == "gpt2" else ():
        if found.get(name, value) is not value:
            raise ValueError(f"{name} must be {str(value).lower()} in {where}, got {found[name]!r:.100}")
    return found
