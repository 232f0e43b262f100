"""Every kernel of state space duality, in every line of its table of tiles, compiled for three chips without one.

In a process of its own, which does not interpret. The whole report is docs/measured's; here each line of the table is
compiled once, and the report is held to the same demands.
"""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # the compilers of a hundred kernels, on a busy machine
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs/measured/ssd_compile.json"
KNOWN = "--known=tests/ops/compiled/ssd_compile.json"  # what is not compiled again: benchmarks/compiled.py
CHIPS = ["sm_80", "sm_90", "sm_100"]
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # sm_80's also serve sm_86, 89
KERNELS = {"steps", "states", "states_back", "pass", "output", "pass_back", "rows", "columns", "steps_back"}
FORWARD = {"steps", "states", "pass", "output"}


@pytest.fixture(scope="module")
def compiled(compiled_alone):
    return json.loads(compiled_alone("-m", "benchmarks.ssd_compile", "--brief", KNOWN))


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())["figures"]


LAUNCH = """
import harness
import torch
from nondual.ops.ssd.triton import launch

harness.compile_instead_of_launching(lambda name, code: print(name, "wgmma.mma_async" in code["ptx"]))
launch.chip_of = lambda device: "sm_90"
for b, length, h, p, g, n, given in ((2, 37, 4, 64, 2, 128, True), (1, 1, 1, 1, 1, 1, False)):
    x, z = (torch.zeros(b, length, h, p, dtype=torch.bfloat16) for _ in range(2))
    B, C = (torch.zeros(b, length, g, n, dtype=torch.bfloat16) for _ in range(2))
    A, D, bias, state = torch.zeros(h), torch.zeros(h, p), torch.zeros(h), torch.zeros(b, h, p, n)
    reset = torch.zeros(b, length, dtype=torch.bool)
    rest = (D, z, bias, state, reset) if given else (None,) * 5
    arguments = x, x[..., 0], A, B, C, *rest, given, 256
    torch.ops.nondual.ssd(*arguments)
    torch.ops.nondual.ssd_backward(x, state, *arguments)
"""


def test_what_the_launchers_hand_to_the_compiler_is_what_it_takes(compiled_alone):
    """The launchers as they are, up to the launch: arguments bound, specialised (sizes of 1 too) and compiled."""
    said = compiled_alone("-c", LAUNCH).split()
    again = ["steps", "states", "pass", "states", "pass_back", "rows", "columns", "steps_back"]
    assert said[::2] == 2 * [f"{name}_kernel" for name in ["steps", "states", "pass", "output", *again]]
    assert {name for name, tensor in zip(said[::2], said[1::2]) if tensor == "True"} == {
        "states_kernel",
        "output_kernel",
        "rows_kernel",
        "columns_kernel",
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
        if half and kernel in ("states", "states_back", "output", "rows", "columns"):
            assert row["tensor"] > 0, f"no tensor cores: {where}"
        plain_products = "fp32" in name and "N256" in name  # long sums on plain multipliers do spill
        timed = chip == "sm_90" and kernel in ("rows", "columns")  # twice as fast as tiles that do not spill
        if (kernel in FORWARD and not plain_products) or (name.endswith("bf16 bare") and not timed):
            assert row["spills"] == 0 and row["stack"] == 0, where
        if "wgmma" in row:  # one wait for each product of tiles, not for each instruction of it
            assert row["serial"] <= 0.5, f"wgmma is serialised: {where}"
        if chip == "sm_90" and kernel in ("states", "states_back", "output") and half:
            assert row["wgmma"] > 0, where
    return seen


@pytest.mark.parametrize("chip", CHIPS)
def test_every_line_of_the_table_compiles_well(compiled, chip):
    products = 4 * 2 * (2 if chip == "sm_90" else 1)  # at two sizes in float16, and for this chip in float32
    assert demand(compiled, chip) == len(KERNELS) * 2 + products


def test_float32_is_multiplied_in_float32(compiled):
    """On plain multipliers: the tensor cores would round to tf32."""
    rows = [row["sm_90"] for name, row in compiled.items() if "fp32" in name]
    assert len(rows) == 8 and not any(row["tf32"] or row["tensor"] for row in rows)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_report_holds_for_every_size(report, chip):
    assert {name.split()[0] for name in report} == KERNELS
    assert demand(report, chip) == len(KERNELS) * (5 + 2 + 5 + 3)  # sizes in bfloat16, float16, float32, bare


def test_the_report_is_of_these_kernels(report, compiled):
    """The report's tiles are the table's, and what is compiled now is near what it says: a compiler's figures move."""
    for name, by_chip in compiled.items():
        for chip, row in by_chip.items():
            said = report[name][chip]
            assert said["tiles"] == row["tiles"], f"{name} on {chip}: python -m benchmarks ssd_compile"
            assert abs(said["registers"] - row["registers"]) <= 64, f"{name} on {chip}: {said}, now {row}"
