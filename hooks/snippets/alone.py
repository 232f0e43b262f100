"""Each fence as a file of its own: what a reader would see who pastes it into an empty file and runs that.

With `--snippets` figures are left out: the build runs each of them in a process of its own, and fails where one does.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from snippets.reading import ROOT, Fence, fences, pages, shown

SECONDS = 120  # a snippet runs in seconds; this is the limit


def run_alone(fence: Fence) -> str | None:
    """Run a fence as a file of its own. None, or what went wrong with page and line.

    A snippet runs in an empty folder; a figure, as in the build, at the root of the project, where docs/measured is.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "snippet.py"
        file.write_text(fence.code, encoding="utf-8")
        place = ROOT if fence.kind == "figure" else folder
        try:
            ran = subprocess.run(
                [sys.executable, str(file)], cwd=place, env=env, capture_output=True, encoding="utf-8",
                errors="replace", timeout=SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [fault for fault in pool.map(run_alone, runnable) if fault]
    for fault in failed:
        print(fault)
    print(f"{len(runnable)} fences run alone: {len(runnable) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0
