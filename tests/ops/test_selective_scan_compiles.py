"""The selective scan's kernels compiled for chips that are not here: registers, spills, and instructions counted.

In a process of its own, which does not interpret. The whole report is docs/measured's; here Mamba's own sizes are
compiled once more, and the report is held to the same demands. Figures move between compilers: demands are ranges.
"""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # the compilers of a hundred kernels, on a busy machine
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs/measured/selective_scan_compile.json"
KNOWN = "--known=tests/ops/compiled/selective_scan_compile.json"  # what is not compiled again: benchmarks/compiled.py
CHIPS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def compiled(compiled_alone):
    return json.loads(compiled_alone("-m", "benchmarks.selective_scan_compile", "--brief", "--targets=sm_90", KNOWN))


@pytest.fixture(scope="module")
def report():
    return json.loads(REPORT.read_text())["figures"]


LAUNCH = """
import torch
from harness import compile_instead_of_launching

compile_instead_of_launching(lambda kernel, code: print(kernel, bool(code["cubin"])))
from nondual.ops.selective_scan.triton import tiles
from nondual.ops.selective_scan.triton.launch import Launcher

for spans, length, d, n, groups in ((1, 65, 64, 16, 1), (2, 129, 3, 1, 0)):
    tiles.spans_of = lambda u, kernel: spans
    u = torch.zeros(2, length, d, dtype=torch.bfloat16)
    A, state = torch.zeros(d, n), torch.zeros(2, d, n)
    B = u.new_zeros(2, length, groups, n) if groups else A
    rest = (A[:, 0], u, A[:, 0], True, state, u[..., 0] > 0) if groups else (None, None, None, False, None, None)
    call = Launcher(u, u, A, B, B, *rest)
    y, last, *saved = call.forward(save=True)
    call.backward(y, last, *saved)
"""


def test_what_the_launchers_hand_to_the_compiler_is_what_it_takes(compiled_alone):
    """The launchers as they are, up to the launch: arguments bound, specialised (sizes of 1 too) and compiled."""
    said = compiled_alone("-c", LAUNCH).split()
    one, two = ("forward", "backward"), ("forward", "pass", "forward", "adjoint", "pass", "backward")
    assert said[::2] == [f"{name}_kernel" for name in (*one, *two)] and set(said[1::2]) == {"True"}


def instructions(row: dict, chunk: int = 64) -> float:
    """For an element, over the kernel's loops: the backward computes a chunk's last STEPS steps again once only."""
    first, *rest = row["per_element"]
    return first * (1 - row["steps"] / chunk) + rest[0] if rest else first


def demand(figures: dict, chip: str) -> int:
    """What every kernel owes to a chip."""
    seen = 0
    for name, by_chip in figures.items():
        row = by_chip.get(chip)
        if row is None:
            continue
        seen += 1
        where = f"{name} on {chip}: {row}"
        assert "error" not in row, where
        assert row["shared"] <= 48 << 10, where
        if name.startswith("forward") and chip != "gfx942":
            assert row["spills"] == 0 and row["stack"] == 0, where
        if name.startswith(("forward N16", "backward N16")) and chip != "gfx942" and "resets" not in name:
            goal = 15 if name.startswith("forward") else 32.5  # mamba-ssm's own issue 19.1 and 65.6 on sm_90
            assert goal / 2 < instructions(row) < goal, where
        if name.startswith("forward N16") and chip.startswith("sm_") and "constant" not in name:
            # What the next group brings lies in registers: with 78 of them every load stood where it is used, and the
            # kernel was several times slower.
            assert row["registers"] >= 160, where
    return seen


def test_the_kernels_compile_well(compiled):
    assert demand(compiled, "sm_90") == 5


def test_mambas_own_size_is_within_the_goals(compiled):
    """On sm_90, with all that may be given: 13.5 instructions for an element forward, 32 backward."""
    assert instructions(compiled["forward N16 bf16"]["sm_90"]) <= 13.5
    assert instructions(compiled["backward N16 bf16"]["sm_90"]) <= 32


def test_the_barriers_around_scratch_are_in_the_machines_code(compiled):
    """Two in the backward, whose threads read what others wrote; `test_intervals.py` has where they stand."""
    asked, left = compiled["backward N16 bf16"]["sm_90"]["barriers"]
    assert asked == 2 <= left
    assert not any(row["sm_90"]["tf32"] for row in compiled.values())


@pytest.mark.parametrize("chip", CHIPS)
def test_the_report_holds_for_every_case(report, chip):
    assert demand(report, chip) == 2 * 14 + 2 * 5 + 1


def test_the_report_is_of_these_kernels(report, compiled):
    """What is compiled now is near what the report says: a compiler's figures move."""
    for name, by_chip in compiled.items():
        said, row = report[name]["sm_90"], by_chip["sm_90"]
        assert (said["warps"], said["steps"]) == (row["warps"], row["steps"]), name
        assert abs(said["registers"] - row["registers"]) <= 64, f"{name}: {said}, now {row}"
