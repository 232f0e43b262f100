"""An exercise of the chapter on linear attention. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def overwrite(state: Tensor, key: Tensor, value: Tensor, beta: float) -> Tensor:
    """The state after one write by the delta rule.

    A key reads `key @ state`. After the write, this key reads a mixture: `beta` of the new value, and 1 - beta of what
    it read before. What keys at right angles to it read does not change.

    Args:
        state: (D, Dv).
        key: (D,), of any length but 0.
        value: (Dv,).
        beta: how much is written, from 0 (nothing) to 1 (all of it).

    Returns:
        The new state (D, Dv).
    """
    raise NotImplementedError("add an outer product of the key and of how far what it reads is from the new value")
