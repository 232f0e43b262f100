"""One runner for the benchmarks that compile every kernel for chips that need not be here.

It needs no GPU, and some minutes. With --json it prints the figures and writes no file; --brief has each benchmark
take fewer cases; --targets=sm_90,sm_100 takes some chips.

A compiler makes the same of the same kernel each time. With --known=FILE what FILE has is not compiled again, but for a
sample, whose rows must be those of FILE; a kernel that is not as it was, or another Triton, has other keys and is
compiled. With --keep FILE is written too. The tests keep theirs in tests/ops/compiled:

    python -m benchmarks.ssd_compile --brief --known=tests/ops/compiled/ssd_compile.json --keep
"""

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record

SAMPLE = 8  # of 256 known rows, so many are compiled again all the same


class Case(NamedTuple):
    """A kernel in one configuration."""

    name: str
    kernel: Any
    types: dict[str, str]
    """Triton's type of each argument that is not a constant."""
    constants: dict
    warps: int
    stages: int


def main(
    stem: str,
    cases: Callable[[str, bool], Iterator[Case]],
    configuration: Callable[[Case], dict],
    options: list[str],
    *,
    targets: tuple[str, ...],
    report: Callable[[Case, Any], dict] | None = None,
) -> None:
    """Write docs/measured/STEM.json, or print its figures.

    Args:
        stem: the name of the benchmark, and of the file.
        cases: (chip, whether --brief was given) -> the cases of that chip.
        configuration: what a row says of a case's tiles, warps and stages.
        options: from the command line.
        targets: the chips, where the command line names none.
        report: (case, compiled kernel) -> what a row says of it; `aot.report` of the kernel where left out.
    """
    if os.environ.pop("TRITON_INTERPRET", "0") != "0" and "triton" in sys.modules:
        sys.exit("unset TRITON_INTERPRET: a kernel made for the interpreter cannot be compiled")
    from benchmarks import aot  # after TRITON_INTERPRET is unset, since it imports triton

    chosen = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    file = Path(chosen["known"]) if "known" in chosen else None
    known = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    said_by = Path(inspect.getfile(cases)).read_bytes()  # `report` is in the benchmark's file
    keep: dict = {}
    found: dict = {}
    for target in chosen["targets"].split(",") if "targets" in chosen else targets:
        for case in cases(target, "--brief" in options):
            row = configuration(case)
            key = hashlib.sha256(aot.key_of(target, *case[1:]).encode() + said_by).hexdigest()[:16] if file else ""
            facts = known.get(key)
            if facts is None or int(key[:2], 16) < SAMPLE:
                try:
                    compiled = aot.compile_for(target, *case[1:])
                    now = report(case, compiled) if report else aot.report(compiled)
                    if facts not in (None, now):
                        row["error"] = f"{file} has {facts}, and the compiler now says {now}"
                    facts = now
                except Exception as error:  # a compiler's error has no type of its own; the tests refuse any
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
            if facts is not None:
                keep[key] = facts
                row |= facts
            found.setdefault(case.name, {})[target] = row
            print(target, case.name, row, file=sys.stderr, flush=True)
    if file and "--keep" in options:
        file.parent.mkdir(exist_ok=True)
        rows = [f"{json.dumps(key)}: {json.dumps(keep[key])}" for key in sorted(keep)]
        file.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    if "--json" in options or file:
        print(json.dumps(found))
        return
    import triton

    record.write(stem, f"nox -s bench -- {stem}", found, triton=triton.__version__)
