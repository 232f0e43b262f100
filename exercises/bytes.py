"""Exercises of the chapter on bytes. Write what each function asks for, then: nox -s exercises"""

from torch import Tensor


def spread(z: Tensor, p: Tensor, cut: Tensor) -> Tensor:
    """What each position of one sequence reads of the pieces that it was cut into.

    First the pieces are smoothed, in order. P is p at the cuts, one for each piece, and the first is 1:

        s_1 = z_1        s_j = P_j z_j + (1 - P_j) s_{j-1}

    Then each position takes the s of the piece that it lies in: that of the last cut up to it.

    Args:
        z: (M, E), what the main network says of each piece.
        p: (N,), the probability of a cut at each position.
        cut: (N,) bool, True where a piece begins; M of them are, the first position among them.

    Returns:
        (N, E).
    """
    raise NotImplementedError("p[cut] are the pieces' probabilities; cut.cumsum(0) counts the pieces begun so far")
