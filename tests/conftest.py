"""What more than one file of tests needs to look at a run with."""

from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor held which an operation made while this was on."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return out


@pytest.fixture
def largest() -> Callable[[Callable[[], object]], int]:
    """A function: run this, and say how many numbers the largest tensor held."""

    def measure(run):
        with Largest() as seen:
            run()
        return seen.numbers

    return measure


class InFloat64(TorchFunctionMode):
    """What asks for float32 gets float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64}
        if function is torch.Tensor.float:
            return args[0].double()
        if function is torch.Tensor.to:
            args = tuple(wide.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
            kwargs = {k: wide.get(x, x) if isinstance(x, torch.dtype) else x for k, x in (kwargs or {}).items()}
        return function(*args, **(kwargs or {}))


@pytest.fixture
def in_float64() -> InFloat64:
    """A context: within it a judge that narrows to float32 inside, whatever its weights are, stays in float64."""
    return InFloat64()
