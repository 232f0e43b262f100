"""The list of faults that `nox -s mutants` plants fits the tree as it is."""

import ast
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("mutants_run", Path(__file__).with_name("run.py"))
run = sys.modules["mutants_run"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
FAULTS = run.faults()


def test_there_are_enough_of_every_sort():
    assert len(FAULTS) >= 60
    assert len(Counter(fault.kind for fault in FAULTS)) >= 15
    assert len({fault.file for fault in FAULTS}) >= 15


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.number}-{Path(fault.file).name}")
def test_a_fault_can_be_planted(fault):
    """Its line is there once, the line in its place is another, and the file can still be read."""
    source = (ROOT / "src/nondual" / fault.file).read_text(encoding="utf-8")
    planted = fault.planted(source)
    changed = [pair for pair in zip(source.splitlines(), planted.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [[x.strip() for x in pair] for pair in changed] == [[fault.was, fault.instead]]
    if fault.file.endswith(".py"):
        ast.parse(planted)
    for test in fault.tests:
        file = test.split("::")[0]
        assert not file.startswith("tests/") or (ROOT / file).exists(), f"{file} is not there"


def test_a_line_that_is_not_there_once_is_named():
    fault = run.Fault(3, "kind", "x.py", "a = 1", "a = 2", ("tests",))
    assert fault.planted("  a = 1\nb\n") == "  a = 2\nb\n"
    with pytest.raises(ValueError, match=r"fault 3: 'a = 1' stands 2 times in x.py, not once"):
        fault.planted("a = 1\na = 1\n")
    with pytest.raises(ValueError, match="stands 0 times"):
        fault.planted("a = 2\n")
    after = run.Fault(4, "kind", "x.py", "a = 1", "a = 2", ("tests",), after="def f():")
    assert after.planted("a = 1\ndef f():\n    a = 1\n    a = 1\n") == "a = 1\ndef f():\n    a = 2\n    a = 1\n"
