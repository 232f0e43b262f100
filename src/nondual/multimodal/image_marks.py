"""Where images stand in a text: marks among the token ids, checked once where they enter a model.

    ids      the  *  is  a  cat  *  and  a  dog        * the id that marks an image
    images    0          1                             in the order in which the rows are read

Symbols: ids (B, N), I images in all, each read as S vectors of width D.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.mixers import check_reset
from nondual.ops.checks import check_tensors
from nondual.token_ids import check_ids, has_values


def checked_marks(
    ids: Int[Tensor, "b n"], images: object, mark: int, vocabulary: int, *, own_id: bool = True
) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """The ids in int64, and True where an image stands; refused where the images do not fit.

    Args:
        ids: (B, N), of any integer dtype; B and N of 1 or more.
        images: (I, …), or None where there are none.
        mark: the id that stands for an image.
        vocabulary: how many ids the language model has.
        own_id: whether the language model reads the mark as one of its tokens. Otherwise the mark may be any number,
            and the ids returned are 0 in its place.

    Raises:
        TypeError: ids or images that are not tensors.
        ValueError: ids that are not integers (B, N), none at all, or not in the vocabulary; not as many images as
            marks, where values can be looked at.
    """
    check_tensors({"ids": ids}, {"images": images})
    if ids.ndim == 2 and not ids.numel():
        raise ValueError(f"ids must have 1 row and 1 token in it or more, got {tuple(ids.shape)}")
    if ids.dtype != torch.bool and not ids.is_floating_point():
        ids = ids.long()
    marked = ids == mark
    ids = check_ids("ids", ids if own_id else ids.masked_fill(marked, 0), vocabulary)
    if isinstance(images, Tensor) and not images.ndim:
        raise ValueError("images must be (I, …), the first axis counting the images, got a number")
    given = images.shape[0] if isinstance(images, Tensor) else 0
    if has_values(ids) and int(marked.sum()) != given:
        each = ", ".join(map(str, marked.sum(1)[:8].tolist())) + (", …" if len(ids) > 8 else "")
        raise ValueError(
            f"images must be as many as the marks (id {mark}) in ids, {int(marked.sum())} ({each} in the rows), "
            f"got {given}"
        )
    return ids, marked


def image_vectors(vision: nn.Module, images: Tensor, width: int) -> Float[Tensor, "i s d"]:
    """What the vision tower makes of the images, (I, …) -> (I, S, D), checked.

    Raises:
        TypeError: the tower gives no Tensor.
        ValueError: the tower gives something else than floating point (I, S, width), S of 1 or more.
    """
    x = vision(images)
    if not isinstance(x, Tensor):
        raise TypeError(f"vision must give a Tensor (I, S, {width}), got {type(x).__name__}")
    if x.ndim != 3 or (x.shape[0], x.shape[2]) != (images.shape[0], width) or not x.is_floating_point():
        raise ValueError(
            f"vision must give floating point (I, S, d_vision) = ({images.shape[0]}, S, {width}), "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if x.shape[1] < 1:
        raise ValueError(f"vision must give 1 vector or more for each image, got {tuple(x.shape)}")
    return x


def next_labels(
    ids: Int[Tensor, "b n"],
    marked: Bool[Tensor, "b n"],
    labels: Int[Tensor, "b n"] | None,
    reset: Bool[Tensor, "b n"] | None,
) -> Int[Tensor, "b n"]:
    """What each position has to predict: the label of the position after it, or -100 for nothing.

    Args:
        ids: (B, N) int64.
        marked: True where an image stands.
        labels: (B, N) int64, each the token that stands there if it is to be predicted, else -100; all tokens but the
            marks where left out.
        reset: True where a packed sequence begins: its first token is not predicted.

    Raises:
        TypeError: labels that are not a Tensor.
        ValueError: labels that are not int64 (B, N), a label where an image stands, or fewer than two tokens in a row.
    """
    if ids.shape[1] < 2:
        raise ValueError(f"ids must have 2 tokens or more a row for a loss, got {tuple(ids.shape)}")
    if labels is None:
        labels = ids.masked_fill(marked, -100)
    check_tensors({"labels": labels})
    if labels.dtype != torch.int64 or labels.shape != ids.shape:
        raise ValueError(
            f"labels must be int64 and of ids' shape {tuple(ids.shape)}, got {labels.dtype} {tuple(labels.shape)}"
        )
    if has_values(labels) and bool(((labels != -100) & marked).any()):
        row, place = (int(i) for i in ((labels != -100) & marked).nonzero()[0])
        raise ValueError(
            f"labels must be -100 where an image stands, got {int(labels[row, place])} in row {row}, place {place}: "
            "an image cannot be predicted; end the answer before it"
        )
    if reset is not None:
        check_reset(reset, ids)
        labels = labels.masked_fill(reset, -100)
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
