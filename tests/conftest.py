"""Fixtures that more than one file of tests uses.

in_a_process_of_its_own   run code in a fresh interpreter with a time limit: process groups, forks, whatever can hang
a_server_of_its_own       start code that goes on until the test ends it, such as an HTTP server
light_pytest              variables with which a pytest of its own starts in a fifth of the time
largest                   how many numbers the largest tensor held that a call made
in_float64                a context in which code that asks for float32 gets float64
one_thread                torch computes with one thread, for models so small that several wait for each other
held_by                   all that caches hold, as lists and numbers that can be compared
quick_interpreter         for every test: Triton's interpreter works out once what never changes
"""

import contextlib
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nondual.kv_cache import KVCache

# --- names of tests --------------------------------------------------------------------------------------------------


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes are not part of a test's name: an archive holds the time when it was made, and pytest-xdist asks that every
    worker finds the same names."""
    return argname if isinstance(val, bytes) else None


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """For layers so small that two threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- processes of their own ------------------------------------------------------------------------------------------


class Process:
    """A fresh Python interpreter that runs `code`, the leader of a process group of its own.

    What it prints goes to files, not to pipes: a grandchild that outlives it could hold a pipe open, and reading that
    pipe would wait for ever.
    """

    def __init__(self, code: str, *arguments: str, env: Mapping[str, str | None] | None = None, cwd=None):
        self.folder = tempfile.TemporaryDirectory()
        script = Path(self.folder.name, "script.py")
        script.write_text(textwrap.dedent(code), encoding="utf-8")
        # Every process of the group, a forked child too, shows the stacks of its threads when it gets SIGABRT.
        changed = os.environ | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"} | dict(env or {})
        self.files = {name: open(Path(self.folder.name, name), "w+b") for name in ("stdout", "stderr")}
        self.popen = subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={name: value for name, value in changed.items() if value is not None},
            cwd=cwd or self.folder.name,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **self.files,
        )

    def said(self, name: str) -> str:
        """What has been printed so far to "stdout" or "stderr"."""
        return Path(self.files[name].name).read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float) -> int | None:
        """The exit status; None if the process did not end in `timeout` seconds. Then its stacks are in stderr."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self._signal_group(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(5)
            time.sleep(0.5)  # the children write their stacks too
            return None

    def end(self) -> None:
        """Kill what is left of the group, and remove the files."""
        self._signal_group(signal.SIGKILL)
        self.popen.wait(10)
        for file in self.files.values():
            file.close()
        self.folder.cleanup()

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, number)


def run_in_a_process_of_its_own(
    code: str,
    *arguments: str,
    timeout: float = 60,
    env: Mapping[str, str | None] | None = None,
    cwd=None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `code` as a script in a fresh interpreter, and return its exit status, stdout and stderr.

    Args:
        code: Python source; common indentation is removed. It may use `multiprocessing` and `if __name__ == ...`.
        arguments: `sys.argv[1:]` of the script.
        timeout: seconds. Then every process of the group shows the stacks of all its threads, is killed, and the test
            fails with what was printed.
        env: variables added to this process's own; None as a value removes one.
        cwd: its working folder; by default an empty temporary one.
        check: fail the test if the exit status is not 0.
    """
    process = Process(code, *arguments, env=env, cwd=cwd)
    try:
        status = process.wait(timeout)
        stdout, stderr = process.said("stdout"), process.said("stderr")
    finally:
        process.end()
    if status is None or (check and status != 0):
        what = f"did not end in {timeout} s" if status is None else f"ended with status {status}"
        pytest.fail(f"the process {what}\n--- stdout\n{stdout[-8000:]}\n--- stderr\n{stderr[-8000:]}", pytrace=False)
    return subprocess.CompletedProcess(process.popen.args, status, stdout, stderr)


