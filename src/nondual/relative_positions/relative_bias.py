"""T5's relative bias: a learned number for each head and each range of distances, added to the scores.

Source: Raffel et al. 2019 (1910.10683), section 2.1; the ranges ("buckets") as in the authors' code,
mesh_tensorflow/transformer/transformer_layers.py. Symbols: H heads, N queries, M keys.
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nondual.relative_positions.protocol import RelativePositions, distances


class RelativeBias(nn.Module, RelativePositions):
    """A table of H numbers for each of n_buckets ranges of distances: near ones one by one, far ones in wide ranges.

    It starts at 0. One object may serve all layers, as in T5, or each layer may have its own. The op must take a mask:
    `FlashAttention()` alone does not, but `FlashAttention(otherwise=attention)` does.

    Args:
        n_heads: H.
        n_buckets: how many ranges there are; where not causal, half are for keys before the query and half after.
        max_distance: from here on every distance is in the last range.
        causal: the ranges are all for keys before the query; a key after it, if there is one, counts as distance 0.

    Raises:
        ValueError: n_heads below 1, fewer ranges than 2 (4, and an even number, where not causal), or a max_distance
            that the near distances reach already.
    """

    n_heads: int
    n_buckets: int
    max_distance: int
    causal: bool
    table: nn.Embedding

    def __init__(self, n_heads: int, *, n_buckets: int = 32, max_distance: int = 128, causal: bool = False):
        super().__init__()
        least = 2 if causal else 4
        if n_heads < 1:
            raise ValueError(f"n_heads must be 1 or more, got {n_heads}")
        if n_buckets < least or (not causal and n_buckets % 2):
            raise ValueError(f"n_buckets must be {least} or more{'' if causal else ' and even'}, got {n_buckets}")
        near = (n_buckets if causal else n_buckets // 2) // 2
        if max_distance <= near:
            raise ValueError(
                f"max_distance must be above {near}, the distances that have a range of their own, got {max_distance}"
            )
        self.n_heads, self.n_buckets, self.max_distance, self.causal = n_heads, n_buckets, max_distance, causal
        self.table = nn.Embedding(n_buckets, n_heads)
        nn.init.zeros_(self.table.weight)

    def buckets(self, distance: Integer[Tensor, "*shape"]) -> Integer[Tensor, "*shape"]:
        """The range that each distance lies in, 0 to n_buckets - 1.

        Args:
            distance: the key's place less the query's, of any shape.
        """
        # --8<-- [start:buckets]
        if self.causal:
            count, first, far = self.n_buckets, 0, (-distance).clamp(min=0)
        else:
            count = self.n_buckets // 2
            first, far = (distance > 0) * count, distance.abs()
        near = count // 2  # so many have a range of their own; the other ranges widen
        share = torch.log(far.clamp(min=1).float() / near)
        share = share / math.log(self.max_distance / near)
        wide = (near + (share * (count - near)).long()).clamp(max=count - 1)
        return first + torch.where(far < near, far, wide)
        # --8<-- [end:buckets]

    def bias(
        self, n: int, m: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Float[Tensor, "h n m"]:
        """The learned bias (H, N, M), as in `RelativePositions.bias`.

        Args:
            n: number of queries, N.
            m: number of keys, M.
            dtype: of the result.
            device: counts for nothing: the result is where the table is.

        Raises:
            ValueError: n below 0 or above m.
        """
        by_pair = self.table(self.buckets(distances(n, m, self.table.weight.device)))  # (N, M, H)
        return by_pair.permute(2, 0, 1).to(dtype)

    def refuses(self, n_heads: int, d_head: int) -> str | None:
        """Another number of heads."""
        if n_heads == self.n_heads:
            return None
        return f"positions must be a RelativeBias({n_heads}), one column a head, got one for {self.n_heads}"

    def extra_repr(self) -> str:
        """How it was made."""
        return f"{self.n_heads}, max_distance={self.max_distance}, causal={self.causal}"

    if TYPE_CHECKING:  # it is asked for `bias`, and not called

        def __call__(self) -> None: ...
