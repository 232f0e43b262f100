"""What the tests of every kernel share, and the error budget of all tests.

Where a test runs: `everywhere` gives it a `device`, "cpu" in Triton's interpreter where there is no GPU, and "cuda";
`DTYPES` are the dtypes to go with it, and `needs_the_interpreter` drops a test where kernels are compiled.

    @everywhere
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sums(device, dtype): ...

How exact a result must be: at most a multiple of plain PyTorch's own error in the same dtype, both measured against
float64, plus a floor. Plain PyTorch is now and then nearly exact by chance, so its error is the worst of several draws.
There are two ways to gather the draws. `errors` and `check` judge our result in the first draw alone, which is quick
where a kernel runs in Triton's interpreter; `draws` are more runs of plain PyTorch.

    found = errors({"y": y}, {"y": plain}, {"y": exact}, draws=more)
    check(found, outputs={"y"})

`ErrorBudget` judges our result in every draw: our worst error beside plain PyTorch's worst.

    budget = ErrorBudget()
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        ...
        budget.add("y", ours=y, plain=y_plain, exact=y_float64)
    budget.check({"y": 2}, otherwise=3)

Whether everything is written: the fixture `poisoned` of conftest.py fills new memory with NaN. A whole file has it by

    pytestmark = pytest.mark.usefixtures("poisoned")

Which addresses a kernel touches, in the interpreter: the fixture `watch` wraps a kernel in `Watched`, to be put where
its launcher finds it.

    watched = watch(launch.forward_kernel)
    monkeypatch.setattr(launch, "forward_kernel", watched)

What the launchers hand to the compiler, without a GPU: the fixture `compiled_alone` runs code in a process that does
not interpret, and there `compile_instead_of_launching` stops each launch once its kernel is compiled.

This file needs torch and pytest alone; triton is imported by what looks into it.
"""

import contextlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]

# --- where tests run -------------------------------------------------------------------------------------------------

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/conftest.py sets it where there is no GPU
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = [*(["cpu"] if INTERPRETED else []), CUDA]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

everywhere = pytest.mark.parametrize("device", DEVICES)


def needs_the_interpreter(test):
    """A test that looks into Triton's interpreter; on a GPU compute-sanitizer does that work."""
    return test if INTERPRETED else None


# --- numbers and how they lie in memory ------------------------------------------------------------------------------


def incoming(like: Tensor, seed: int = 1) -> Tensor:
    """A gradient for this output: the same numbers on every device and in every dtype."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype).to(like.device)


def with_signs(x: Tensor, seed: int) -> Tensor:
    """The same numbers with other signs, drawn: another draw of the same size and dtype."""
    draw = torch.Generator().manual_seed(1000 + seed)
    return (x.detach() * (1 - 2 * torch.randint(2, x.shape, generator=draw)).to(x)).requires_grad_()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,  # the last two axes swapped in memory
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]],
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "offset rows": lambda x: torch.cat([torch.full_like(x, torch.nan), x], -2)[..., x.shape[-2] :, :],
    # These three repeat a part of x by a stride of 0: their numbers are others than those of x.
    "one number": lambda x: x[(slice(0, 1),) * x.ndim].expand(x.shape),
    "one row": lambda x: x[:1, :1].expand(x.shape),
    "one head": lambda x: x[:, :1].expand(x.shape),
}


def laid(x: Tensor, layout: str) -> Tensor:
    """x in another layout of `LAYOUTS`. What lies between its elements is NaN, so that reading it shows."""
    return LAYOUTS[layout](x)


# --- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch fills new memory with NaN, so that an output which an operation forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- the error budget ------------------------------------------------------------------------------------------------

Results = Mapping[str, Tensor]  # outputs and gradients by name
DRAWS = 5  # runs over which plain PyTorch's error is judged, where one could be small by chance


class Error(NamedTuple):
    """How far off one output or gradient is.

    Attributes:
        ours: our largest error.
        plain: plain PyTorch's largest error, in the same dtype.
        floor: the error that no result can promise to stay below.
    """

    ours: float
    plain: float
    floor: float


def half_a_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place of the largest number, and eight units of a float32 near 2: sums are kept in
    float32, and their terms may cancel."""
    largest = exact.abs().max()
    return largest * torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps * largest.clamp(min=2)


