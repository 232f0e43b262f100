"""What attention asks of positions that act inside it: turn queries and keys, add a bias to the scores.

    q, k = positions.turn(q, start), positions.turn(k, start)       # before k goes into the cache
    scores = q kᵀ / √D + positions.bias(n, m)

Both depend on the difference of two places alone. So several sequences packed along one row need nothing more: that a
sequence begins at place 5 and not at 0 moves all its places alike, and changes none of their differences.

Symbols: B batch, H heads, N queries, M keys, D head width. The queries are the last N of the M places.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class RelativePositions:
    """Positions that act inside attention. A subclass overrides `turn` or `bias`; each does nothing where it does not.

    A subclass without parameters may be a frozen dataclass, one with parameters is an nn.Module too.
    """

    def turn(self, x: Float[Tensor, "b h n d"], start: int = 0) -> Float[Tensor, "b h n d"]:
        """Queries or keys (B, H, N, D) at the places start to start + N - 1, turned; x itself where nothing is.

        Args:
            x: queries or keys, of any number of heads.
            start: the place of the first of them: how many a cache holds already.

        Raises:
            ValueError: a negative start, or an x that does not fit.
        """
        return x

    def bias(
        self, n: int, m: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Float[Tensor, "h n m"] | None:
        """What is added to the scores (H, N, M) of the last n of m places; None where nothing is.

        Args:
            n: number of queries, N.
            m: number of keys, M, of which the queries are the last N.
            dtype: of the result.
            device: where the result is made. Positions with parameters give it where these are.

        Raises:
            ValueError: n below 0 or above m.
        """
        return None

    def refuses(self, n_heads: int, d_head: int) -> str | None:
        """Why these positions cannot serve attention of n_heads query heads of width d_head; None where they can."""
        return None


def of_layer(positions: object, i: int) -> Any:
    """The positions of layer i: those that all layers share, or what a function of i gives for it.

    Args:
        positions: `RelativePositions`, a function of the layer's index that gives them, or None.
        i: the layer's index.
    """
    if isinstance(positions, RelativePositions) or not callable(positions):  # some of them are modules, so callable
        return positions
    return positions(i)


def check_start(start: int) -> None:
    """Refuse a negative place."""
    if start < 0:
        raise ValueError(f"start must be 0 or more, got {start}: places are counted from the first token")


def distances(n: int, m: int, device: torch.device | str | None = None) -> Tensor:
    """How far each key lies after each query (N, M), negative for a key before it; the queries are the last N of M.

        distances(2, 3)    -1  0  1
                           -2 -1  0

    Raises:
        ValueError: n below 0 or above m.
    """
    if not 0 <= n <= m:
        raise ValueError(f"n must lie in 0 to m={m}, since the queries are the last n of m places, got {n}")
    return torch.arange(m, device=device) - torch.arange(m - n, m, device=device)[:, None]
