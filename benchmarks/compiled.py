"""One runner for the benchmarks that compile every kernel for chips that need not be here.

It needs no GPU, and some minutes. With --json it prints the figures and writes no file; --brief has each benchmark
take fewer cases; --targets=sm_90,sm_100 takes some chips.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks import record


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
    found: dict = {}
    for target in chosen["targets"].split(",") if "targets" in chosen else targets:
        for case in cases(target, "--brief" in options):
            row = configuration(case)
            try:
                compiled = aot.compile_for(target, *case[1:])
                row |= report(case, compiled) if report else aot.report(compiled)
            except Exception as error:  # a compiler's error has no type of its own; the tests refuse any
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            found.setdefault(case.name, {})[target] = row
            print(target, case.name, row, file=sys.stderr, flush=True)
    if "--json" in options:
        print(json.dumps(found))
        return
    import triton

    record.write(stem, f"nox -s bench -- {stem}", found, triton=triton.__version__)
