"""Mamba and Mamba-2 checkpoints from a folder, in our own classes: safetensors only, so that reading runs no code.

Two layouts of a folder are read: Hugging Face's (`save_pretrained`, state-spaces/mamba-130m-hf) and that of the code
released with the papers (its keys and its config.json), once its tensors are stored as safetensors. A large model may
lie in several files with an index.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.mamba import MambaLM


def load_mamba(folder: str | Path, *, dtype: torch.dtype | None = None, impl: str = "auto") -> MambaLM:
    """The Mamba language model whose checkpoint lies in a folder, on the CPU, in evaluation mode.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and the files that it names.
        dtype: of the weights; as they are stored where left out.
        impl: the scan's engine, as in `nondual.ops.selective_scan`.

    Raises:
        FileNotFoundError: config.json or the tensors are missing.
        ValueError: another kind of model, a setting that this library does not have, tensors that are missing, too
            many, or of the wrong shape.
        ImportError: safetensors is not installed.
    """
    config = _config(folder, "mamba")
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
    return _load(folder, config, mixer, dtype)


def load_mamba2(folder: str | Path, *, dtype: torch.dtype | None = None, impl: str = "auto") -> MambaLM:
    """The Mamba-2 language model whose checkpoint lies in a folder, on the CPU, in evaluation mode.

    Args:
        folder: as in `load_mamba`.
        dtype: of the weights; as they are stored where left out.
        impl: the engine of the state space duality, as in `nondual.ops.ssd`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `load_mamba`.
    """
    config = _config(folder, "mamba2")
    low, high = (float("inf") if isinstance(limit, dict) else float(limit) for limit in config["time_step_limit"])
    mixer = partial(
        Mamba2,
        d_state=config["state_size"],
        d_conv=config["conv_kernel"],
        expand=config["expand"],
        d_head=config["head_dim"],
        n_groups=config["n_groups"],
        dt_limit=(low, high),
        bias=config["use_bias"],
        conv_bias=config["use_conv_bias"],
        eps=config["layer_norm_epsilon"],
        chunk=config["chunk_size"],
        impl=impl,
    )
    return _load(folder, config, mixer, dtype)


def _load(folder: str | Path, config: dict, mixer: Callable[[int], nn.Module], dtype: torch.dtype | None) -> MambaLM:
    """The model that the configuration describes, with the folder's tensors in it."""
    state = from_mamba(_tensors(Path(folder)))
    tied = config["tie_word_embeddings"]
    if tied and {"lm_head.weight", "embeddings.weight"} <= state.keys():  # the same, stored twice
        if not torch.equal(state.pop("lm_head.weight"), state["embeddings.weight"]):
            raise ValueError(
                "lm_head.weight must be embeddings.weight where config.json says tie_word_embeddings, and is not: "
                "set it to false there"
            )
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
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, not {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    if found := "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names):
        raise ValueError(f"the tensors of {folder} must be those that its config.json describes; {found}")
    model.load_state_dict(state, assign=True)
    return (model if dtype is None else model.to(dtype)).eval()


def from_mamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, in Hugging Face's names or in those of the released code, in the names of `MambaLM`."""
    names = {name: name.removeprefix("backbone.") for name in state}
    return {name.replace("embedding.", "embeddings.", 1): state[old] for old, name in names.items()}


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from one safetensors file or from several with an index."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("safetensors is needed: pip install 'nondual[pretrained]'") from None
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.exists():
            pickled = " (pytorch_model.bin is a pickle, and is not read: convert it)"
            raise FileNotFoundError(f"there is no {file}{pickled if (folder / 'pytorch_model.bin').exists() else ''}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# --- configuration -------------------------------------------------------------------------------------------------

# What Hugging Face takes where a config.json is silent.
DEFAULTS = {
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
DEFAULTS2 = DEFAULTS | {
    "state_size": 128,
    "head_dim": 64,
    "n_groups": 8,
    "chunk_size": 256,
    "time_step_limit": [0.0, float("inf")],
    "tie_word_embeddings": False,
}


def _config(folder: str | Path, kind: str) -> dict:
    """A folder's config.json in Hugging Face's terms, complete, after a look at what this library does not have."""
    file = Path(folder) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"there is no {file}")
    config = json.loads(file.read_text())
    if "d_model" in config:
        config = _from_released_code(config)
    if config.get("model_type") != kind:
        raise ValueError(f"model_type must be {kind!r} in {file}, got {config.get('model_type')!r}")
    config = (DEFAULTS if kind == "mamba" else DEFAULTS2) | config
    if config["hidden_act"] != "silu":
        raise ValueError(f"hidden_act must be 'silu' in {file}, got {config['hidden_act']!r}")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if name not in config:
            raise ValueError(f"{file} must say {name}")
    return config


def _from_released_code(config: dict) -> dict:
    """The released code's configuration in Hugging Face's terms.

    Raises:
        ValueError: a setting that this library does not have.
    """
    mixer = dict(config.get("ssm_cfg") or {})
    kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}.get(layer := mixer.pop("layer", "Mamba1"))
    if kind is None or config.get("attn_layer_idx") or config.get("d_intermediate") or not config.get("rms_norm", True):
        raise ValueError(
            "config.json must describe Mamba or Mamba-2 blocks with RMSNorm, without attention or an MLP between them, "
            f"got layer {layer!r}, attn_layer_idx {config.get('attn_layer_idx')}, "
            f"d_intermediate {config.get('d_intermediate')}, rms_norm {config.get('rms_norm')}"
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
        raise ValueError(f"ssm_cfg in config.json must hold {sorted(theirs)}, got {', '.join(unknown)} too")
    multiple = config.get("pad_vocab_size_multiple", 8)
    return {
        "model_type": kind,
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "tie_word_embeddings": config.get("tie_embeddings", True),
        **({"n_groups": 1} if kind == "mamba2" else {}),
        **{theirs[name]: value for name, value in mixer.items()},
    }
