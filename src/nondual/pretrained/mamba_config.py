"""config.json of a Mamba or Mamba-2 checkpoint: Hugging Face's, or that of the code released with the papers.

Both are read into Hugging Face's terms, and every setting is checked, so that a file that is odd or hostile is one
error that names the setting and the file.
"""

import math
from pathlib import Path
from typing import Any, Literal

from nondual.pretrained.checkpoint import read_json

# What Hugging Face takes for a setting that config.json leaves out.
DEFAULTS: dict[str, Any] = {
    "state_size": 16,
    "conv_kernel": 4,
    "expand": 2,
    "hidden_act": "silu",
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": "auto",
}
DEFAULTS2: dict[str, Any] = DEFAULTS | {
    "state_size": 128,
    "head_dim": 64,
    "n_groups": 8,
    "chunk_size": 256,
    "time_step_limit": [0.0, float("inf")],
    "tie_word_embeddings": False,
}

# What each setting may be.
INTEGERS = ("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "time_step_rank")
INTEGERS2 = ("head_dim", "n_groups", "chunk_size")
BOOLEANS = ("residual_in_fp32", "tie_word_embeddings", "use_bias", "use_conv_bias")
LARGEST = 2**24  # what an integer must be below: no width, count or size of a real model comes near it


def read_config(folder: Path, kind: Literal["mamba", "mamba2"]) -> dict[str, Any]:
    """A folder's config.json in Hugging Face's terms, with defaults for what it leaves out; every setting is checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another kind of model, or a setting that this library does not have.
    """
    file = folder / "config.json"
    config = read_json(file)
    if "d_model" in config:
        config = _from_released_code(config, file)
    if config.get("model_type") != kind:
        raise ValueError(f"model_type must be {kind!r} in {file}, got {config.get('model_type')!r:.100}")
    config = (DEFAULTS if kind == "mamba" else DEFAULTS2) | config
    if config["hidden_act"] != "silu":
        raise ValueError(f"hidden_act must be 'silu' in {file}, got {config['hidden_act']!r:.100}")
    for name in (*INTEGERS, *(INTEGERS2 if kind == "mamba2" else ())):
        if name not in config:
            raise ValueError(f"{file} must say {name}")
        if name != "time_step_rank" or config[name] != "auto":
            _integer(config, name, file)
    for name in BOOLEANS:
        if not isinstance(config[name], bool):
            raise ValueError(f"{name} must be true or false in {file}, got {config[name]!r:.100}")
    if not (_is_number(config["expand"]) and 0 < config["expand"] < LARGEST):
        raise ValueError(f"expand must be a number above 0 in {file}, got {config['expand']!r:.100}")
    if not (_is_number(config["layer_norm_epsilon"]) and 0 <= config["layer_norm_epsilon"] < math.inf):
        raise ValueError(
            f"layer_norm_epsilon must be a number, 0 or more, in {file}, got {config['layer_norm_epsilon']!r:.100}"
        )
    if kind == "mamba2":
        config["time_step_limit"] = _limits(config["time_step_limit"], file)
    return config


def _integer(config: dict[str, Any], name: str, file: Path) -> int:
    """A setting that is a positive integer.

    Raises:
        ValueError: it is missing or something else.
    """
    value = config.get(name)
    if type(value) is not int or not 1 <= value < LARGEST:
        raise ValueError(f"{name} must be an integer from 1 to {LARGEST - 1} in {file}, got {value!r:.100}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _limits(value: object, file: Path) -> tuple[float, float]:
    """Mamba-2's bounds of the step length; transformers writes infinity as {"__float__": "Infinity"}."""
    pair = value if isinstance(value, list | tuple) else ()
    numbers = [math.inf if limit == {"__float__": "Infinity"} else limit for limit in pair]
    if len(numbers) != 2 or not all(map(_is_number, numbers)) or not 0 <= numbers[0] <= numbers[1]:
        raise ValueError(f"time_step_limit must be two numbers in order, 0 or more, in {file}, got {value!r:.100}")
    try:
        return float(numbers[0]), float(numbers[1])
    except OverflowError:  # an integer of hundreds of digits
        raise ValueError(f"time_step_limit must be two numbers that a float holds in {file}") from None


def _from_released_code(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The released code's configuration in Hugging Face's terms.

    Raises:
        ValueError: a setting that this library does not have.
    """
    mixer = config.get("ssm_cfg") or {}
    if not isinstance(mixer, dict):
        raise ValueError(f"ssm_cfg must be an object in {file}, got {mixer!r:.100}")
    layer = mixer.get("layer", "Mamba1")
    mixer = {name: value for name, value in mixer.items() if name != "layer"}
    kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}.get(layer) if isinstance(layer, str) else None
    if kind is None or config.get("attn_layer_idx") or config.get("d_intermediate") or not config.get("rms_norm", True):
        raise ValueError(
            f"{file} must describe Mamba or Mamba-2 blocks with RMSNorm, without attention or an MLP between them, "
            f"got layer {layer!r:.50}, attn_layer_idx {config.get('attn_layer_idx')!r:.50}, "
            f"d_intermediate {config.get('d_intermediate')!r:.50}, rms_norm {config.get('rms_norm')!r:.50}"
        )
    theirs = {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "expand": "expand",
        "dt_rank": "time_step_rank",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
        "headdim": "head_dim",
        "ngroups": "n_groups",
        "chunk_size": "chunk_size",
        "dt_limit": "time_step_limit",
    }
    if unknown := sorted(mixer.keys() - theirs.keys()):
        raise ValueError(f"ssm_cfg in {file} must hold {sorted(theirs)}, got {', '.join(unknown):.100} too")
    multiple = _integer({"pad_vocab_size_multiple": 8} | config, "pad_vocab_size_multiple", file)
    return {
        "model_type": kind,
        "vocab_size": -(-_integer(config, "vocab_size", file) // multiple) * multiple,  # rounded up
        "hidden_size": _integer(config, "d_model", file),
        "num_hidden_layers": _integer(config, "n_layer", file),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        **({"n_groups": 1} if kind == "mamba2" else {}),
        **{theirs[name]: value for name, value in mixer.items()},
    }
