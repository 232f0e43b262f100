"""Exercises of the chapter on connections over depth. Write what each function asks for, then: nox -s exercises"""

from collections.abc import Sequence

from torch import Tensor


def without(i: int, j: int) -> Tensor:
    """The weights of a DenseFormer's average after layer i that leave out what layer j added to the stream.

    All averages before are as they start, so that layer j gives X_j = X_(j - 1) + what it added, for each j.

    Args:
        i: the layer that the average follows, from 1.
        j: the layer to leave out, from 1 to i.

    Returns:
        (i + 1,), float32: the weights of X_0 to X_i.
    """
    raise NotImplementedError("what layer j added is X_j - X_(j - 1): take it out of X_i")


def average(query: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Attention over depth: the mean of the vectors, weighed at each position by a softmax over them.

    The key of a vector is the vector divided by the root of its mean square; its score is query · key.

    Args:
        query: (E,), the same at all positions.
        vectors: what L layers gave, (B, N, E) each, none of them 0.

    Returns:
        (B, N, E).
    """
    raise NotImplementedError("stack the vectors, score their keys, take the softmax over layers, and sum the vectors")
