"""GPT-2 and GPT-1 checkpoints in our own class: from a folder, or copied from a model of transformers.

A folder is laid out as `save_pretrained` writes it, and as openai-community/gpt2 (and gpt2-medium, gpt2-large, gpt2-xl,
distilgpt2) and openai-community/openai-gpt are on the Hugging Face Hub: config.json beside safetensors, in one file or
several with an index. Names of tensors may begin with "transformer." or not.

    model = load_gpt2("gpt2")
    model(ids)                  # (B, N, V)
    model.generate(ids, 20)     # with a cache

Their linear layers keep the transpose of a matrix ("Conv1D"), and those of queries, keys and values lie side by side in
one. Masks that old checkpoints store as tensors are left out, for they are the causal mask. Dropout is 0, whatever
config.json says: `GPTFamily(size, dropout=0.1)` trains one with it.

Sources: Radford et al. 2018 and 2019, as in `nondual.language_models.gpt_family`.
"""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nondual.language_models.gpt_family import GPTFamily, GPTSize
from nondual.pretrained.checkpoint import check_dtype, check_layers, existing_folder, filled, read_json, renamed_tensors
from nondual.pretrained.gpt2_config import DEFAULTS, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_gpt2(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> GPTFamily:
    """The GPT-2 or GPT-1 whose checkpoint lies in a folder, on the CPU, in evaluation mode.

    Args:
        folder: holds config.json and model.safetensors, or model.safetensors.index.json and the files that it names.
            It is a folder on this machine: a model on the Hugging Face Hub is downloaded into one first, by
            `hf download NAME --local-dir FOLDER`.
        dtype: of the weights: float16, bfloat16, float32 or float64; as they are stored where left out.

    Raises:
        FileNotFoundError: the folder, config.json or the tensors are missing.
        ValueError: another kind of model, a setting that this library does not have, a file that is cut or damaged,
            tensors that are missing, too many, or of the wrong shape or dtype. The message names the file or folder.
        TypeError: folder is no path, or dtype no torch.dtype.
        ImportError: safetensors is not installed.
    """
    place = existing_folder(folder, "load_gpt2")
    check_dtype(dtype)
    file = place / "config.json"
    config = read_settings(read_json(file), str(file))
    state = _without_twin(renamed_tensors(place, from_hugging_face), config, str(file))
    check_layers((config["n_layer"],), state, place, "n_layer")
    return filled(lambda: _made(config), state, place, dtype)


def from_gpt2(model: "PreTrainedModel") -> GPTFamily:
    """A copy of a GPT-2 or GPT-1 of transformers, in its dtype, on its device, in evaluation mode.

        ours = from_gpt2(theirs)
        ours(ids)                                # theirs(ids).logits
        ours.generate(ids, 20)                   # theirs.generate(ids, max_new_tokens=20, do_sample=False)

    Args:
        model: a GPT2LMHeadModel or an OpenAIGPTLMHeadModel.

    Raises:
        TypeError: another model.
        ValueError: a setting that this library does not have.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in DEFAULTS or not type(model).__name__.endswith("LMHeadModel"):
        raise TypeError(
            f"model must be a GPT2LMHeadModel or OpenAIGPTLMHeadModel of transformers, got {type(model).__name__}"
        )
    where = f"the model's {type(config).__name__}"
    settings = read_settings(config.to_dict(), where)
    state = _without_twin(from_hugging_face(model.state_dict()), settings, where)
    like = state["embeddings.weight"]
    ours = _made(settings).to(like.device, like.dtype)
    ours.load_state_dict(state)
    return ours.eval()


def _made(config: Mapping[str, Any]) -> GPTFamily:
    """The model that the settings describe."""
    size = GPTSize(
        config["vocab_size"],
        config["n_positions"],
        config["n_embd"],
        config["n_layer"],
        config["n_head"],
        norm_first=config["model_type"] == "gpt2",
        d_ff=config["n_inner"],
    )
    return GPTFamily(
        size,
        activation=config["activation"],
        tied=config["tie_word_embeddings"],
        eps=config["layer_norm_epsilon"],
    )


# --- tensors ---------------------------------------------------------------------------------------------------------

NAMES: dict[str, str] = {
    "wte.": "embeddings.",
    "tokens_embed.": "embeddings.",
    "wpe.": "positions.table.",
    "positions_embed.": "positions.table.",
    "ln_f.": "norm_f.",
    "h.": "layers.",
}
IN_LAYER: dict[str, str] = {
    "attn.c_proj.": "mixer.out_proj.",
    "mlp.c_fc.": "feed_forward.linear1.",
    "mlp.c_proj.": "feed_forward.linear2.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
}
NO_WEIGHTS: re.Pattern[str] = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|position_ids")
"""Masks and position numbers, which old checkpoints store."""


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors in the names of `GPTFamily`, matrices the way nn.Linear keeps them.

    Raises:
        ValueError: two of the names mean the same tensor.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = name.removeprefix("transformer.")
        if NO_WEIGHTS.fullmatch(bare):
            continue
        new = bare
        for theirs, ours in NAMES.items():
            new = ours + new.removeprefix(theirs) if new.startswith(theirs) else new
        parts = {new: tensor}
        if new.startswith("layers."):
            parts = _of_layer(new, tensor)
        for new, part in parts.items():
            if new in renamed:
                raise ValueError(f"there are two tensors for {new}: one of them is named {name}")
            renamed[new] = part
    return renamed


def _of_layer(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a layer, turned if it is a matrix; queries, keys and values apart."""
    turned = tensor.T.contiguous() if tensor.ndim == 2 else tensor  # Conv1D (in, out) to nn.Linear (out, in)
    if ".attn.c_attn." in name:
        stem, kind = name.split("attn.c_attn.")
        thirds = turned.chunk(3) if len(turned) % 3 == 0 else (turned,) * 3
        return {f"{stem}mixer.{part}_proj.{kind}": third.contiguous() for part, third in zip("qkv", thirds)}
    for theirs, ours in IN_LAYER.items():
        name = name.replace(f".{theirs}", f".{ours}")
    return {name: turned}


def _without_twin(state: dict[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors without lm_head.weight where it is the embeddings once more.

    Raises:
        ValueError: it is another matrix, though the settings say that the two are tied.
    """
    if not config["tie_word_embeddings"] or not {"lm_head.weight", "embeddings.weight"} <= state.keys():
        return state
    scores, embeddings = state["lm_head.weight"], state["embeddings.weight"]
    if scores.dtype != embeddings.dtype or not torch.equal(scores, embeddings):
        raise ValueError(
            f"lm_head.weight must be the embeddings where {where} says tie_word_embeddings, and is not: set it to "
            "false there"
        )
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
