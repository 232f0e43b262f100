"""CLIP and SigLIP checkpoints in our own classes: from a folder, or copied from a model of transformers.

A folder is laid out as `save_pretrained` writes it, and as openai/clip-vit-base-patch32 and
google/siglip-base-patch16-224 are on the Hugging Face Hub: config.json beside safetensors.

    model = load_clip("clip-vit-base-patch32")
    model.encode_images(pixels)      # (B, 3, 224, 224), normalised as preprocessor_config.json of the folder says
    model.encode_texts(ids)          # of the folder's tokenizer; SigLIP's are padded to the longest length it has

Sources: Radford et al. 2021 (2103.00020); Zhai et al. 2023 (2303.15343).
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from nondual.multimodal.clip import CLIP, SigLIP
from nondual.multimodal.towers import AttentionPool, FirstOf, TextTower, VisionTower, at_highest_id, at_last
from nondual.pretrained.checkpoint import check_dtype, check_layers, existing_folder, filled, read_json, renamed_tensors
from nondual.pretrained.clip_config import ACTIVATIONS, OLD_EOS, Kind, read_settings

if TYPE_CHECKING:
    from transformers import CLIPModel, SiglipModel

Model = TypeVar("Model", bound=CLIP)


def load_clip(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> CLIP:
    """The CLIP whose checkpoint lies in a folder, on the CPU, in evaluation mode.

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
    return _load(folder, "load_clip", "clip", _clip, dtype)


def load_siglip(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> SigLIP:
    """The SigLIP whose checkpoint lies in a folder, on the CPU, in evaluation mode.

    The SigLIP 2 models of one fixed size are of this kind too; those of any size ("naflex") are not.

    Args:
        folder: as in `load_clip`.
        dtype: as in `load_clip`.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `load_clip`.
    """
    return _load(folder, "load_siglip", "siglip", _siglip, dtype)


def from_clip(model: "CLIPModel") -> CLIP:
    """A copy of a CLIPModel of transformers, in its dtype, on its device, in evaluation mode.

        ours = from_clip(theirs)
        ours(pixels, ids)                        # theirs(input_ids=ids, pixel_values=pixels).logits_per_image
        ours.loss(pixels, ids)                   # theirs(…, return_loss=True).loss

    Raises:
        TypeError: another model.
        ValueError: a setting that this library does not have.
    """
    return _copy(model, "CLIPModel", "clip", _clip)


def from_siglip(model: "SiglipModel") -> SigLIP:
    """A copy of a SiglipModel of transformers, in its dtype, on its device, in evaluation mode.

    Raises:
        TypeError: another model.
        ValueError: a setting that this library does not have.
    """
    return _copy(model, "SiglipModel", "siglip", _siglip)


# --- the models that the settings describe ---------------------------------------------------------------------------


def _clip(config: dict[str, Any]) -> CLIP:
    text, vision = config["text"], config["vision"]
    eos = text["eos_token_id"]
    return CLIP(
        VisionTower(vision["image_size"], vision["patch_size"], *_sizes(vision), **_options(vision)),
        TextTower(
            text["vocab_size"],
            text["max_position_embeddings"],
            *_sizes(text),
            place=at_highest_id if eos == OLD_EOS else FirstOf(eos),
            **_common(text),
        ),
        config["projection_dim"],
        d_image=vision["hidden_size"],
        d_text=text["hidden_size"],
    )


def _siglip(config: dict[str, Any]) -> SigLIP:
    text, vision = config["text"], config["vision"]
    pool = AttentionPool(*_sizes(vision)[:3], **_common(vision))
    return SigLIP(
        VisionTower(
            vision["image_size"],
            vision["patch_size"],
            *_sizes(vision),
            class_token=False,
            norm_before=False,
            patch_bias=True,
            pool=pool,
            **_options(vision),
        ),
        TextTower(
            text["vocab_size"],
            text["max_position_embeddings"],
            *_sizes(text),
            place=at_last,
            causal=False,
            head=nn.Linear(text["hidden_size"], text["projection_size"]),
            **_common(text),
        ),
        None,
        d_image=vision["hidden_size"],
        d_text=text["projection_size"],
    )


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int]:
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
    d_model, n_heads, d_ff, n_layers = (config[name] for name in names)
    return d_model, n_heads, d_ff, n_layers


