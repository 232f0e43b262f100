"""An exercise of the chapter on the evolution of attention. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def effective_keys(weights: Tensor) -> Tensor:
    """How many keys share each row's weight: e^H, where H = -Σ a ln a is the row's entropy.

    It is n where the weight is even over n keys, and 1 where one key has all of it.

    Args:
        weights: (..., M), rows that sum to 1; some weights may be exactly 0, as under a sparse mask.

    Returns:
        (...), in the dtype of the weights.
    """
    raise NotImplementedError("find H for each row, mind the zeros, and raise e to it")
