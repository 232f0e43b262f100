"""Two exercises of the chapter on Mamba. Write what the functions ask for, then: nox -s exercises"""

from torch import Tensor


def steps(marked: Tensor) -> Tensor:
    """The lengths of the steps with which a state ends as the one marked input, whatever comes before and after it.

    The state has A = -1 and B = 1, and each step is exact: h becomes exp(-step) h + (1 - exp(-step)) x.

    Args:
        marked: (1, L, 1), 1 at one position and 0 elsewhere.

    Returns:
        The steps, (1, L, 1), each 0 or more.
    """
    raise NotImplementedError("return a step for each position: one for the marked input, another for all others")


def in_pieces(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """What `selective_scan(u, delta, A, B, C)` returns, by reading the sequence piece after piece.

    Args:
        u: the inputs, (1, L, D).
        delta: the lengths of the steps, (1, L, D).
        A: (D, N).
        B: (1, L, N).
        C: (1, L, N).
        lengths: how long the pieces are; they sum to L.

    Returns:
        y (1, L, D), and the state after the last step (1, D, N).
    """
    raise NotImplementedError("call selective_scan for each piece; its argument `state` is where the piece starts from")
