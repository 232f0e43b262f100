"""What the tests of kernels look at a kernel with: while Triton interprets it, and once it is compiled."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


class Watched:
    """A kernel of which every address is checked: read from what it was given, and written to no place twice; but to
    what its arguments call scratch a program may write again, and no other program."""

    def __init__(self, kernel, monkeypatch):
        self.kernel, self.monkeypatch, self.launches = kernel, monkeypatch, 0
        self.names = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid):
        import triton  # here: the tests of this folder that need no kernel need no triton

        def launch(*args, **constants):
            given = {name: x for name, x in zip(self.names, args) if isinstance(x, torch.Tensor)}
            legal = torch.cat([addresses(x) for x in given.values()]).unique()
            scratch = addresses(given["p_scratch"]) if "p_scratch" in given else torch.empty(0, dtype=torch.int64)
            stored, own = [], {}
            builder = triton.runtime.interpreter.interpreter_builder
            load, store = type(builder).create_masked_load, type(builder).create_masked_store

            def check(ptrs, mask, what):
                used = torch.from_numpy(ptrs.data[mask.data.astype(bool)].astype("int64").reshape(-1).copy())
                assert torch.isin(used, legal).all(), f"{what} outside of every tensor"
                return used

            def checked_load(self, ptrs, mask, *rest):
                check(ptrs, mask, "read")
                return load(self, ptrs, mask, *rest)

            def checked_store(self, ptrs, value, mask, *rest):
                used = check(ptrs, mask, "written")
                kept = torch.isin(used, scratch)
                stored.append(used[~kept])
                own.setdefault(builder.grid_idx, set()).update(used[kept].tolist())
                return store(self, ptrs, value, mask, *rest)

            with self.monkeypatch.context() as patch:
                patch.setattr(type(builder), "create_masked_load", checked_load)
                patch.setattr(type(builder), "create_masked_store", checked_store)
                self.kernel[grid](*args, **constants)
            written = torch.cat(stored)
            assert written.unique().numel() == written.numel(), "a place is written twice: a race"
            assert sum(map(len, own.values())) == len(set().union(*own.values())), "two programs share scratch: a race"
            self.launches += 1

        return launch


def addresses(x: torch.Tensor) -> torch.Tensor:
    """Of every element, and of nothing between."""
    offsets = torch.zeros(x.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride())):
        offsets += (torch.arange(size) * stride).view([-1 if i == axis else 1 for i in range(x.ndim)])
    return (x.data_ptr() + offsets * x.element_size()).flatten()


@pytest.fixture
def watch(monkeypatch) -> Callable[[object], Watched]:
    """A function: this kernel, watched."""
    return lambda kernel: Watched(kernel, monkeypatch)


@pytest.fixture(scope="session")
def compiled_alone() -> Callable[..., str]:
    """A function: what Python says, run with these arguments in a process in which triton compiles."""

    def run(*arguments):
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        command = [sys.executable, *arguments]
        ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
        assert ran.returncode == 0, ran.stderr[-4000:]
        return ran.stdout

    return run


@pytest.fixture
def poisoned():
    """torch fills new memory with NaN, so that what an operation forgets to write is seen.

    A whole file has it by `pytestmark = pytest.mark.usefixtures("poisoned")`.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def way(monkeypatch) -> Callable[[str], None]:
    """A function that sets which of the two ways impl="cpu" of the selective scan goes: "c" or "torch".

    It fails where the way asked for is not to be had: without a compiler there would be "torch" alone.
    """
    from nondual.ops.selective_scan import cpu  # here: the tests of other operations do not need it

    def choose(name):
        monkeypatch.setenv("NONDUAL_CPU_SCAN", "torch" if name == "torch" else "")
        assert (cpu.library(torch.float32) is None) == (name == "torch")

    return choose
