"""Every flash attention kernel, in every line of its table of tiles, compiled for four chips without one of them.

In a process of its own, which does not interpret. The whole report, with every mask, is docs/measured's; here each line
of the table is compiled once, with one mask, and the report is held to the same demands.
"""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # the compilers of a hundred kernels, on a busy machine
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs/measured/flash_attention_compile.json"
KNOWN = "--known=tests/ops/compiled/flash_attention_compile.json"  # what is not compiled again: benchmarks/compiled.py
CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]
SHARED = {
    "sm_80": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # sm_80's also serve sm_86, 89


@pytest.fixture(scope="module")
def compiled(compiled_alone):
    return json.loads(compiled_alone("-m", "benchmarks.flash_attention_compile", "--brief", KNOWN))


def with_gates(figures, yes):
    """The kernels with forget gates, or those without."""
    return {name: by_chip for name, by_chip in figures.items() if name.endswith(", gates") == yes}


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())["figures"]


LAUNCH = """
import harness
import torch
from nondual.ops.flash_attention.forget import sums_of
from nondual.ops.flash_attention.triton import launch as flash

harness.compile_instead_of_launching(lambda name, code: print(name, "wgmma.mma_async" in code["ptx"]))
flash.chip_of = lambda device: "sm_90"
for b, h, g, n, m, d, dv, gates in ((2, 4, 2, 37, 61, 64, 64, 0), (1, 1, 1, 1, 1, 1, 1, 0), (1, 1, 1, 1, 1, 1, 1, 1)):
    forget = sums_of(torch.zeros(b, h, m)) if gates else None
    q, k, v = (torch.zeros(b, *x, dtype=torch.bfloat16) for x in ((h, n, d), (g, m, d), (g, m, dv)))
    out, top, total = flash.launch_forward(q, k, v, True, 3, 0.5, forget)
    flash.launch_backward(out, total, q, k, v, out, top, total, True, 3, 0.5, forget)
    flash.launch_decode(q[:, :, :1], k, v, True, 3, 0.5, 2, forget)
"""


def test_what_the_launchers_hand_to_the_compiler_is_what_it_takes(compiled_alone):
    """The launchers as they are, up to the launch: arguments bound, specialised (sizes of 1 too) and compiled; and
    with forget gates."""
    said = compiled_alone("-c", LAUNCH).split()
    assert said[::2] == 3 * [f"{x}_kernel" for x in ("forward", "delta", "dq", "dkdv", "decode", "combine")]
    assert {name for name, tensor in zip(said[::2], said[1::2]) if tensor == "True"} == {
        "forward_kernel",
        "dq_kernel",
        "dkdv_kernel",
    }


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
    assert demand(with_gates(compiled, False), chip) == (4 * 3 + 3 + 3 + 2) + (4 if chip == "sm_90" else 0)


@pytest.mark.parametrize("chip", CHIPS[:2])
def test_forget_gates_compile_as_well(compiled, chip):
    assert demand(with_gates(compiled, True), chip) == 4 * 2


def test_float32_is_multiplied_in_float32(compiled):
    """On plain multipliers: the tensor cores would round to tf32."""
    rows = [row["sm_90"] for name, row in compiled.items() if "fp32" in name]
    assert len(rows) == 4 and not any(row["tf32"] or row["tensor"] for row in rows)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_report_holds_for_every_mask_and_head(report, chip):
    assert demand(report, chip) == 4 * (3 * 3 + 4 + 1 + 3) + 3 + 3 + 2


def test_the_report_is_of_these_kernels(report, compiled):
    """The report's tiles are the table's, and what is compiled now is near what it says: a compiler's figures move."""
    for name, by_chip in with_gates(compiled, False).items():  # the report is older than gates
        for chip, row in by_chip.items():
            said = report[name][chip]
            assert said["tiles"] == row["tiles"], f"{name} on {chip}: python -m benchmarks flash_attention_compile"
            assert abs(said["registers"] - row["registers"]) <= 64, f"{name} on {chip}: {said}, now {row}"
