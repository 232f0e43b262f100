"""What must wait for what: the longest chain of steps in a computation, each of which needs the one before it.

A device with any number of processors can do at once whatever does not wait, and needs as many rounds as this chain is
long (Brent 1974, "The parallel evaluation of general arithmetic expressions"; Blelloch 1990, section 1.2, calls it the
step complexity). It is counted, not timed: autograd's graph says of every result what it was computed from.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

PRODUCTS = ("Addmm", "Mm", "Addmv", "Mv", "Addbmm", "Baddbmm", "Bmm", "Linear", "Dot")
"""How the names of autograd's nodes for products of matrices begin."""

SHAPES = ("View", "UnsafeView", "Reshape", "Transpose", "T", "Permute", "Unbind", "Split", "SplitWithSizes", "Slice")
SHAPES += ("Select", "Squeeze", "Unsqueeze", "Expand", "Cat", "Stack", "Clone", "Alias", "AsStrided", "ToCopy")
"""Those of operations that move numbers and compute none."""


def products(name: str) -> int:
    """How many products of matrices a node of autograd's graph stands for: 1 for "AddmmBackward0"; 2 for torch's fused
    attention, whose second waits for its first; 0 for most."""
    kind = name.split("Backward")[0]
    return 2 if kind.startswith("ScaledDotProduct") else int(kind in PRODUCTS)


def is_arithmetic(name: str) -> bool:
    """Whether a node of autograd's graph computes anything: "MulBackward0" does, "ViewBackward0" does not."""
    kind, backward, _ = name.partition("Backward")
    return bool(backward) and kind not in SHAPES


def longest_chain(y: Tensor, counts: Callable[[str], int] = products) -> int:
    """The most operations that had to wait for one another on the way to y.

        longest_chain(GRU(8, 8)(x)[0])      # N: a product with U for each position; W x is beside them

    What a graph holds as one node counts as one: count an operation with a backward of its own by its parts.

    Args:
        y: computed with a graph: from parameters or inputs that require a gradient.
        counts: how much an operation counts, by the name of autograd's node; products of matrices where left out.

    Returns:
        The largest sum of such counts on any path from an input to y.

    Raises:
        TypeError: y is not a Tensor.
        ValueError: y has no graph.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a Tensor, got {type(y).__name__}")
    if y.grad_fn is None:
        raise ValueError("y must have a graph: compute it without torch.no_grad(), from what requires a gradient")
    chain: dict[Any, int] = {}
    waiting: list[Any] = [y.grad_fn]
    while waiting:  # a stack of our own: a graph is deeper than Python's recursion may be
        node = waiting[-1]
        before = [earlier for earlier, _ in node.next_functions if earlier is not None]
        unknown = [earlier for earlier in before if earlier not in chain]
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        chain[node] = max((chain[earlier] for earlier in before), default=0) + counts(node.name())
    return chain[y.grad_fn]
