"""What every test and every snippet of a page gets, wherever it lies: at the root, so that README and docs have it too.

1. A failing snippet names its page, the line of that page, and the exception.
2. A snippet leaves nothing behind: it runs in an empty folder, and random state, dtype and figures are put back.
3. A skip is not a pass: evidence for a claim may never be skipped, and in CI nothing may, but for the tests of a GPU.
4. A test marked `gpu` is skipped where torch sees no CUDA device.
5. Without such a device Triton's kernels run in its interpreter, on the CPU.
6. Nothing hangs: every test has a time limit, and a test that reaches it shows the stacks of all threads.
7. The workers of `pytest -n` share the machine's cores, and waiting threads leave them to others.
8. They take the files that took longest first, by tests/seconds.json.
9. Python's collector of garbage looks at what tests make, not at the million objects that were loaded before the first.

Nothing here imports a plugin: `nox -s gpu_tests --no-venv` needs torch and pytest alone.
"""

import contextlib
import faulthandler
import gc
import json
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
gc.disable()  # 9. until all is loaded: a quarter of that time was spent looking for garbage

# 7. Each of n workers computes with 1/n of the threads, and so does every process that its tests start. A thread that
#    waits for the others of its loop sleeps: by default it spins, which took twenty times as long on a busy machine.
#    Both are read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# 5. Triton asks when it is first imported, and torch may import it: so before anything else is.
try:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
except ImportError:  # the fences can be counted on a machine without torch
    pass


def is_snippet(item: pytest.Item) -> bool:
    return type(item).__module__ == "pytest_codeblocks.plugin"


# --- 1. a failing snippet's report ---------------------------------------------------------------------------------


def report_of(item: pytest.Item, error: BaseException) -> str:
    """'docs/x.md:31: ValueError: heads must divide …', the lines around it, and where in the library it was raised."""
    page = os.path.relpath(item.path, item.config.rootpath)
    fence = item.obj.lineno
    if "Expected output" in str(error) and error.__context__ is None:
        said = "".join(str(error).partition("```\n")[2:]).replace("```\n", "", 1)
        return f"{page}:{fence}: AssertionError: the snippet does not print what the page shows\n{said}"
    cause = error.__context__ if type(error) is RuntimeError and error.__context__ is not None else error
    frames = list(traceback.walk_tb(cause.__traceback__))
    own = [
        line for frame, line in frames if "__MODULE__" in frame.f_globals
    ]  # pytest-codeblocks runs it with that name
    at = own[-1] if own else getattr(cause, "lineno", None) or 0  # a SyntaxError has no frame, and a line
    lines = [f"{page}:{fence + at}: {''.join(traceback.format_exception_only(cause)).strip()}", ""]
    source = item.obj.code.splitlines()
    for number in range(max(1, at - 2), min(len(source), at + 1) + 1):
        lines.append(f"{'>' if number == at else ' '} {fence + number:4} | {source[number - 1]}")
    if own and "__MODULE__" not in frames[-1][0].f_globals:
        code = frames[-1][0].f_code
        lines += ["", f"raised in {code.co_filename}:{frames[-1][1]}, in {code.co_name}"]
    return "\n".join(lines)


def correct(snippets: list[pytest.Item]) -> None:
    """Give each snippet its text as we read it: pytest-codeblocks drops the empty lines of an indented fence."""
    if not snippets:
        return
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "hooks"))
    try:
        from snippets.reading import fences
    finally:
        del sys.path[0]
    for page in {item.path for item in snippets}:
        ours = {fence.line: fence for fence in fences(page)}
        for item in snippets:
            if item.path == page and (fence := ours.get(item.obj.lineno)):
                item.obj.code, item.obj.expected_output = fence.code, fence.output


# --- 2. nothing left behind ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed():
    """Run something in an empty folder, and put back what it may change for those after it."""
    import torch  # here, so that the fences can be counted on a machine without it

    dtype, gradients, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    states = random.getstate(), torch.get_rng_state()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        random.seed(1)
        torch.manual_seed(1)  # not the seed a fresh process has: a snippet that sets none should not pass by luck
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_device(None)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
            torch.set_rng_state(states[1])
            random.setstate(states[0])
            sys.path[:] = path
            os.environ.clear()
            os.environ.update(environment)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(None)
            if "matplotlib.pyplot" in sys.modules:
                sys.modules["matplotlib.pyplot"].close("all")
                sys.modules["matplotlib"].rcdefaults()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if not is_snippet(item):
        return (yield)
    with undisturbed():
        return (yield)


