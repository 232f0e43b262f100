"""Mamba and Mamba-2 checkpoints from a folder, in our own classes.

Two layouts of a folder are read: Hugging Face's (`save_pretrained`, state-spaces/mamba-130m-hf) and that of the code
released with the papers (its keys and its config.json), once its tensors are stored as safetensors.

Sources: Gu and Dao 2023 (2312.00752); Dao and Gu 2024 (2405.21060).
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.language_models.mamba import MambaLM
from nondual.pretrained.checkpoint import check_dtype, check_layers, existing_folder, filled, renamed_tensors
from nondual.pretrained.mamba_config import read_config


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
    place = existing_folder(folder, "load_mamba")
    config = read_config(place, "mamba")
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
    place = existing_folder(folder, "load_mamba2")
    config = read_config(place, "mamba2")
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


def _load(
    folder: Path, config: dict[str, Any], mixer: Callable[[int], nn.Module], dtype: torch.dtype | None
) -> MambaLM:
    """The model that the configuration describes, with the folder's tensors in it."""
    check_dtype(dtype)
    state = renamed_tensors(folder, from_mamba)
    tied = config["tie_word_embeddings"]
    if tied and {"lm_head.weight", "embeddings.weight"} <= state.keys():  # the released code stores one tensor twice
        scores, embeddings = state.pop("lm_head.weight"), state["embeddings.weight"]
        if scores.dtype != embeddings.dtype or not torch.equal(scores, embeddings):
            raise ValueError(
                f"lm_head.weight must be embeddings.weight where {folder / 'config.json'} says tie_word_embeddings, "
                "and is not: set it to false there"
            )
    check_layers((config["num_hidden_layers"],), state, folder)
    make = partial(
        MambaLM,
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        mixer=mixer,
        tied=tied,
        eps=config["layer_norm_epsilon"],
        residual_in_fp32=config["residual_in_fp32"],
    )
    return filled(make, state, folder, dtype)


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