def errors(
    ours: Results,
    plain: Results,
    exact: Results,
    *,
    draws: Iterable[tuple[Results, Results]] = (),
    floor: Callable[[Tensor, torch.dtype], Tensor] = half_a_place,
) -> dict[str, Error]:
    """The errors of each result by name; results without elements have none.

    Args:
        ours: what is judged. Each result must be finite, and have the shape of the exact one.
        plain: plain PyTorch's results in the same dtype.
        exact: the results in float64.
        draws: plain and exact results of other draws; the worst of plain PyTorch's errors counts.
        floor: given the exact result and our dtype, the error that is always allowed.
    """
    found = {}
    for name, truth in exact.items():
        assert ours[name].isfinite().all(), f"{name} is not finite"
        assert ours[name].shape == truth.shape, f"{name}: {tuple(ours[name].shape)}, wanted {tuple(truth.shape)}"
        if truth.numel():
            found[name] = error_of(ours[name], plain[name], truth, floor)
    for plain, exact in draws:
        for name, error in found.items():
            found[name] = error._replace(plain=max(error.plain, distance(plain[name], exact[name])))
    return found


def error_of(ours: Tensor, plain: Tensor, exact: Tensor, floor: Callable[[Tensor, torch.dtype], Tensor]) -> Error:
    """The error of one result in one draw; `floor` as in `errors`."""
    return Error(distance(ours, exact), distance(plain, exact), float(floor(exact.detach(), ours.dtype)))


