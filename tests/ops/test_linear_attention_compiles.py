"""Every kernel of the delta rule, in every line of its table of tiles, compiled for four chips without one.

In a process of its own, which does not interpret. The whole report is docs/measured's; here each line of the table is
compiled once for one chip, and the report is held to the same demands for all.
"""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # the compiler's work on a busy machine
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs/measured/linear_compile.json"
KNOWN = "--known=tests/ops/compiled/linear_compile.json"  # what is not compiled again: benchmarks/compiled.py
SHARED = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # sm_80's also serve sm_86, 89
KERNELS = {"solve", "carry", "read", "written", "carry_back", "chunk_back"}


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())["figures"]


LAUNCH = """
import harness
import torch
from nondual.ops.linear_attention.triton import launch
from nondual.ops.ssd.triton import launch as launch_of_sum

harness.compile_instead_of_launching(lambda name, code: print(name, "wgmma.mma_async" in code["ptx"]))
launch.chip_of = launch_of_sum.chip_of = lambda device: "sm_90"
for b, n, h, d, v, given in ((2, 70, 4, 64, 64, True), (1, 1, 1, 1, 1, False)):
    q, k = (torch.zeros(b, n, h, d, dtype=torch.bfloat16) for _ in range(2))
    x, state = torch.zeros(b, n, h, v, dtype=torch.bfloat16), torch.zeros(b, h, d, v)
    log, beta, reset = torch.zeros(b, n, h), torch.zeros(b, h, n), torch.zeros(b, n, dtype=torch.bool)
    log, first, reset = (log, state, reset) if given else (None, None, None)
    operators = {"delta_rule": (log, beta, first, reset, 0.1, 64)}
    if given:
        operators["linear_attention"] = log, first, reset, 0.1, 64, False
    for name, arguments in operators.items():
        getattr(torch.ops.nondual, name)(q, k, x, *arguments)
        getattr(torch.ops.nondual, name + "_backward")(x, state, q, k, x, *arguments)
"""


def test_what_the_launchers_hand_to_the_compiler_is_what_it_takes(compiled_alone):
    """The launchers as they are, up to the launch: arguments bound, specialised (sizes of 1 too) and compiled."""
    said = compiled_alone("-c", LAUNCH).split()
    solved, back = ["solve", "carry"], ["written", "carry_back", "chunk_back"]
    summed = ["states", "pass", "states", "pass_back", "rows", "columns", "steps_back"]
    expected = [
        "steps",
        *solved,
        "read",
        "steps",
        *solved,
        *back,
        "steps",
        "states",
        "pass",
        "output",
        "steps",
        *summed,
    ]
    expected += [*solved, "read", *solved, *back]  # without decays nothing is summed
    assert said[::2] == [f"{name}_kernel" for name in expected]
    assert {f"{name}_kernel" for name in KERNELS} <= {
        name for name, tensor in zip(said[::2], said[1::2]) if tensor == "True"
    }


def demand(figures, chip):
    """Assert what every kernel must be on a chip, and return how many cases there were."""
    seen = 0
    for name, by_chip in figures.items():
        if chip not in by_chip:
            continue
        row, seen = by_chip[chip], seen + 1
        where = f"{name} on {chip}: {row}"
        assert "error" not in row, where
        assert row["shared"] <= SHARED[chip], where
        kernel, half = name.split()[0], "fp32" not in name
        if half:
            assert row["tensor"] > 0, f"no tensor cores: {where}"
        else:
            assert not row["tensor"] and not row.get("tf32"), f"not in float32: {where}"
        if half and (kernel != "chunk_back" or chip in ("sm_90", "sm_100")):
            assert row["spills"] == 0, where
        if "wgmma" in row:  # one wait for each product of tiles, not for each instruction of it
            assert row["serial"] <= 0.5, f"wgmma is serialised: {where}"
    return seen


def test_every_line_of_the_table_compiles_well(compiled_alone, report):
    compiled = json.loads(compiled_alone("-m", "benchmarks.linear_compile", "--brief", "--targets=sm_90", KNOWN))
    assert demand(compiled, "sm_90") == len(KERNELS) * (3 + 2)  # widths in bfloat16; one in the other dtypes
    for name, by_chip in compiled.items():  # what the report says is of these kernels; a compiler's figures move
        row, said = by_chip["sm_90"], report[name]["sm_90"]
        assert said["tiles"] == row["tiles"], f"{name}: python -m benchmarks linear_compile"
        assert abs(said["registers"] - row["registers"]) <= 64, f"{name}: {said}, now {row}"


@pytest.mark.parametrize("chip", list(SHARED))
def test_the_report_holds_for_every_size(report, chip):
    assert {name.split()[0] for name in report} == KERNELS
    assert demand(report, chip) == len(KERNELS) * (3 + (3 if chip == "sm_90" else 0))  # bare, float16 and float32
