"""An exercise of the chapter on recognition as an aim. Write what the function asks for, then: nox -s exercises"""

from torch import Tensor


def recall(x: Tensor, y: Tensor, tasks: Tensor, shares: Tensor, noise: float) -> Tensor:
    """The mean of the stored tasks given examples, where some tasks come more often than others.

    By Bayes' rule the probability of a task is in proportion to its share times how likely it makes the examples.

    Args:
        x: (N, D), inputs; N may be 0.
        y: (N,), answers, with normal noise.
        tasks: (M, D).
        shares: (M,), how often each task comes; they are above 0 and sum to 1.
        noise: the standard deviation of the noise.

    Returns:
        (D,): the mean of the weights.
    """
    raise NotImplementedError("score each task by the logarithm of its share, less its squared misses / (2 noise²)")
