"""The exercise of the chapter on what each step won and lost. Write what it asks for, then: nox -s exercises"""


def interval(ours: list[float], others: list[float], t: float) -> tuple[float, float]:
    """The interval of the mean of paired differences, ours less others.

    With d_i the difference of pair i, n pairs, their mean m and their standard deviation s (divided by n - 1), the
    interval is m ± t s / √n.

    Args:
        ours: what n runs of one mechanism reached, by seed; n is 2 or more.
        others: what n runs of the other reached, with the same seeds.
        t: the quantile of Student's t for n - 1 degrees of freedom, such as 2.365 for 8 pairs and 95 %.

    Returns:
        The lower and the upper end.
    """
    raise NotImplementedError("n differences, their mean, their standard deviation")
