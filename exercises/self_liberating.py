"""The exercise of the chapter on self-liberating attention. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def kept(log_forget: Tensor, bound: float, epsilon: float) -> Tensor:
    """How many keys one head keeps at each step, when as many of the oldest as may go are gone.

    At step i the key j has at most e^(2 bound + d) of the weight, where d is the sum of log f over j + 1 … i. The first
    p keys may go if these bounds of theirs sum to epsilon or less. The query's own key stays.

    Args:
        log_forget: (N,), float64, the logarithm of the gate at each step.
        bound: c, what no score exceeds.
        epsilon: the most weight that may be missing.

    Returns:
        (N,), int64: for each step i from 0 how many of its i + 1 keys are kept.
    """
    raise NotImplementedError("at each step sum the bounds from the oldest on, and count those that fit into epsilon")
