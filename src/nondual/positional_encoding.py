"""Where a token stands: a vector for each position, added to the token's own.

The learned table of BERT, GPT-2 and ViT. Source: Gehring et al. 2017 (1705.03122), section 3.1; Devlin et al. 2018
(1810.04805), section 3. Symbols: N positions, E model width.
"""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn


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

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, n: int, *, start: int = 0) -> Tensor: ...