@pytest.fixture(scope="session")
def in_a_process_of_its_own() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function: run this code in a fresh interpreter with a time limit. See `run_in_a_process_of_its_own`."""
    return run_in_a_process_of_its_own


@contextlib.contextmanager
def serving(code: str, *arguments: str, ready: str, timeout: float = 60, env=None, cwd=None) -> Iterator[re.Match]:
    """Run `code` in a fresh interpreter until the block ends, whatever happens in the block.

    Args:
        ready: a regular expression. The block starts when stdout matches it, and gets the match.
        timeout: seconds to wait for that.
    """
    process = Process(code, *arguments, env=env, cwd=cwd)
    try:
        limit = time.monotonic() + timeout
        while (found := re.search(ready, process.said("stdout"))) is None:
            ended = process.popen.poll() is not None
            if ended or time.monotonic() > limit:
                what = f"ended with status {process.popen.returncode}" if ended else f"was not ready in {timeout} s"
                if not ended:
                    process.wait(0)
                said = f"--- stdout\n{process.said('stdout')[-8000:]}\n--- stderr\n{process.said('stderr')[-8000:]}"
                pytest.fail(f"the server {what}\n{said}", pytrace=False)
            time.sleep(0.02)
        yield found
    finally:
        process.end()


@pytest.fixture(scope="session")
def a_server_of_its_own() -> Callable[..., contextlib.AbstractContextManager[re.Match]]:
    """A context manager: run this code until the block ends. See `serving`."""
    return serving


@pytest.fixture(scope="session")
def light_pytest(tmp_path_factory) -> dict[str, str]:
    """Variables for a pytest in a process of its own that runs no snippet and computes nothing: it starts in half a
    second. It loads the plugins that our settings name and no others, and has a torch that only says: no CUDA device.
    """
    folder = tmp_path_factory.mktemp("light")
    (folder / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    return {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "xdist.plugin,pytest_timeout,pytest_codeblocks.plugin",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
    }


# --- looking at a run ------------------------------------------------------------------------------------------------


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


# --- caches ----------------------------------------------------------------------------------------------------------


def all_that_is_held(cache: object) -> object:
    """The numbers and attributes of caches and of those in them; of keys and values those that are read again."""
    if isinstance(cache, torch.Tensor):
        return str(cache.dtype), tuple(cache.shape), cache.tolist()
    if isinstance(cache, (list, tuple)):
        return [all_that_is_held(each) for each in cache]
    parts = dict(cache if isinstance(cache, dict) else getattr(cache, "__dict__", {}))
    if isinstance(cache, KVCache):
        parts |= {name: getattr(cache, name)[:, :, : cache.length] for name in ("keys", "values")}
    return {name: all_that_is_held(each) for name, each in parts.items()} if parts else cache


@pytest.fixture(scope="session")
def held_by() -> Callable[[object], object]:
    """A function: all that caches hold, to be compared by ==. See `all_that_is_held`."""
    return all_that_is_held


# --- Triton's interpreter --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter spends most of its time on what is the same each time. Here it works that out once.

    1. It replaces the functions of `tl` at every call of one kernel's step by another: once a launch is enough.
    2. To find those functions it sorts through all names of `tl`: they do not change.
    3. It makes a table of all of NumPy's types to look up one of them: each is looked up once.
    4. Every tensor, and every type of a tensor, makes its shape and its size anew: those of one shape share them.
    5. It compares two shapes number by number before each operation on blocks: those of one shape are seen at once.
    6. It looks into everything for a constant that is wrapped: not into a number, a text, a tensor or a type.
    7. It computes with integers once more in 64 bits to see an overflow, which it says only where `debug` is on.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language import core, semantic
    from triton.runtime import interpreter

    patch, launch, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()
    languages = interpreter.tl, core

    seen: dict[object, tuple] = {}

    def patch_once(function):
        if function not in seen:
            seen[function] = tuple(any(value is x for value in function.__globals__.values()) for x in languages)
        if seen[function] in done:
            return None  # nobody asks for it: a step's call does not undo the patch
        done.add(seen[function])
        return patch(function)

    def launch_patched(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    names: dict[object, list[str]] = {}

    def patch_builtin(package, builder, scope):
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in names[package]:
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type_once(dtype):
        scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    # A block's shape is one object for all blocks of that shape, known by its identity.
    shapes, sizes_of, of_tensors = {}, {}, {}
    new_block, names_of_blocks = core.block_type.__init__, {}

    def block(self, element_ty, shape):
        sizes = sizes_of.get(id(shape)) or tuple(core._unwrap_shape(shape))
        if (sizes, element_ty.name) not in names_of_blocks:
            new_block(self, element_ty, shape)  # which also refuses what is no shape
            if sizes not in shapes:
                shapes[sizes] = self.shape, self.numel
                sizes_of[id(self.shape)] = sizes
                numbers = core.tuple([core.constexpr(size) for size in sizes])
                of_tensors[id(self.shape)] = core.constexpr(self.numel), numbers
            names_of_blocks[sizes, element_ty.name] = self.name
        self.element_ty, self.name = element_ty, names_of_blocks[sizes, element_ty.name]
        self.shape, self.numel = shapes[sizes]

    of_scalars = core.constexpr(1), core.tuple([])

    def tensor(self, handle, type):
        super(core.tensor, self).__init__()
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors[id(type.shape)] if type.is_block() else of_scalars

    broadcast = semantic.TritonSemantic.broadcast_impl_value

    def broadcast_if_they_differ(self, lhs, rhs):
        alike = lhs.type.shape is rhs.type.shape if lhs.type.is_block() and rhs.type.is_block() else False
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    types = {core.tensor, core.dtype, core.block_type, core.pointer_type}
    unwrap, plain = core._unwrap_if_constexpr, {int, bool, float, str, type(None), *types}

    def unwrap_what_is_wrapped(value):
        return value if type(value) in plain else unwrap(value)

    equal = core.dtype.__eq__

    def same_or_equal(self, other):
        return self is other or equal(self, other)

    sanitize = semantic.TritonSemantic.binary_op_sanitize_overflow_impl

    def sanitize_where_it_is_said(self, *operands):
        if self.builder.options.debug:
            sanitize(self, *operands)

    with pytest.MonkeyPatch.context() as quicker:
        quicker.setattr(core, "_unwrap_if_constexpr", unwrap_what_is_wrapped)
        quicker.setattr(core.dtype, "__eq__", same_or_equal)
        quicker.setattr(core.block_type, "__init__", block)
        quicker.setattr(semantic.TritonSemantic, "broadcast_impl_value", broadcast_if_they_differ)
        quicker.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", sanitize_where_it_is_said)
        quicker.setattr(interpreter, "_patch_lang", patch_once)
        quicker.setattr(interpreter.GridExecutor, "__call__", launch_patched)
        quicker.setattr(interpreter, "_patch_builtin", patch_builtin)
        quicker.setattr(interpreter, "_get_np_dtype", numpy_type_once)
        quicker.setattr(core.tensor, "__init__", tensor)
        yield
