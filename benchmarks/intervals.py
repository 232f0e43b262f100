"""The 95 % interval of a mean, in the three ways that benchmarks take it; each rounds and lays it out as it needs."""

import math
from collections.abc import Sequence
from statistics import mean, stdev

import torch
from torch import Tensor

T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for 95 %, by the number of values."""


def bootstrap(each: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """The mean of (B,), and the 2.5 and 97.5 percent points of the means of its rows drawn anew."""
    each = each.double()
    rows = torch.randint(len(each), (draws, len(each)), generator=torch.Generator().manual_seed(0))
    low, high = each[rows].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return each.mean().item(), low, high


def normal(each: Sequence[float]) -> tuple[float, float, float]:
    """The mean of many values, and its interval by the normal approximation."""
    half = 1.96 * stdev(each) / math.sqrt(len(each))
    return mean(each), mean(each) - half, mean(each) + half


def by_seeds(each: Sequence[float]) -> tuple[float, float, float] | None:
    """The mean of three to eight values, and its interval by Student's t; None for another number of them."""
    if len(each) not in T_95:
        return None
    half = T_95[len(each)] * stdev(each) / math.sqrt(len(each))
    return mean(each), mean(each) - half, mean(each) + half
