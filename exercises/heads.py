"""An exercise of the chapter on heads. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def added(outputs: Tensor, w_o: Tensor) -> Tensor:
    """What each head adds to the output of its layer.

    The layer puts the heads' outputs end to end, the first head's numbers first, and multiplies: y = flat @ w_o.T, as
    nn.Linear does with its weight.

    Args:
        outputs: (N, H, D), what each of H heads gives out at N positions.
        w_o: (E, H * D), the weight of the output projection.

    Returns:
        (N, H, E): one vector for each head and position; their sum over the heads is y.
    """
    raise NotImplementedError("cut w_o into the part of each head, and multiply each head's output with its own part")
