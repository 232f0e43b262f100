"""The loss of a model that scores the next token: cross-entropy by token, with label smoothing.

Sources: label smoothing, Szegedy et al. 2015 (1512.00567), section 7; in the transformer, Vaswani et al. 2017
(1706.03762), section 5.4. Symbols: scores (B, N, V), targets (B, N), V tokens in the vocabulary, ε the smoothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32


def token_loss(
    scores: Float[Tensor, "b n v"],
    targets: Int[Tensor, "b n"],
    *,
    real: Bool[Tensor, "b n"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """The mean cross-entropy, in nats, of the real tokens; 0, with gradients of 0, where there are none.

        - (1 - ε) log p(target) - ε/V Σ_v log p(v)

    With smoothing the model is asked for probability 1 - ε + ε/V of the target and ε/V of every other token. The loss
    is then above 0 even where it gives just that: `least_loss` says by how much.

    Args:
        scores: (B, N, V), of any floating dtype, before the softmax; their softmax is taken in float32 or better.
        targets: (B, N), of any integer dtype.
        real: (B, N), False where a target is padding; every target counts where left out.
        label_smoothing: ε, in [0, 1); 0.1 in the paper.

    Returns:
        A number, in float32 or better.

    Raises:
        TypeError: scores, targets or real is not a tensor.
        ValueError: shapes or dtypes that do not fit, or a smoothing outside [0, 1).
    """
    check_tensors({"scores": scores, "targets": targets}, {"real": real})
    check_smoothing(label_smoothing)
    if scores.ndim != 3 or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point (B, N, V), got {scores.dtype} {tuple(scores.shape)}")
    shape = tuple(scores.shape[:2])
    if tuple(targets.shape) != shape or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers (B, N) = {shape}, got {targets.dtype} {tuple(targets.shape)}")
    if real is not None and (tuple(real.shape) != shape or real.dtype != torch.bool):
        raise ValueError(
            f"real must be boolean (B, N) = {shape}, False on padding, got {real.dtype} {tuple(real.shape)}"
        )
    targets = targets.long()
    if real is not None:
        targets = targets.masked_fill(~real, -100)  # what cross_entropy leaves out
    total = F.cross_entropy(
        at_least_float32(scores).flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=label_smoothing
    )
    return total / (targets != -100).sum().clamp(min=1)


def least_loss(vocabulary: int, label_smoothing: float) -> float:
    """The lowest loss of a token under label smoothing, in nats: the entropy of what the model is asked for.

    Args:
        vocabulary: V.
        label_smoothing: ε, in [0, 1).

    Raises:
        ValueError: a vocabulary below 1 or a smoothing outside [0, 1).
    """
    check_smoothing(label_smoothing)
    if vocabulary < 1:
        raise ValueError(f"vocabulary must be 1 or more, got {vocabulary}")
    asked = torch.full((vocabulary,), label_smoothing / vocabulary, dtype=torch.float64)
    asked[0] += 1 - label_smoothing
    return float(torch.special.entr(asked).sum())


def check_smoothing(label_smoothing: float) -> None:
    """Refuse a label smoothing outside [0, 1).

    Raises:
        ValueError: what was expected, what was got.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
