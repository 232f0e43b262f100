"""An exercise of the chapter on flash attention. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def join(o1: Tensor, l1: Tensor, o2: Tensor, l2: Tensor) -> Tensor:
    """What attention over all keys gives, from what it gives over two parts of them.

    Args:
        o1: the output over the first part of the keys, (B, H, N, D).
        l1: for each query, the log-sum-exp of its scores for that part, (B, H, N).
        o2: the output over the second part.
        l2: its log-sum-exp.

    Returns:
        The output over both parts, (B, H, N, D).
    """
    raise NotImplementedError("weigh the two outputs by each part's share of the whole sum, and add them")
