"""How often the right one is among the k that score highest, in both directions, with ties counted as what they are.

Where the right one has the same score as others, its place among them is a matter of chance: what is counted then is
the probability that it is among the first k when ties are broken at random. So a model that gives one score to all has
the recall of chance, k / M, and not 1 or 0.

Source: recall at k for images and captions, Hodosh, Young and Hockenmaier 2013 (JAIR 47). Symbols: Q queries, M items,
I images, T texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.checks import check_tensors


class Recall(NamedTuple):
    """The share of queries whose right item is among the first k, for each k.

    Attributes:
        image_to_text: an image is given and its text looked for; k -> share.
        text_to_image: a text is given and its image looked for; k -> share.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def recall(
    scores: Float[Tensor, "i t"], *, k: Sequence[int] = (1, 5, 10), relevant: Bool[Tensor, "i t"] | None = None
) -> Recall:
    """Recall at k, from images to texts and from texts to images.

    Args:
        scores: (I, T), higher for what belongs together: `CLIP.logits`.
        k: how many of the best count, each 1 or more.
        relevant: as in `found`, True where an image and a text belong together; with as many images as texts, the
            diagonal where left out.

    Raises:
        TypeError, ValueError: as `found`, for either direction.
    """
    other = None if not isinstance(relevant, Tensor) or relevant.ndim != 2 else relevant.T
    return Recall(
        {n: float(found(scores, n, relevant=relevant).mean()) for n in k},
        {n: float(found(scores.T, n, relevant=relevant if other is None else other).mean()) for n in k},
    )


def found(scores: Float[Tensor, "q m"], k: int, *, relevant: Bool[Tensor, "q m"] | None = None) -> Float[Tensor, " q"]:
    """For each query, the probability that a right item is among its k best, ties broken at random.

    Without ties it is 0 or 1. Where r right and n wrong items share the score of the best right one, and w wrong ones
    are above it, k - w of the n + r are drawn, and all are wrong with probability C(n, k - w) / C(n + r, k - w).

    Args:
        scores: (Q, M), a row for each query; any floating dtype.
        k: 1 or more; past M it is M.
        relevant: bool (Q, M), True where an item is right for a query: at least one for each. With as many queries as
            items, the diagonal where left out.

    Returns:
        (Q,) in float64. Its mean is the recall at k; a bootstrap may resample its rows.

    Raises:
        TypeError: scores or relevant is not a tensor.
        ValueError: scores that are not floating point (Q, M) with a query and an item, or have NaN; relevant of another
            shape or dtype, or without a right item in some row; scores that are not square without relevant; a k
            below 1.
    """
    check_tensors({"scores": scores}, {"relevant": relevant})
    if scores.ndim != 2 or not scores.is_floating_point() or not scores.numel():
        raise ValueError(
            f"scores must be floating point (Q, M), both 1 or more, got {scores.dtype} {tuple(scores.shape)}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of 1 or more, got {k!r}")
    if relevant is None:
        if scores.shape[0] != scores.shape[1]:
            raise ValueError(f"relevant must be given where scores are not square, got {tuple(scores.shape)}")
        relevant = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if relevant.shape != scores.shape or relevant.dtype != torch.bool:
        raise ValueError(
            f"relevant must be boolean {tuple(scores.shape)}, as scores, got {relevant.dtype} {tuple(relevant.shape)}"
        )
    if scores.isnan().any():
        raise ValueError("scores must not have NaN, which has no place in an order")
    if not relevant.any(1).all():
        row = int((~relevant.any(1)).nonzero()[0])
        raise ValueError(f"relevant must have a right item in each row, got none in row {row}")
    # --8<-- [start:found]
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # that of the best right item
    above = (scores > best).sum(1)  # all of them wrong
    right = ((scores == best) & relevant).sum(1)
    tied = (scores == best).sum(1)  # right and wrong
    places = (min(k, scores.shape[1]) - above).clamp(min=0).minimum(tied)  # how many of the tied are drawn
    i = torch.arange(int(places.max()), device=scores.device)
    # after i wrong ones the next is wrong with this probability
    wrong = ((tied - right)[:, None] - i).clamp(min=0).double() / (tied[:, None] - i).clamp(min=1)
    return 1 - wrong.masked_fill(i >= places[:, None], 1).prod(1)
    # --8<-- [end:found]