# --- 3. a skip is not a pass ---------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and report.failed and call.when == "call" and is_snippet(item):
        report.longrepr = report_of(item, call.excinfo.value)
    if report.skipped and (refusal := refused(item)):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: {refusal} ({reason(report)})"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A file that skips itself as a whole, by pytest.importorskip: in CI none of its tests would be missed."""
    report = yield
    if report.skipped and os.environ.get("CI") and collector.config.option.markexpr != "gpu":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: in CI a skip is a failure ({reason(report)})"
    return report


def refused(item: pytest.Item) -> str | None:
    """Why this test may not be skipped, or None where it may."""
    if claim := item.get_closest_marker("claim"):
        return f"the evidence for claim {claim.args[0]} was not run: it may not be skipped"
    if os.environ.get("CI") and not item.get_closest_marker("gpu"):
        return "in CI a skip is a failure"
    return None


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfail: " + report.wasxfail
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


# --- 6. nothing hangs -----------------------------------------------------------------------------------------------
#
# Three limits, from the gentlest to the last:
# - `timeout` in pyproject.toml (the plugin pytest-timeout): the test fails with all stacks, and the run goes on.
#   It needs the interpreter, so it does not end a call into C that keeps the interpreter's lock.
# - `faulthandler_timeout` in pyproject.toml: a thread in C, which needs no lock, writes all stacks, ends the process.
# - noxfile.py ends a session that goes on for too long, with every process that it started.


def pytest_addoption(parser, pluginmanager):
    if not pluginmanager.hasplugin("timeout"):  # its settings in pyproject.toml are no mistake where it is missing
        parser.addini("timeout", "seconds for one test; needs pytest-timeout")
    parser.addoption("--record-seconds", action="store_true", help="write each file's seconds to tests/seconds.json")


stderr = pytest.StashKey[int]()


def pytest_configure(config):
    config.stash[stderr] = os.dup(sys.__stderr__.fileno())  # the real one: a test's own is captured


def end_later(config: pytest.Config, more: float = 0) -> None:
    """Unless it is called off: write all stacks and end this process, after `faulthandler_timeout` seconds and more."""
    if seconds := float(config.getini("faulthandler_timeout") or 0):
        faulthandler.dump_traceback_later(seconds + more, exit=True, file=config.stash[stderr])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    """The last limit stays above the first where a test is marked with a longer one."""
    if mark := item.get_closest_marker("timeout"):
        end_later(item.config, more=mark.args[0])
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    """pytest calls both limits off when a test fails, and the teardown after that can hang too."""
    end_later(item.config)
    return (yield)


def pytest_unconfigure(config):
    """After the last test too: Python joins threads and runs destructors when it exits."""
    end_later(config)


# --- 4. what is collected ------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(items):
    if workers:  # the longest files first, so that no worker is left alone with one at the end
        known = seconds()
        items.sort(key=lambda item: -known.get(os.path.relpath(item.path, item.config.rootpath), UNKNOWN))
    correct([item for item in items if is_snippet(item)])
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: nox -s gpu_tests"))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 10, 20)  # by default a ninth of the time of tests that compile
        gc.enable()


# --- 8. how long each file takes ------------------------------------------------------------------------------------

SECONDS = Path(__file__).parent / "tests" / "seconds.json"  # of each file; `pytest --record-seconds` writes it
UNKNOWN = 10  # seconds of a file that is not there
spent: dict[str, float] = {}


def seconds() -> dict[str, float]:
    return json.loads(SECONDS.read_text(encoding="utf-8")) if SECONDS.exists() else {}


def pytest_runtest_logreport(report):
    file = report.nodeid.partition("::")[0]
    spent[file] = spent.get(file, 0.0) + report.duration


def pytest_sessionfinish(session):
    if session.config.getoption("record_seconds", False) and "PYTEST_XDIST_WORKER" not in os.environ:
        root = session.config.rootpath
        found = {file: took for file, took in (seconds() | spent).items() if (root / file).exists()}
        rows = {file: round(took) for file, took in sorted(found.items(), key=lambda row: (-round(row[1]), row[0]))}
        SECONDS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
