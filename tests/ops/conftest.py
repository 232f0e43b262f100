"""Fixtures for the tests of kernels; harness.py beside this file says how they go together."""

from collections.abc import Callable, Iterator

import pytest
import torch
from harness import Watched, poisoned_memory, run_compiled


@pytest.fixture
def watch(monkeypatch) -> Callable[[object], Watched]:
    """A function: this kernel, with every address checked."""
    return lambda kernel: Watched(kernel, monkeypatch)


@pytest.fixture(scope="session")
def compiled_alone() -> Callable[..., str]:
    """A function: what Python prints, run with these arguments in a process in which triton compiles."""
    return run_compiled


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch fills new memory with NaN, so that an output which an operation forgets to write is seen."""
    with poisoned_memory():
        yield


@pytest.fixture
def way(monkeypatch) -> Callable[[str], None]:
    """A function that chooses how impl="cpu" of the selective scan runs: "c" or "torch".

    It fails where that cannot be had: without a compiler only "torch" can.
    """
    from nondual.ops.selective_scan import cpu  # here: the tests of other operations do not need it

    def choose(name):
        monkeypatch.setenv("NONDUAL_CPU_SCAN", "torch" if name == "torch" else "")
        assert (cpu.library(torch.float32) is None) == (name == "torch")

    return choose
