"""Mamba and Mamba-2 checkpoints from a folder, in our own classes: safetensors only, so that reading runs no code.

Two layouts of a folder are read: Hugging Face's (`save_pretrained`, state-spaces/mamba-130m-hf) and that of the code
released with the papers (its keys and its config.json), once its tensors are stored as safetensors. A large model may
lie in several files with an index.
"""

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.mamba import MambaLM

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_mamba(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto",
) -> MambaLM:
    """The Mamba language model whose checkpoint lies in a folder, on the CPU, in evaluation mode.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and the files that it names.
            It is a folder on this machine: a model on the Hugging Face Hub is downloaded into one first, by
            `hf download NAME --local-dir FOLDER`.
        dtype: of the weights: float16, bfloat16, float32 or float64; as they are stored where left out.
        impl: the scan's engine, as in `nondual.ops.selective_scan`.

    Raises:
        FileNotFoundError: the folder, config.json or the tensors are missing.
        ValueError: another kind of model, a setting that this library does not have, a file that is cut or damaged, an
            index that names files outside the folder, tensors that are missing, too many, or of the wrong shape or
            dtype. The message names the file or the folder.
        TypeError: folder is no path, or dtype no torch.dtype.
        ImportError: safetensors is not installed.
    """
    place = _folder(folder, "load_mamba")
    config = _config(place, "mamba")
    mixer = partial(
        Mamba,
        d_state=config["state_size"],
        d_conv=config["conv_kernel"],
        expand=config["expand"],
        dt_rank=None if config["time_step_rank"] == "auto" else config["time_step_rank"],
        bias=config["use_bias"],
        conv_bias=config["use_conv_bias"],
        impl=impl,
    )
    return _load(place, config, mixer, dtype)


def load_mamba2(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    impl: Literal["auto", "reference", "chunked", "triton"] = "auto",
) -> MambaLM:
    """The Mamba-2 language model whose checkpoint lies in a folder, on the CPU, in evaluation mode.

    Args:
        folder: as in `load_mamba`.
        dtype: as in `load_mamba`.
        impl: the engine of the state space duality, as in `nondual.ops.ssd`.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `load_mamba`.
    """
    place = _folder(folder, "load_mamba2")
    config = _config(place, "mamba2")
    mixer = partial(
        Mamba2,
        d_state=config["state_size"],
        d_conv=config["conv_kernel"],
        expand=config["expand"],
        d_head=config["head_dim"],
        n_groups=config["n_groups"],
        dt_limit=config["time_step_limit"],
        bias=config["use_bias"],
        conv_bias=config["use_conv_bias"],
        eps=config["layer_norm_epsilon"],
        chunk=config["chunk_size"],
        impl=impl,
    )
    return _load(place, config, mixer, dtype)


def _folder(folder: str | os.PathLike[str], function: str) -> Path:
    """The folder as a path, if there is one.

    Raises:
        FileNotFoundError: there is none; for what looks like a name on the Hugging Face Hub, with how to get it.
        ValueError: it is a file.
        TypeError: it is no path.
    """
    if not isinstance(folder, str | os.PathLike) or not isinstance(os.fspath(folder), str):
        raise TypeError(f"folder must be a str or a path, got {type(folder).__name__}")
    name = os.fspath(folder)
    place = Path(os.path.expanduser(name))
    if place.is_dir():
        return place
    if place.exists():
        raise ValueError(f"folder must be a folder that holds config.json, got the file {place}")
    hub = ""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        local = name.split("/")[1]
        hub = (
            f"; if it is a model on the Hugging Face Hub, download it first, one that has .safetensors files: "
            f"`hf download {name} --local-dir {local}` (pip install huggingface_hub), then {function}({local!r})"
        )
    raise FileNotFoundError(f"there is no folder {name}{hub}")


