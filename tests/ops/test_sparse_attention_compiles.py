"""Every kernel of block-sparse attention in every line of its table of blocks, compiled for four chips without one.

In a process of its own, which does not interpret. The whole report is docs/measured's; here some of its lines are
compiled again for one chip, and all of it is held to the same demands.
"""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(600)  # the compilers of a dozen kernels, on a busy machine
ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs/measured/sparse_compile.json"
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes for a program


@pytest.fixture(scope="module")
def compiled(compiled_alone):
    return json.loads(compiled_alone("-m", "benchmarks.sparse_compile", "--json", "--brief", "--targets=sm_90"))


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
        assert (row["tensor"] > 0) == half, f"tensor cores in half precision alone, where they do not round: {where}"
        assert not row.get("tf32"), where
        if kernel == "forward":
            assert row["spills"] == 0, where
        elif "D111" not in name:
            assert row["spills"] < 10, where
        if half and chip in ("sm_90", "sm_80") and row["blocks"][3] > 1 and "D111" not in name:
            assert row["ahead"] > 0, f"nothing is loaded ahead: {where}"
        if "wgmma" in row:  # one wait for each product of tiles, not for each instruction of it
            assert row["serial"] <= 0.5, f"wgmma is serialised: {where}"
    return seen


@pytest.mark.parametrize("chip", SHARED)
def test_the_report_holds_for_every_chip_and_tile(report, chip):
    """Three kernels: three widths by two tiles; for one chip small tiles, a cut width and three widths in float32."""
    assert demand(report, chip) == 3 * (3 * 2 + (5 if chip == "sm_90" else 0))


def test_what_is_compiled_now_is_what_the_report_says(report, compiled):
    """A compiler's figures move by some registers from one version to the next."""
    assert demand(compiled, "sm_90") == 3 * 2
    for name, by_chip in compiled.items():
        for chip, row in by_chip.items():
            said = report[name][chip]
            assert said["blocks"] == row["blocks"], f"{name} on {chip}: python -m benchmarks sparse_compile"
            assert abs(said["registers"] - row["registers"]) <= 64, f"{name} on {chip}: {said}, now {row}"


LAUNCH = """
import harness
import torch
from nondual.ops.sparse_attention import BlockMask
from nondual.ops.sparse_attention.triton import launch
from nondual.ops.sparse_attention.triton.autograd import lists_of

harness.compile_instead_of_launching(lambda name, code: print(name, "wgmma.mma_async" in code["ptx"]))
launch.chip_of = lambda device: "sm_90"
for b, h, g, n, m, d, dv, gm in ((2, 4, 2, 37, 61, 64, 64, 2), (1, 1, 1, 1, 1, 1, 1, 1)):
    q, k, v = (torch.zeros(b, *x, dtype=torch.bfloat16) for x in ((h, n, d), (g, m, d), (g, m, dv)))
    mask = lists_of(BlockMask.from_mask(torch.ones(1, gm, n, m, dtype=torch.bool), 64))
    out, top, total = launch.launch_forward(q, k, v, mask, 0.5)
    launch.launch_backward(out, total, q, k, v, out, top, total, mask, 0.5)
"""


def test_what_the_launchers_hand_to_the_compiler_is_what_it_takes(compiled_alone):
    """The launchers as they are, up to the launch: arguments bound, specialised (sizes of 1 too) and compiled."""
    said = compiled_alone("-c", LAUNCH).split()
    assert said[::2] == 2 * [f"{x}_kernel" for x in ("forward", "delta", "dq", "dkdv")]
    assert [tensor == "True" for tensor in said[1:8:2]] == [True, False, True, True]


@pytest.mark.parametrize("chip", SHARED)
def test_blocks_divide_the_tiles_of_any_mask(chip):
    from nondual.ops.sparse_attention.triton import configuration

    for kernel in ("forward", "dkdv", "dq"):
        for tile in ((16, 16), (16, 128), (48, 32), (96, 80), (64, 64), (256, 512)):
            for d in (16, 64, 128, 256):
                for dtype in (torch.bfloat16, torch.float32):
                    found = configuration(kernel, chip, d, d, dtype, *tile)
                    for block, size in zip((found["BLOCK_Q"], found["BLOCK_KV"]), tile):
                        assert block >= 16 and size % block == 0 and block & (block - 1) == 0
