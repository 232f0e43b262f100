"""Checks of the exercise on paired differences."""

from collections.abc import Callable
from statistics import mean, pstdev, stdev
from typing import Any

from checking import NotYetError

CASES = (
    ([0.52, 0.61, 0.48, 0.70, 0.55, 0.66, 0.59, 0.63], [0.50, 0.60, 0.47, 0.66, 0.56, 0.62, 0.55, 0.61], 2.365),
    ([3.1, 2.9, 3.4], [3.3, 3.2, 3.3], 4.303),
    ([0.9, 0.7], [0.2, 0.4], 12.706),
)


def check_interval(interval: Callable[..., Any]) -> None:
    for ours, others, t in CASES:
        given = interval(list(ours), list(others), t)
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise NotYetError(f"the result must be two numbers, the lower and the upper end, got {given!r}")
        found = tuple(float(each) for each in given)
        if close(found, ends([a - b for a, b in zip(ours, others)], t)):
            continue
        _name_the_mistake(found, ours, others, t)
        raise NotYetError(f"for {len(ours)} pairs the result is {found}, which differs from the right one")


def ends(differences: list[float], t: float, spread: Callable[..., float] = stdev, root: float = 0.5) -> tuple:
    """The mean of the differences, less and more t times their standard error."""
    half = t * spread(differences) / len(differences) ** root
    return mean(differences) - half, mean(differences) + half


def close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(abs(x - y) < 1e-9 for x, y in zip(a, b, strict=True))


def _name_the_mistake(found: tuple[float, ...], ours: list[float], others: list[float], t: float) -> None:
    each, n = [a - b for a, b in zip(ours, others)], len(ours)
    apart = t * ((stdev(ours) ** 2 + stdev(others) ** 2) / n) ** 0.5
    known = {
        "the difference is ours less others: these are the ends of others less ours": ends([-d for d in each], t),
        "divide the squares by n - 1, not by n: statistics.stdev does": ends(each, t, pstdev),
        "the standard deviation of a mean is s / √n": ends(each, t, root=0),
        "s / √n, not s / n": ends(each, t, root=1),
        "the runs are paired: take the deviation of the differences, not of each side": (
            mean(each) - apart,
            mean(each) + apart,
        ),
        "the lower end comes first": ends(each, -t),
    }
    for says, wrong in known.items():
        if close(found, wrong):
            raise NotYetError(says)
