"""Each fence as a file of its own: what a reader would see who pastes it into an empty file and runs that.

With `--snippets` figures are left out: the build runs each of them in a process of its own, and fails where one does.
A fence that imports torch is run in a process that has it already; without that, loading it was most of the time.
"""

import contextlib
import os
import queue
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snippets.forking import Forking
from snippets.reading import ROOT, Fence, fences, pages, shown

SECONDS = 120  # a snippet runs in seconds; this is the limit
TORCH = re.compile(r"^(?:import|from) torch\b", re.MULTILINE)


Run = Callable[[Path, Path, float], subprocess.CompletedProcess]  # a file, a folder to run it in, seconds
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}


def run_fresh(file: Path, place: Path, timeout: float) -> subprocess.CompletedProcess:
    """Run a file by a fresh Python."""
    return subprocess.run(
        [sys.executable, str(file)], cwd=place, env=os.environ | ENVIRONMENT, capture_output=True, encoding="utf-8",
        errors="replace", timeout=timeout, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@contextlib.contextmanager
def several(many: int) -> Iterator[Run]:
    """`run_fresh`, done by as many processes that have torch, for as many threads; where none can fork, itself."""
    if not hasattr(os, "fork"):
        yield run_fresh
        return
    pythons, free = [Forking(os.environ | ENVIRONMENT) for _ in range(many)], queue.SimpleQueue()
    for python in pythons:
        free.put(python)

    def run(file: Path, place: Path, timeout: float) -> subprocess.CompletedProcess:
        python = free.get()
        try:
            return python.run(file, place, timeout)
        finally:
            free.put(python)

    try:
        yield run
    finally:
        for python in pythons:
            python.end()


def run_alone(fence: Fence, run: Run = run_fresh) -> str | None:
    """Run a fence as a file of its own. None, or what went wrong with page and line.

    A snippet runs in an empty folder; a figure, as in the build, at the root of the project, where docs/measured is.
    `run` is used where the fence imports torch.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as empty:
        file = Path(folder) / "snippet.py"
        file.write_text(fence.code, encoding="utf-8")
        try:
            place = ROOT if fence.kind == "figure" else Path(empty)
            ran = (run if TORCH.search(fence.code) else run_fresh)(file, place, SECONDS)
        except subprocess.TimeoutExpired:
            return f"{fence.where}: still running after {SECONDS} s"
    if ran.returncode:
        return failure(fence, ran)
    if fence.kind == "snippet" and ran.stdout != (fence.output or ""):
        if fence.output is None:
            return f"{fence.where}: prints, and no output is shown:\n{indented(ran.stdout)}"
        return f"{fence.where}: shows\n{indented(fence.output)}\n  and prints\n{indented(ran.stdout)}"
    return None


def failure(fence: Fence, ran: subprocess.CompletedProcess) -> str:
    """The exception's own lines, at the line of the page that raised it."""
    error = ran.stderr.rstrip().splitlines()
    frames = [int(m[1]) for line in error if (m := re.match(r'  File ".*snippet\.py", line (\d+)', line))]
    line = fence.line + frames[-1] if frames else fence.line
    after = max((i for i, text in enumerate(error) if text.startswith(" ")), default=-1)
    said = error[after + 1 :] or [f"exit code {ran.returncode}"]
    return f"{shown(fence.page)}:{line}: {said[0]}" + "".join(f"\n    {text}" for text in said[1:6])


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines()) or "    (nothing)"


def main(arguments: list[str]) -> int:
    kinds = ("snippet",) if "--snippets" in arguments else ("snippet", "figure")
    chosen = [Path(argument) for argument in arguments if argument != "--snippets"] or pages()
    runnable = [fence for page in chosen for fence in fences(page) if fence.kind in kinds]
    with several(os.cpu_count() or 1) as run, ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [fault for fault in pool.map(lambda fence: run_alone(fence, run), runnable) if fault]
    for fault in failed:
        print(fault)
    print(f"{len(runnable)} fences run alone: {len(runnable) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0
