"""How a cost grows with the length: the most memory that a process has held, and rates of growth."""

import itertools
import math
import resource
import sys
from collections.abc import Sequence

MB = 1024**2 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss in a mebibyte


def peak_mib() -> float:
    """The most that this process has held so far, in mebibytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MB


def growth(lengths: Sequence[int], costs: Sequence[float]) -> list[float]:
    """By what factor the cost grows from each length to the next, where that is twice as long."""
    pairs = list(zip(lengths, costs))
    return [after / before for (n, before), (twice, after) in itertools.pairwise(pairs) if twice == 2 * n]


def slope(lengths: Sequence[int], costs: Sequence[float]) -> float:
    """The power of the length over the three longest, by least squares on logarithms."""
    points = [(math.log(n), math.log(max(cost, 1e-9))) for n, cost in list(zip(lengths, costs))[-3:]]
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
