"""LLaVA checkpoints in our own classes: from a folder, or copied from a model of transformers.

    model = load_llava("llava-1.5-7b-hf")            # a folder as `save_pretrained` writes it
    model.generate(ids, 20, images)                  # one mark an image in ids, images (I, 3, 336, 336)

In transformers' own ids each image has as many marks as vectors; here it has one. `one_mark_each` makes ours of theirs.

Source: Liu et al. 2023b (2310.03744): CLIP's image tower, its last layer but one; two layers as projector; a Llama.
"""

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nondual.multimodal.llava import Llava, PatchFeatures, Projector
from nondual.multimodal.towers import VisionTower
from nondual.pretrained.causal_lm import from_llama
from nondual.pretrained.checkpoint import existing_folder, read_json
from nondual.pretrained.clip import from_hugging_face
from nondual.pretrained.clip_config import ACTIVATIONS, read_settings

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


def load_llava(folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Llava:
    """The LLaVA whose checkpoint lies in a folder, on the CPU, in evaluation mode, its towers frozen.

    transformers reads the folder, and the weights are then copied: for a moment there are two of them in memory.

    Args:
        folder: holds config.json and safetensors. It is a folder on this machine: a model on the Hugging Face Hub, such
            as llava-hf/llava-1.5-7b-hf, is downloaded into one first, by `hf download NAME --local-dir FOLDER`.
        dtype: of the weights; as they are stored where left out.

    Raises:
        FileNotFoundError: the folder is missing, or there are no safetensors in it.
        ValueError: another kind of model, or a setting that this library does not have.
        TypeError: folder is no path, or dtype no torch.dtype.
        ImportError: transformers is not installed.
    """
    place = existing_folder(folder, "load_llava")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    file = place / "config.json"
    kind = read_json(file).get("model_type")
    if kind != "llava":
        raise ValueError(f"model_type must be 'llava' in {file}, got {kind!r:.100}")
    if not any(place.glob("*.safetensors")):
        raise FileNotFoundError(f"there are no safetensors in {place}: other formats can run code, and are not read")
    try:
        from transformers import LlavaForConditionalGeneration
    except ImportError:
        raise ImportError("transformers 5 or later is needed: pip install 'nondual[transformers]'") from None
    theirs = LlavaForConditionalGeneration.from_pretrained(
        place, local_files_only=True, use_safetensors=True, dtype="auto" if dtype is None else dtype
    )
    return from_llava(theirs)


def from_llava(model: "LlavaForConditionalGeneration") -> Llava:
    """A copy of a LlavaForConditionalGeneration of transformers, in its dtype, on its device, in evaluation mode.

        ours = from_llava(theirs)
        ids = one_mark_each(their_ids, ours.mark, n_vectors)
        ours(ids, pixels)                                # theirs(their_ids, pixels).logits, one row an image
        ours.generate(ids, 20, pixels)                   # as theirs.generate(…, do_sample=False)

    Args:
        model: CLIP's image tower, a Llama, and a projector of two layers.

    Raises:
        TypeError: another model.
        ValueError: towers of other kinds, or a setting that this library does not have.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llava" or not hasattr(model, "lm_head"):
        raise TypeError(f"model must be a LlavaForConditionalGeneration of transformers, got {type(model).__name__}")
    for part, kind in (("vision_config", "clip_vision_model"), ("text_config", "llama")):
        given = getattr(config, part).model_type
        if given != kind:
            raise ValueError(f"{part} must be of a {kind}, got {given!r:.100}")
    if config.projector_hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"projector_hidden_act must be one of {', '.join(ACTIVATIONS)}, got {config.projector_hidden_act!r:.100}"
        )
    theirs: Any = model
    language_model = from_llama(_as_llama(theirs, config.text_config))
    vision = PatchFeatures(
        _tower(theirs.model.vision_tower, config.vision_config),
        config.vision_feature_layer,
        select=config.vision_feature_select_strategy,
    )
    d_vision = config.vision_config.hidden_size * len(vision.layers)
    projector = Projector(
        d_vision,
        config.text_config.hidden_size,
        bias=config.multimodal_projector_bias,
        activation=ACTIVATIONS[config.projector_hidden_act],
    )
    like = theirs.lm_head.weight
    state = theirs.model.multi_modal_projector.state_dict()
    projector.load_state_dict({name.replace("linear_", "linear"): tensor for name, tensor in state.items()})
    ours = Llava(vision, language_model, projector, mark=config.image_token_id, d_vision=d_vision)
    return ours.to(like.device, like.dtype).eval()


def one_mark_each(ids: Tensor, mark: int, n_vectors: int) -> Tensor:
    """Ids with S marks in a row for each image, as transformers' processor writes them, to ids with one.

    Args:
        ids: (B, N), of any integer dtype, with as many marks in every row.
        mark: the id that stands for an image.
        n_vectors: S.

    Raises:
        ValueError: rows that have different numbers of marks, or a number that is not a multiple of S.
    """
    if ids.ndim != 2 or n_vectors < 1:
        raise ValueError(f"ids must be (B, N) and n_vectors 1 or more, got {tuple(ids.shape)} and {n_vectors}")
    marked = ids == mark
    counts = marked.sum(1)
    if counts.numel() and (bool((counts != counts[0]).any()) or int(counts[0]) % n_vectors):
        raise ValueError(
            f"ids must have as many marks (id {mark}) in each row, a multiple of {n_vectors}, got {counts.tolist()}"
        )
    kept = ~marked | (marked.cumsum(1) % n_vectors == 0)
    return ids[kept].view(len(ids), -1)


def _as_llama(model: Any, config: Any) -> Any:
    """The language model within a LLaVA as transformers' own class, its tensors shared and not copied."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    state = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    llama.load_state_dict(state | {"lm_head.weight": model.lm_head.weight}, assign=True)
    return llama


def _tower(vision: Any, config: Any) -> VisionTower:
    """CLIP's image tower with the weights of transformers' own."""
    settings = read_settings({"model_type": "clip", "vision_config": config.to_dict()}, "clip", "the vision_config")
    given = settings["vision"]
    tower = VisionTower(
        given["image_size"],
        given["patch_size"],
        given["hidden_size"],
        given["num_attention_heads"],
        given["intermediate_size"],
        given["num_hidden_layers"],
        n_channels=given["num_channels"],
        activation=ACTIVATIONS[given["hidden_act"]],
        eps=given["layer_norm_eps"],
    )
    state = {f"vision_model.{name.removeprefix('vision_model.')}": x for name, x in vision.state_dict().items()}
    tower.load_state_dict({name.removeprefix("image_tower."): x for name, x in from_hugging_face(state).items()})
    return tower
