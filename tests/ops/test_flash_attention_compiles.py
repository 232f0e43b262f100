"""Every flash attention kernel, in every line of its table of tiles, compiled for four chips without one of them.

In a process of its own, which does not interpret. The whole report, with every mask, is docs/measured's; here each line
of the table is compiled once, with the mask that asks most, and the report is held to the same demands.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs/measured/flash_attention_compile.json"
CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SHARED = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # sm_80's also serve sm_86, 89


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "benchmarks.flash_attention_compile", "--json", "--brief"]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())["figures"]


def demand(figures, chip):
    """What every kernel owes to a chip."""
    seen = 0
    for name, by_chip in figures.items():
        row = by_chip.get(chip)
        if row is None:
            continue
        seen += 1
        where = f"{name} on {chip}: {row}"
        assert "error" not in row, where
        assert row["shared"] <= SHARED[chip], where
        kernel, half = name.split()[0], "fp32" not in name
        if half and kernel in ("forward", "decode", "dkdv", "dq"):
            assert row["tensor"] > 0, f"no tensor cores: {where}"
        if kernel in ("forward", "decode", "delta", "combine"):
            assert row["spills"] == 0, where
            assert row.get("stack", 0) == 0, where
        if "wgmma" in row:  # one wait for each product of tiles, not for each instruction of it
            assert row["serial"] <= 0.5, f"wgmma is serialised: {where}"
        if chip == "sm_90" and kernel == "forward" and half:
            assert row["wgmma"] > 0, where
    return seen


@pytest.mark.parametrize("chip", CHIPS)
def test_every_line_of_the_table_compiles_well(compiled, chip):
    assert demand(compiled, chip) == (4 * 3 + 3 + 3 + 1) + (4 * 3 if chip == "sm_90" else 0)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_report_holds_for_every_mask_and_head(report, chip):
    assert demand(report, chip) == 4 * (3 * 3 + 4 + 1 + 3) + 3 + 3 + 1


def test_the_report_is_of_these_kernels(report, compiled):
    """The report's tiles are the table's, and what is compiled now is near what it says: a compiler's figures move."""
    for name, by_chip in compiled.items():
        for chip, row in by_chip.items():
            said = report[name][chip]
            assert said["tiles"] == row["tiles"], f"{name} on {chip}: python -m benchmarks flash_attention_compile"
            assert abs(said["registers"] - row["registers"]) <= 64, f"{name} on {chip}: {said}, now {row}"
