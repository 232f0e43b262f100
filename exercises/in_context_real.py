"""An exercise of the chapter on examples in the prompt. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def put(x: Tensor, at: Tensor, vectors: Tensor) -> Tensor:
    """Other vectors in place of those at one position of each row, as a task vector is put into a bare question.

    Args:
        x: (B, N, E), what a layer is about to read; it stays as it is.
        at: (B,) int64, a position for each row.
        vectors: (B, E), one for each row.

    Returns:
        (B, N, E): row i has vectors[i] at position at[i], and everything else is as in x.
    """
    raise NotImplementedError("copy x, and write vectors at [row, at], where row counts the rows")
