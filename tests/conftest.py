"""What more than one file of tests needs to look at a run with."""

from collections.abc import Callable

import pytest
import torch
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
