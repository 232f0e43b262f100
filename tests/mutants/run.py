"""Plant one fault at a time in a copy of the tree, and see whether the tests that should catch it do.

`nox -s mutants` plants every fault of faults.toml beside this file; `nox -s mutants -- flash_attention` those whose
file or kind has the word; `nox -s mutants -- 7 12` those of these numbers. Each is one line of the library, changed as
a person might change it. The working tree is never touched: tests run in copies of it, in processes that a time limit
ends. Before any fault is planted, its tests are run once without it: they must pass. --sound takes that for granted.

Prints, for each fault, what caught it; at the end the faults that nothing caught. Status 1 if there are any.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
LIMIT = 900  # seconds for the tests of one fault
COPIES = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Fault:
    """One line of a file, and what takes its place.

    Attributes:
        number: its place in faults.toml, from 1.
        kind: what sort of fault it is.
        file: under src/nondual.
        was: the line, without its indentation.
        instead: the line in its place, likewise.
        after: where the line stands more than once: a line before it that stands once. The next one after is meant.
        tests: what pytest is given.
    """

    number: int
    kind: str
    file: str
    was: str
    instead: str
    tests: tuple[str, ...]
    after: str = ""

    def planted(self, source: str) -> str:
        """The file with the fault.

        Raises:
            ValueError: the line is not there once (after `after`, at all).
        """
        lines = source.splitlines(keepends=True)
        start = 0
        if self.after:
            marks = [i for i, line in enumerate(lines) if line.strip() == self.after]
            if len(marks) != 1:
                raise ValueError(
                    f"fault {self.number}: {self.after!r} stands {len(marks)} times in {self.file}, not once"
                )
            start = marks[0]
        places = [i for i, line in enumerate(lines) if i >= start and line.strip() == self.was]
        if len(places) != 1 and not (places and self.after):
            raise ValueError(f"fault {self.number}: {self.was!r} stands {len(places)} times in {self.file}, not once")
        line = lines[places[0]]
        lines[places[0]] = line.replace(self.was, self.instead)
        return "".join(lines)


def faults() -> list[Fault]:
    """All that faults.toml lists."""
    listed = tomllib.loads((Path(__file__).parent / "faults.toml").read_text(encoding="utf-8"))["fault"]
    return [Fault(number=i, **(one | {"tests": tuple(one["tests"])})) for i, one in enumerate(listed, 1)]


def chosen(words: list[str]) -> list[Fault]:
    """Those of these numbers, or whose file or kind has one of these words; all where nothing is said."""
    return [
        x for x in faults() if not words or str(x.number) in words
        or any(not w.isdigit() and (w in x.file or w in x.kind) for w in words)
    ]  # fmt: skip


def copy_tree(to: Path) -> None:
    """What git knows of the tree, and what is new in it; the site's pages are left out."""
    said = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    for name in said.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file() and not name.startswith(("docs/assets", "overrides")):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)


def tested(tree: Path, tests: tuple[str, ...]) -> str:
    """What fails first, "" where nothing does."""
    env = os.environ | {"PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    process = subprocess.Popen(
        command, cwd=tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        return f"the time limit of {LIMIT} s"
    if process.returncode == 0:
        return ""
    if process.returncode != 1:  # no test failed: nothing was collected, or a file could not be imported
        lines = [line for line in said.splitlines() if line.startswith(("E ", "ERROR"))]
        return (
            f"pytest's status {process.returncode}: {(lines or said.splitlines()[-1:] or ['nothing said'])[0].strip()}"
        )
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else said.strip().splitlines()[-1]


def main(words: list[str]) -> int:
    """Plant the chosen faults; the exit status."""
    sound = "--sound" in words
    words = [word for word in words if word != "--sound"]
    todo, free, survived = chosen(words), SimpleQueue(), []
    if not todo:
        print(f"no fault's number, file or kind is among {words}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for i in range(COPIES):
            copy_tree(Path(folder) / str(i))
            free.put(Path(folder) / str(i))

        def with_a_tree(run):
            def use(x):
                tree = free.get()
                try:
                    return run(tree, x)
                finally:
                    free.put(tree)

            return use

        def plant(tree: Path, fault: Fault) -> str:
            target = tree / "src/nondual" / fault.file
            source = target.read_text(encoding="utf-8")
            try:
                target.write_text(fault.planted(source), encoding="utf-8")
                return tested(tree, fault.tests)
            finally:
                target.write_text(source, encoding="utf-8")

        with ThreadPoolExecutor(COPIES) as pool:
            sets = [] if sound else sorted({fault.tests for fault in todo})
            for tests, failed in zip(sets, pool.map(with_a_tree(tested), sets)):
                if failed:
                    print(f"without any fault: {' '.join(tests)}: {failed}", flush=True)
                    survived += [fault for fault in todo if fault.tests == tests]
            ready = [fault for fault in todo if fault not in survived]
            for fault, failed in zip(ready, pool.map(with_a_tree(plant), ready)):
                where = f"{fault.number:3} {fault.kind}, {fault.file}: {fault.instead}"
                print(f"{where}\n    {'caught by ' + failed if failed else 'SURVIVED'}", flush=True)
                if not failed:
                    survived.append(fault)
    print(f"{len(todo) - len(survived)} of {len(todo)} faults are caught")
    for fault in survived:
        print(f"not caught: {fault.number} {fault.kind}, {fault.file}: {fault.was} -> {fault.instead}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