def distance(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, in float64 or complex128; NaN where there is a NaN."""
    wide = torch.complex128 if exact.is_complex() else torch.float64
    return float((found.detach().to(wide) - exact.detach().to(wide)).abs().max())


def check(found: Mapping[str, Error], outputs: Collection[str], times: float = 2, times_gradient: float = 3) -> None:
    """Assert that our error is at most a multiple of plain PyTorch's, plus the floor.

    Args:
        found: what `errors` gives.
        outputs: the names that are outputs; all others are gradients.
        times: the multiple for outputs.
        times_gradient: the multiple for gradients.
    """
    for name, error in found.items():
        _check_one(name, error, times if name in outputs else times_gradient)


def _check_one(name: str, error: Error, times: float) -> None:
    bound = times * error.plain + error.floor
    # A NaN is not less than anything: it fails.
    assert error.ours <= bound, f"{name}: off by {error.ours:.1e}, allowed {bound:.1e}; {error}"


def one_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of the largest number."""
    return exact.abs().max() * torch.finfo(dtype).eps


class ErrorBudget:
    """The errors of results by name over several draws, in each of which ours is judged.

    Attributes:
        errors: the errors of each draw by name; their floor is `one_place`.
    """

    def __init__(self):
        self.errors: dict[str, list[Error]] = {}

    def add(self, name: str, *, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        """One draw's results, of one shape. `exact` is float64 or complex128; `ours` may be narrower.

        Raises:
            AssertionError: results of another shape than the exact one.
            ValueError: an empty result.
        """
        for x in (ours, plain):
            assert x.shape == exact.shape, f"{name}: shape {tuple(x.shape)}, wanted {tuple(exact.shape)}"
        if exact.numel() == 0:
            raise ValueError(f"{name}: an empty tensor has no error to judge")
        self.errors.setdefault(name, []).append(error_of(ours, plain, exact, one_place))

    def check(self, times: Mapping[str, float] | float, otherwise: float | None = None, ulps: float = 4) -> None:
        """Assert for each name that our largest error is at most `times` plain PyTorch's largest, plus `ulps` floors.

        Args:
            times: the multiple; or a multiple for each name, and `otherwise` for the rest.
            otherwise: the multiple for names that `times` does not have.
            ulps: how many units in the last place of the largest exact number are allowed besides.
        """
        assert self.errors, "nothing was added: there is no error to judge"
        for name, draws in self.errors.items():
            assert len(draws) >= DRAWS, f"{name}: {len(draws)} draws; an error is judged over {DRAWS} or more"
            factor = times.get(name, otherwise) if isinstance(times, Mapping) else times
            assert factor is not None, f"{name}: no factor was given for it"
            # torch's maximum keeps a NaN, where Python's may drop it.
            ours, plain, place = torch.tensor(draws, dtype=torch.float64).amax(0).tolist()
            _check_one(name, Error(ours, plain, ulps * place), factor)


# --- addresses, in the interpreter -----------------------------------------------------------------------------------


class Watched:
    """A kernel that checks every address at each launch, to be launched as the kernel itself is: `watched[grid](...)`.

    A load must read an element of a tensor it was given, a store must write one, and no element may be written twice:
    on a GPU the order of the two would be chance. The argument `p_scratch`, where there is one, may be written again by
    the program that wrote it, and by no other.

    Attributes:
        launches: how often the kernel was launched.
    """

    def __init__(self, kernel, monkeypatch: pytest.MonkeyPatch):
        self.kernel, self.monkeypatch, self.launches = kernel, monkeypatch, 0
        self.names = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid):
        import triton

        def launch(*args, **named):
            tensors = {k: x for k, x in (dict(zip(self.names, args)) | named).items() if isinstance(x, Tensor)}
            legal = torch.cat([addresses(x) for x in tensors.values()]).unique()
            scratch = addresses(tensors["p_scratch"]) if "p_scratch" in tensors else torch.empty(0, dtype=torch.int64)
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
                in_scratch = torch.isin(used, scratch)
                stored.append(used[~in_scratch])
                own.setdefault(builder.grid_idx, set()).update(used[in_scratch].tolist())
                return store(self, ptrs, value, mask, *rest)

            with self.monkeypatch.context() as patch:
                patch.setattr(type(builder), "create_masked_load", checked_load)
                patch.setattr(type(builder), "create_masked_store", checked_store)
                self.kernel[grid](*args, **named)
            written = torch.cat(stored)
            assert written.unique().numel() == written.numel(), "a place is written twice: a race"
            assert sum(map(len, own.values())) == len(set().union(*own.values())), "two programs share scratch: a race"
            self.launches += 1

        return launch


def addresses(x: Tensor) -> Tensor:
    """Of every element, and of nothing between."""
    offsets = torch.zeros(x.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride())):
        offsets += (torch.arange(size) * stride).view([-1 if i == axis else 1 for i in range(x.ndim)])
    return (x.data_ptr() + offsets * x.element_size()).flatten()


# --- compiled, without a GPU -----------------------------------------------------------------------------------------


def run_compiled(*arguments: str) -> str:
    """What Python prints, run with these arguments in a process in which triton compiles and does not interpret.

    The library, `benchmarks` and this file can be imported there.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, Path(__file__).parent)))}
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def pretend_gpu() -> None:
    """triton compiles for a Hopper GPU that is not there, and cannot launch. For a process of its own."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Chip:
        get_current_device = get_current_stream = lambda self, *_: 0
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)  # noqa: E731

    driver.set_active(Chip())


def compile_instead_of_launching(tell: Callable[[str, Mapping[str, object]], object]) -> None:
    """Every launch from now on compiles its kernel for a Hopper GPU and ends there. For a process of its own.

    Args:
        tell: is called at each launch with the kernel's name and its code by kind: "ttir", "ptx", "cubin".
    """
    from triton.runtime.jit import JITFunction

    pretend_gpu()

    def launcher(self, grid):
        return lambda *args, **named: tell(self.fn.__name__, self.warmup(*args, grid=grid, **named).asm)

    JITFunction.__getitem__ = launcher
