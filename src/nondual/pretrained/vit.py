"""ViT, DeiT and DINOv2 checkpoints in our own class: from a folder, or copied from a model of transformers.

A folder is laid out as `save_pretrained` writes it, and as google/vit-base-patch16-224,
facebook/deit-base-distilled-patch16-224, facebook/dinov2-base and facebook/dinov2-with-registers-base are on the
Hugging Face Hub: config.json beside safetensors, with the names of transformers 4 or 5.

    model = load_vit("vit-base-patch16-224")
    model(pixels)               # (B, 1000), pixels normalised as preprocessor_config.json of the folder says
    model.features(pixels)      # (B, 197, 768), the class token's vector first

    checkpoint            head
    ViT                   on the class token
    DeiT                  two, on class and distillation token, whose mean counts; or one, on the class token
    DINOv2, with or       on the class token beside the mean of the patches
    without registers
    one without a head    none: the model gives the class token's vector, (B, E)

A pooler (a layer that some checkpoints have after the class token) and a mask token (used in training alone) are left
out. Where qkv_bias is false, those biases are here, and 0.

Sources: Dosovitskiy et al. 2020 (2010.11929); Touvron et al. 2020 (2012.12877); Oquab et al. 2023 (2304.07193); Darcet
et al. 2023 (2309.16588).
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.feed_forward import FeedForward, GatedFeedForward
from nondual.pretrained.checkpoint import check_dtype, check_layers, existing_folder, filled, read_json, renamed_tensors
from nondual.pretrained.clip_config import ACTIVATIONS
from nondual.pretrained.vit_config import DEFAULTS, read_settings
from nondual.vision_transformers.vit import Pool, VisionTransformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_vit(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> VisionTransformer:
    """The Vision Transformer whose checkpoint lies in a folder, on the CPU, in evaluation mode.

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
    place = existing_folder(folder, "load_vit")
    check_dtype(dtype)
    file = place / "config.json"
    config = read_settings(read_json(file), str(file))
    state = renamed_tensors(place, from_hugging_face)
    check_layers((config["num_hidden_layers"],), state, place)
    return filled(lambda: _made(config, state), _with_biases(state, config), place, dtype)


def from_vit(model: "PreTrainedModel") -> VisionTransformer:
    """A copy of a ViT, DeiT or DINOv2 of transformers, in its dtype, on its device, in evaluation mode.

        ours = from_vit(theirs)
        ours(pixels)                 # theirs(pixels).logits of a model with a head
        ours.features(pixels)        # theirs(pixels).last_hidden_state of one without

    Args:
        model: ViTModel, DeiTModel, Dinov2Model, Dinov2WithRegistersModel, or one of their …ForImageClassification.

    Raises:
        TypeError: another model.
        ValueError: a setting that this library does not have.
    """
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    state = model.state_dict() if kind in DEFAULTS else {}
    tokens = [name for name in state if name.endswith("embeddings.cls_token")]
    if not tokens or any(name.startswith("decoder.") for name in state):
        raise TypeError(f"model must be a ViT, DeiT or DINOv2 of transformers, got {type(model).__name__}")
    settings = read_settings(config.to_dict(), f"the model's {type(config).__name__}")
    renamed, like = from_hugging_face(state), state[tokens[0]]
    ours = _made(settings, renamed).to(like.device, like.dtype)
    ours.load_state_dict(_with_biases(renamed, settings))
    return ours.eval()


