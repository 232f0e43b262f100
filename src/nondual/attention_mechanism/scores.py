"""What a decoder's state and an encoder's state have to say to each other: a score for every pair, then weights.

Sources: additive scores, Bahdanau, Cho and Bengio 2014 (1409.0473), sections 3.1 and A.1.2; multiplicative ones, Luong,
Pham and Manning 2015 (1508.04025), section 3.1, and Vaswani et al. 2017 (1706.03762), section 3.2.1; smoothing and
windowing, Chorowski et al. 2015 (1506.07503), section 2.3; the loss of coverage, See, Liu and Manning 2017
(1704.04368), section 2.3.

Symbols, with the papers' in brackets where they differ: s decoder states (B, N, S) [s_{i-1}, h_t], h encoder states
(B, M, H) [h_j, h̄_s], A the width in which they are compared [n'], scores (B, N, M) [e_ij], weights (B, N, M) [α_ij],
context (B, N, H) [c_i], w_s [W_a], w_h [U_a], v [v_a].
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.attention import masked_softmax
from nondual.ops.checks import check_tensors

Weigh = Callable[[Tensor, Tensor | None], Tensor]  # scores (B, N, M) and a mask to weights (B, N, M)


def additive_scores(
    s: Float[Tensor, "b n s"],
    h: Float[Tensor, "b m h"],
    w_s: Float[Tensor, "a s"],
    w_h: Float[Tensor, "a h"],
    v: Float[Tensor, " a"],
) -> Float[Tensor, "b n m"]:
    """e_ij = vᵀ tanh(W_s s_i + W_h h_j): a small network scores every pair.

    Args:
        s: decoder states (B, N, S).
        h: encoder states (B, M, H).
        w_s: (A, S).
        w_h: (A, H).
        v: (A,).

    Returns:
        Scores (B, N, M).

    Raises:
        TypeError: one of them is not a tensor.

    Source: 1409.0473, section A.1.2.
    """
    check_tensors({"s": s, "h": h, "w_s": w_s, "w_h": w_h, "v": v})
    return compare(s @ w_s.mT, h @ w_h.mT, v)


# --8<-- [start:scores]
def compare(
    asked: Float[Tensor, "b n a"], found: Float[Tensor, "b m a"], v: Float[Tensor, " a"]
) -> Float[Tensor, "b n m"]:
    """vᵀ tanh(asked_i + found_j), where asked is W_s s and found is W_h h."""
    return torch.tanh(asked[:, :, None] + found[:, None]) @ v


# --8<-- [end:scores]


def dot_scores(s: Float[Tensor, "b n d"], h: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """e_ij = s_i · h_j: no network at all, the two must live in one space. Source: 1508.04025, section 3.1 ("dot").

    `dot_scores(s @ w, h)` is the same paper's "general" score; its third, "concat", is `additive_scores` with W_s and
    W_h side by side as one matrix.

    Args:
        s: decoder states (B, N, D).
        h: encoder states (B, M, D).

    Returns:
        Scores (B, N, M).

    Raises:
        TypeError: s or h is not a tensor.
        ValueError: their widths differ.
    """
    check_tensors({"s": s, "h": h})
    if s.shape[-1] != h.shape[-1]:
        raise ValueError(f"s and h must have one width for a dot product, got {s.shape[-1]} and {h.shape[-1]}")
    return s @ h.mT


def scaled_dot_scores(s: Float[Tensor, "b n d"], h: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """e_ij = s_i · h_j / √D, so that the spread of a score does not grow with the width. Source: 1706.03762, 3.2.1.

    Arguments, result and errors as those of `dot_scores`.
    """
    return dot_scores(s, h) / math.sqrt(s.shape[-1])


def attend(
    scores: Float[Tensor, "b n m"],
    h: Float[Tensor, "b m h"],
    mask: Bool[Tensor, "..."] | None = None,
    *,
    weigh: Weigh = masked_softmax,
) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
    """Scores to weights to context: α = softmax(e) over the encoder's positions, c_i = Σ_j α_ij h_j.

    Args:
        scores: (B, N, M), any floating dtype; their softmax is taken in float32 or better, under autocast too.
        h: encoder states (B, M, H), of the dtype of scores, or any that autocast casts.
        mask: bool, broadcastable to (B, N, M), True where attending is allowed; (B, 1, M) for padding.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Returns:
        (context (B, N, H), weights (B, N, M)). A row with nothing to attend gives 0.

    Raises:
        TypeError: scores, h or mask is not a tensor.
        ValueError: a mask that is not boolean or does not fit.

    Source: 1409.0473, equations 5 and 6.
    """
    check_tensors({"scores": scores, "h": h}, {"mask": mask})
    if mask is not None:
        fits = mask.ndim <= 3 and all(a in (1, b) for a, b in zip(mask.shape[::-1], scores.shape[::-1]))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask must be torch.bool and broadcast to (B, N, M) = {tuple(scores.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    weights = weigh(scores, mask)
    return weights @ h, weights


def smooth(scores: Float[Tensor, "... m"], mask: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "... m"]:
    """α_ij = σ(e_ij) / Σ_l σ(e_il): no score counts for more than 1, so that several positions share a row.

    Args:
        scores: (..., M), any floating dtype.
        mask: as in `masked_softmax`.

    Returns:
        Weights (..., M), as `masked_softmax` returns them.

    Source: 1506.07503, section 2.3.
    """
    return masked_softmax(F.logsigmoid(scores), mask)


def around_median(weights: Float[Tensor, "b m"], width: int) -> Bool[Tensor, "b 1 m"]:
    """A mask of the positions at most `width` from the median of the weights of the step before.

    The median is the first position up to which the weights sum to half of their sum. Where they are all 0 it is 0.

    Args:
        weights: (B, M), the row of weights of the step before.
        width: w, 0 or more.

    Returns:
        Bool (B, 1, M), True where attending is allowed.

    Raises:
        TypeError: weights is not a tensor.
        ValueError: a width below 0.

    Source: 1506.07503, section 2.3 ("windowing").
    """
    check_tensors({"weights": weights})
    if width < 0:
        raise ValueError(f"width must be 0 or more, got {width}")
    sums = weights.double().cumsum(-1)
    median = (sums < sums[:, -1:] / 2).sum(-1, keepdim=True)
    return ((torch.arange(weights.shape[-1], device=weights.device) - median).abs() <= width)[:, None]


def coverage_loss(weights: Float[Tensor, "b n m"]) -> Float[Tensor, "b n"]:
    """Σ_j min(α_ij, Σ_{l<i} α_lj): how much step i looks where earlier steps have looked already.

    Args:
        weights: (B, N, M), the weights of all steps.

    Returns:
        (B, N); 0 for the first step, and never above 1.

    Raises:
        TypeError: weights is not a tensor.

    Source: 1704.04368, equation 12.
    """
    check_tensors({"weights": weights})
    before = weights.cumsum(1) - weights
    return torch.minimum(weights, before).sum(-1)
