"""Exercises of the chapter on the Continuous Thought Machine. Write what each function asks for: nox -s exercises"""

from torch import Tensor


def one_tick(alpha: Tensor, beta: Tensor, left: Tensor, right: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The synchronisation of P pairs after one tick more, from two sums alone, without the history.

        S = Σ_τ e^(-r (t - τ)) z_i^τ z_j^τ / √(Σ_τ e^(-r (t - τ))),   τ = 1 … t

    Args:
        alpha: (P,), the sum above the line, over the ticks before.
        beta: (P,), the sum under the root, over the ticks before.
        left: (P,), z_i at this tick.
        right: (P,), z_j at this tick.
        r: (P,), how fast each pair forgets; 0 or more.

    Returns:
        (S, alpha, beta), each (P,): the synchronisation, and both sums over all ticks.
    """
    raise NotImplementedError("let what was summed decay by one tick, then add this one; divide by a root")


def when_to_stop(certainties: Tensor, threshold: float) -> Tensor:
    """How many ticks each input takes: it stops at the first that is sure enough.

    Args:
        certainties: (B, T), of T ticks.
        threshold: the certainty that is enough, reached or passed.

    Returns:
        (B,) int64, from 1 to T; T where no tick is sure enough.
    """
    raise NotImplementedError("argmax of a table of True and False gives the first True; mind the rows without one")
