"""The exercise of the chapter on head fusion. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def fused(o: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, gate: float) -> Tensor:
    """One update of the heads at one position, in which each takes from the others.

    O + tanh(gate) tanh(P O W_C). Row h of P is the softmax, over the other heads l, of (O W_A)_h · (O W_B)_l / √D.

    Args:
        o: (H, D), what the heads put out; H is 2 or more.
        w_a: (D, D).
        w_b: (D, D).
        w_c: (D, D).
        gate: g.

    Returns:
        (H, D).
    """
    raise NotImplementedError("H x H scores, none for a head with itself, and a softmax of each row")