def _load(
    folder: Path, config: dict[str, Any], mixer: Callable[[int], nn.Module], dtype: torch.dtype | None
) -> MambaLM:
    """The model that the configuration describes, with the folder's tensors in it."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    state = _in_our_names(_tensors(folder), folder)
    tied = config["tie_word_embeddings"]
    if tied and {"lm_head.weight", "embeddings.weight"} <= state.keys():  # the same, stored twice
        scores, embeddings = state.pop("lm_head.weight"), state["embeddings.weight"]
        if scores.dtype != embeddings.dtype or not torch.equal(scores, embeddings):
            raise ValueError(
                f"lm_head.weight must be embeddings.weight where {folder / 'config.json'} says tie_word_embeddings, "
                "and is not: set it to false there"
            )
    if config["num_hidden_layers"] > len(state):  # a model of so many layers would take for ever to make
        raise ValueError(
            f"num_hidden_layers is {config['num_hidden_layers']} in {folder / 'config.json'}, and {folder} holds "
            f"{len(state)} tensors in all"
        )
    try:
        with torch.device("meta"):  # shapes only: the numbers are the file's
            model = MambaLM(
                config["vocab_size"],
                config["hidden_size"],
                config["num_hidden_layers"],
                mixer=mixer,
                tied=tied,
                eps=config["layer_norm_epsilon"],
                residual_in_fp32=config["residual_in_fp32"],
            )
    except (ValueError, RuntimeError) as why:  # widths that do not divide, or too large for torch
        raise ValueError(f"{folder / 'config.json'} describes no model: {str(why).splitlines()[0]}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
        "of another dtype than float16, bfloat16, float32 and float64": [
            f"{name} {state[name].dtype}" for name in expected if name in state and state[name].dtype not in DTYPES
        ],
    }
    if found := "; ".join(f"{what}: {_first(names)}" for what, names in problems.items() if names):
        raise ValueError(f"the tensors of {folder} must be those that its config.json describes; {found}")
    model.load_state_dict(state, assign=True)
    return (model if dtype is None else model.to(dtype)).eval()


def _first(names: list[str], count: int = 4) -> str:
    """The first of a list, which may have hundreds, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def from_mamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, in Hugging Face's names or in those of the released code, in the names of `MambaLM`.

    Raises:
        ValueError: two of the names mean the same tensor.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = name.removeprefix("backbone.").replace("embedding.", "embeddings.", 1)
        if ours in renamed:
            raise ValueError(f"there are two tensors for {ours}: one of them is named {name}")
        renamed[ours] = tensor
    return renamed


def _in_our_names(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    try:
        return from_mamba(state)
    except ValueError as why:
        raise ValueError(f"{folder}: {why}") from None


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from one safetensors file or from several with an index.

    Raises:
        FileNotFoundError: a file is missing; where only pickled weights are there, with how to convert them.
        ValueError: a file is cut or damaged, an index names files elsewhere, or two files have the same tensor.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("safetensors is needed: pip install 'nondual[pretrained]'") from None
    index = folder / "model.safetensors.index.json"
    names = _shards(index) if index.exists() else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).exists()]:
        pickled = ""
        if found := sorted(folder.glob("*.bin")):
            pickled = (
                f" ({found[0].name} is a pickle, and is not read, for reading one can run code: convert it, by "
                "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')`)"
            )
        raise FileNotFoundError(f"there is no {', '.join(str(folder / name) for name in missing)}{pickled}")
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            loaded = load_file(folder / name)
        except Exception as why:  # safetensors has its own errors for some faults, and any of Python's for others
            said = str(why).splitlines()[0] if str(why) else type(why).__name__
            raise ValueError(f"{folder / name} is no whole safetensors file: {said:.200}") from None
        if twice := sorted(state.keys() & loaded.keys()):
            raise ValueError(f"{twice[0]} is in {folder / name} and in another file of the model too")
        state |= loaded
    return state


def _shards(index: Path) -> list[str]:
    """The files that an index names, each in the index's own folder."""
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index} must have a weight_map from names of tensors to names of files")
    for name in files.values():
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise ValueError(f"{index} must name .safetensors files of its own folder, got {name!r:.100}")
    return sorted(set(files.values()))


def _json(file: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut, damaged, far too large, or holds no object.
    """
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}")
    if not file.is_file() or file.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{file} must be a JSON file of at most {LARGEST_JSON >> 20} MiB")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as why:  # no JSON, no Unicode, digits without end; brackets without end
        said = "it is nested too deep" if isinstance(why, RecursionError) else str(why).splitlines()[0]
        raise ValueError(f"{file} is no whole JSON file: {said:.200}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(found).__name__}")
    return found


# --- configuration -------------------------------------------------------------------------------------------------

# What Hugging Face takes where a config.json is silent.
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
LARGEST = 2**24  # of one width: no model comes near it
LARGEST_JSON = 2**26  # bytes


def _config(folder: Path, kind: Literal["mamba", "mamba2"]) -> dict[str, Any]:
    """A folder's config.json in Hugging Face's terms, complete; every setting is what it may be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another kind of model, or a setting that this library does not have.
    """
    file = folder / "config.json"
    config = _json(file)
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
    """A setting that is a size.

    Raises:
        ValueError: it is missing or none.
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
