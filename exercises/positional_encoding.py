"""An exercise of the chapter on positions. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def onward(code: Tensor, k: int) -> Tensor:
    """The sinusoidal code of the position k steps on, from the code of a position that you are not told.

    Numbers 2i and 2i + 1 of a code are sin(p / 10000^(2i/E)) and cos(p / 10000^(2i/E)).

    Args:
        code: of some position p, (E,), E even.
        k: how many steps on; below 0 for steps back.

    Returns:
        The code of position p + k, (E,).
    """
    raise NotImplementedError("turn each pair of numbers by its own angle, k / 10000^(2i/E)")