def _made(config: dict[str, Any], state: Mapping[str, Tensor]) -> VisionTransformer:
    """The model that the settings describe, with the heads that the tensors hold."""
    dino, deit = "mlp_ratio" in config, config["model_type"] == "deit"
    heads = [state[name] for name in ("head.weight", "distillation_head.weight") if name in state]
    swiglu = dino and config["use_swiglu_ffn"]
    pool: Pool = "class and mean" if dino and heads else "class"
    model = VisionTransformer(
        config["image_size"],
        config["patch_size"],
        len(heads[0]) if heads and heads[0].ndim else 0,
        d_model=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_channels=config["num_channels"],
        pool=pool,
        distilled=deit,
        n_registers=config["num_register_tokens"],
        antialias=config["model_type"] == "dinov2_with_registers",
        layer_scale=config["layerscale_value"] if dino else None,
        activation=F.silu if swiglu else ACTIVATIONS[config["hidden_act"]],
        eps=config["layer_norm_eps"],
        feed_forward=partial(GatedFeedForward, bias=True) if swiglu else FeedForward,
    )
    if deit and "distillation_head.weight" not in state:
        model.distillation_head = None
    return model


# --- tensors ---------------------------------------------------------------------------------------------------------

NAMES = {
    "embeddings.cls_token": "class_token",
    "embeddings.distillation_token": "distillation_token",
    "embeddings.register_tokens": "registers",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.": "patches.",
    "encoder.layer.": "layers.",  # transformers 4, and DINOv2 in both
    "attention.attention.query.": "mixer.q_proj.",
    "attention.attention.key.": "mixer.k_proj.",
    "attention.attention.value.": "mixer.v_proj.",
    "attention.output.dense.": "mixer.out_proj.",
    "intermediate.dense.": "feed_forward.linear1.",
    "output.dense.": "feed_forward.linear2.",
    "attention.q_proj.": "mixer.q_proj.",  # transformers 5
    "attention.k_proj.": "mixer.k_proj.",
    "attention.v_proj.": "mixer.v_proj.",
    "attention.o_proj.": "mixer.out_proj.",
    "mlp.fc1.": "feed_forward.linear1.",
    "mlp.fc2.": "feed_forward.linear2.",
    "mlp.gate_proj.": "feed_forward.gate.",
    "mlp.up_proj.": "feed_forward.linear1.",
    "mlp.down_proj.": "feed_forward.linear2.",
    "mlp.weights_out.": "feed_forward.linear2.",
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "layer_scale1.lambda1": "scale1.scale",
    "layer_scale2.lambda1": "scale2.scale",
    "layers.": "encoder.layers.",
    "layernorm.": "encoder.norm.",
    "cls_classifier.": "head.",
    "distillation_classifier.": "distillation_head.",
    "classifier.": "head.",
}


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, in the names of transformers 4 or 5, in the names of `VisionTransformer`.

    Raises:
        ValueError: two of the names mean the same tensor.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for prefix in ("vit.", "deit.", "dinov2.", "dinov2_with_registers."):
            new = new.removeprefix(prefix)
        if new.startswith("pooler.") or new == "embeddings.mask_token":
            continue
        for theirs, ours in NAMES.items():
            new = new.replace(theirs, ours)
        parts = {new: tensor}
        if new in ("class_token", "distillation_token"):
            parts = {new: tensor.reshape(-1)}  # theirs is (1, 1, E)
        elif new in ("registers", "positions") and tensor.ndim == 3 and len(tensor) == 1:
            parts = {new: tensor[0]}
        elif ".mlp.weights_in." in new:  # the gate and what it multiplies, one on the other
            stem, kind = new.split("mlp.weights_in.")
            names = [f"{stem}feed_forward.{part}.{kind}" for part in ("gate", "linear1")]
            parts = dict(zip(names, tensor.chunk(2)))
        for new, part in parts.items():
            if new in renamed:
                raise ValueError(f"there are two tensors for {new}: one of them is named {name}")
            renamed[new] = part
    return renamed


def _with_biases(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, with biases of 0 for queries, keys and values where the checkpoint has none."""
    if config["qkv_bias"]:
        return dict(state)
    weights = {name: x for name, x in state.items() if name.endswith(tuple(f".{part}_proj.weight" for part in "qkv"))}
    zeros = {
        name.removesuffix("weight") + "bias": torch.zeros_like(x[:, 0]) for name, x in weights.items() if x.ndim == 2
    }
    return zeros | dict(state)