def _common(config: dict[str, Any]) -> dict[str, Any]:
    return {"activation": ACTIVATIONS[config["hidden_act"]], "eps": config["layer_norm_eps"]}


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {"n_channels": config["num_channels"]}


# --- tensors ---------------------------------------------------------------------------------------------------------


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, in the names of transformers 4 or 5, in the names of `CLIP` and `SigLIP`.

    Raises:
        ValueError: two of the names mean the same tensor.
    """
    ours = {
        "text_model.text_model.": "text_model.",  # some versions nest the towers once more
        "vision_model.vision_model.": "vision_model.",
        "text_model.embeddings.token_embedding.": "text_tower.token.",
        "text_model.embeddings.position_embedding.": "text_tower.position.table.",
        "text_model.encoder.": "text_tower.encoder.",
        "text_model.final_layer_norm.": "text_tower.encoder.norm.",
        "text_model.head.": "text_tower.head.",
        "vision_model.embeddings.class_embedding": "image_tower.class_token",
        "vision_model.embeddings.patch_embedding.": "image_tower.patches.",
        "vision_model.embeddings.position_embedding.weight": "image_tower.position",
        "vision_model.pre_layrnorm.": "image_tower.norm_before.",  # so it is written there
        "vision_model.encoder.": "image_tower.encoder.",
        "vision_model.post_layernorm.": "image_tower.encoder.norm.",
        "vision_model.head.probe": "image_tower.pool.query",
        "vision_model.head.attention.": "image_tower.pool.mixer.",
        "vision_model.head.layernorm.": "image_tower.pool.norm.",
        "vision_model.head.": "image_tower.pool.",
        "visual_projection.": "image_projection.",
        "logit_scale": "log_scale",
        "logit_bias": "bias",
        ".self_attn.": ".mixer.",
        ".layer_norm1.": ".norm1.",
        ".layer_norm2.": ".norm2.",
        ".mlp.fc1.": ".feed_forward.linear1.",
        ".mlp.fc2.": ".feed_forward.linear2.",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):  # 0, 1, 2, …: older versions stored them
            continue
        new = name
        for theirs, our in ours.items():
            new = new.replace(theirs, our)
        parts = {new: tensor.reshape(()) if new in ("log_scale", "bias") and tensor.numel() == 1 else tensor}
        stem, stacked, kind = new.partition("pool.mixer.in_proj_")
        if stacked:  # torch's own attention stacks the three projections
            names = [f"{stem}pool.mixer.{letter}_proj.{kind}" for letter in "qkv"]
            parts = dict(zip(names, tensor.chunk(3)))
        for new, part in parts.items():
            if new in renamed:
                raise ValueError(f"there are two tensors for {new}: one of them is named {name}")
            renamed[new] = part
    return renamed


def _load(
    folder: str | os.PathLike[str],
    function: str,
    kind: Kind,
    make: Callable[[dict[str, Any]], Model],
    dtype: torch.dtype | None,
) -> Model:
    place = existing_folder(folder, function)
    check_dtype(dtype)
    file = place / "config.json"
    config = read_settings(read_json(file), kind, str(file))
    state = renamed_tensors(place, from_hugging_face)
    check_layers((config["text"]["num_hidden_layers"], config["vision"]["num_hidden_layers"]), state, place)
    return filled(lambda: make(config), state, place, dtype)


def _copy(model: Any, name: str, kind: Kind, make: Callable[[dict[str, Any]], Model]) -> Model:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != kind or not hasattr(model, "logit_scale"):
        raise TypeError(f"model must be a {name} of transformers, got {type(model).__name__}")
    ours = make(read_settings(config.to_dict(), kind, f"the model's {type(config).__name__}"))
    like = model.logit_scale
    ours.to(like.device, like.dtype).load_state_dict(from_hugging_face(model.state_dict()))
    return ours.eval()
