"""Where a token stands: a vector for each position, added to the token's own.

The learned table of BERT, GPT-2 and ViT. Source: Gehring et al. 2017 (1705.03122), section 3.1; Devlin et al. 2018
(1810.04805), section 3. Symbols: N positions, E model width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from nondual.mixers import check_reset, sequence_starts
from nondual.token_ids import has_values


@dataclass(eq=False)
class PositionCache:
    """Where a text stands that is read in parts.

    Attributes:
        length: how many positions were read.
        start: (B,), the position at which each row's present sequence began; None while all began at 0.
    """

    length: int = 0
    start: Integer[Tensor, " b"] | None = None


class LearnedPositions(nn.Module):
    """One learned vector for each of `max_len` positions.

    Args:
        max_len: how many positions there are.
        d_model: width E.
    """

    table: nn.Embedding

    def __init__(self, max_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_len, d_model)

    def forward(self, n: int, *, start: int = 0) -> Float[Tensor, "n e"]:
        """The vectors of positions start to start + n - 1, shape (N, E).

        Args:
            n: how many positions, N.
            start: the first of them.

        Returns:
            (N, E), a view of the table.

        Raises:
            ValueError: a position at or past max_len, or a negative one.
        """
        if start < 0 or n < 0 or start + n > self.table.num_embeddings:
            raise ValueError(
                f"positions must lie in 0 to {self.table.num_embeddings - 1}, "
                f"got {n} from {start}: shorten the input or make the table longer"
            )
        return self.table.weight[start : start + n]

    def of_sequences(
        self,
        ids: Integer[Tensor, "b n"],
        *,
        cache: PositionCache | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "n e"] | Float[Tensor, "b n e"]:
        """The vector of each token's position in its own sequence, to be added to the tokens' embeddings.

        Args:
            ids: (B, N), of which the shape counts and the device.
            cache: what was read before ids; it is brought up to date.
            reset: True where a packed sequence begins: its positions count from 0.

        Returns:
            (N, E) where all rows stand alike, else (B, N, E).

        Raises:
            TypeError: cache is not a PositionCache, or reset not a Tensor.
            ValueError: a reset that does not fit, or a position at or past max_len.
        """
        if cache is not None and not isinstance(cache, PositionCache):
            raise TypeError(f"cache must begin with a PositionCache, from new_cache, got {type(cache).__name__}")
        if reset is not None:
            check_reset(reset, ids)
        n = ids.shape[1]
        length, start = (0, None) if cache is None else (cache.length, cache.start)
        starts = sequence_starts(reset, n, length=length, start=start)
        if starts is None:
            vectors = self(n, start=length)
        else:
            index, longest = torch.arange(length, length + n, device=starts.device) - starts, self.table.num_embeddings
            if has_values(index) and index.numel() and int(index.max()) >= longest:
                raise ValueError(
                    f"positions must lie in 0 to {longest - 1}, got {int(index.max())}: "
                    "shorten the input or make the table longer"
                )
            vectors = self.table(index)
        if cache is not None:
            cache.length, cache.start = length + n, cache.start if starts is None or not n else starts[:, -1]
        return vectors

    def new_cache(self) -> PositionCache:
        """Of a text of which nothing was read."""
        return PositionCache()

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, n: int, *, start: int = 0) -> Tensor: ...
