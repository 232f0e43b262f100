"""An exercise of the chapter on recurrence. Write what the function asks for, then: nox -s exercises"""


def forget_bias(share: float, steps: int) -> float:
    """The bias of a forget gate with which a cell keeps `share` of what it holds after `steps` steps.

    The gate hears nothing but its bias b: f = σ(b) = 1 / (1 + e^-b). At each step the cell is multiplied by f.

    Args:
        share: of what the cell held, above 0 and below 1.
        steps: how many, 1 or more.

    Returns:
        b.
    """
    raise NotImplementedError("find the gate f of one step, then the b with σ(b) = f")
