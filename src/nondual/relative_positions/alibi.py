"""ALiBi: a score loses a fixed amount for each step between query and key, a different amount in each head.

Source: Press et al. 2021 (2108.12409), section 3; the slopes of head counts that are no powers of two: the authors'
code, https://github.com/ofirpress/attention_with_linear_biases. Symbols: H heads, N queries, M keys.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.relative_positions.protocol import RelativePositions, distances


@dataclass(frozen=True)
class ALiBi(RelativePositions):
    """The bias -slope_h · |i - j|, without parameters: `MultiHeadAttention(64, 8, positions=ALiBi(8), causal=True)`.

    The paper is about causal attention. Where a query also sees later keys, they lose by their distance likewise, and
    the bias does not tell before from after. The op must take a mask: `FlashAttention()` alone does not, but
    `FlashAttention(otherwise=attention)` does.

    Attributes:
        n_heads: H.

    Raises:
        ValueError: n_heads below 1.
    """

    n_heads: int

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise ValueError(f"n_heads must be 1 or more, got {self.n_heads}")

    @property
    def slopes(self) -> tuple[float, ...]:
        """One for each head: 2^(-8 h / H) for h = 1 to H, where H is a power of two.

        Otherwise those of the next lower power P, then every second one of 2 P, from its first, for the heads left.
        """
        # --8<-- [start:slopes]
        power = 2 ** (self.n_heads.bit_length() - 1)
        slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
        between = [2 ** (-4 * h / power) for h in range(1, 2 * power, 2)]
        # --8<-- [end:slopes]
        return tuple((slopes + between)[: self.n_heads])

    def bias(
        self, n: int, m: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Float[Tensor, "h n m"]:
        """-slope · |i - j|, shape (H, N, M), as in `RelativePositions.bias`.

        Args:
            n: number of queries, N.
            m: number of keys, M.
            dtype: of the result.
            device: where the result is made.

        Raises:
            ValueError: n below 0 or above m.
        """
        slopes = torch.tensor(self.slopes, dtype=dtype, device=device)
        return -slopes[:, None, None] * distances(n, m, device).abs()

    def refuses(self, n_heads: int, d_head: int) -> str | None:
        """Another number of heads."""
        return None if n_heads == self.n_heads else f"positions must be ALiBi({n_heads}), one slope a head, got {self}"
