"""What may stand on the way from a branch of a layer back to the residual path: a scale for each channel, chance.

Sources: layer scale, Touvron et al. 2021 (2103.17239), section 2; stochastic depth, Huang et al. 2016 (1603.09382),
section 3. Symbols: x (B, N, E), a branch's output.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x times a learned number for each channel, which starts small, so that a deep stack starts near the identity.

    Args:
        d_model: width E.
        start: what each number starts at, such as 1e-5.
    """

    scale: nn.Parameter

    def __init__(self, d_model: int, start: float):
        super().__init__()
        self.scale = nn.Parameter(torch.full((d_model,), float(start)))

    def forward(self, x: Float[Tensor, "*shape e"]) -> Float[Tensor, "*shape e"]:
        """(..., E) -> (..., E)."""
        return x * self.scale

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor) -> Tensor: ...


class StochasticDepth(nn.Module):
    """While training: the branch is left out for a sample with probability p, and divided by 1 - p where it is not.

    Each sample of the batch is drawn by itself. In evaluation nothing is changed: the expectation is the same.

    Args:
        p: the probability, at least 0 and below 1.

    Raises:
        ValueError: another p.
    """

    p: float

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {p}")
        self.p = p

    def forward(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *shape"]:
        """(B, ...) -> (B, ...)."""
        if not self.training or self.p == 0:
            return x
        kept = torch.empty(x.shape[:1] + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * kept / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor) -> Tensor: ...


def dropped(x: Float[Tensor, "*shape"], dropout: nn.Module) -> Float[Tensor, "*shape"]:
    """dropout(x), without the call where its p is 0: while a text is written token by token, such calls add up.

    Args:
        x: of any shape.
        dropout: nn.Dropout, `StochasticDepth`, or what stands in their place.
    """
    return x if getattr(dropout, "p", None) == 0 else dropout(x)
