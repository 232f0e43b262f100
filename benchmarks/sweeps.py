"""A learning rate is chosen from a grid that grows until the best of its rates is not the first or the last."""

from collections.abc import Callable, Sequence


def lowest(found: dict[float, float]) -> float:
    """The rate with the lowest value; of several the lowest rate."""
    return min(found, key=lambda rate: (found[rate], rate))


def highest(found: dict[float, float]) -> float:
    """The rate with the highest value; of several the lowest rate."""
    return max(found, key=lambda rate: (found[rate], -rate))


def grown(
    value_at: Callable[[float], float],
    rates: Sequence[float],
    best_of: Callable[[dict[float, float]], float] = lowest,
    beyond: int | None = None,
) -> dict[float, float]:
    """The value at each rate, in order.

    Args:
        value_at: trains with a rate and says how good it was.
        rates: the grid to begin with. One rate alone is not grown: there is nothing to choose.
        best_of: which rate is the best.
        beyond: how many rates outside the grid are tried at most, each twice or half the last; as many as it takes
            where left out.
    """
    found = {rate: value_at(rate) for rate in rates}
    while len(rates) > 1 and (beyond is None or len(found) < len(rates) + beyond):
        best = best_of(found)
        if min(found) < best < max(found):
            break
        rate = best * 2 if best == max(found) else best / 2
        found[rate] = value_at(rate)
    return dict(sorted(found.items()))
