"""The sizes of the kernels' blocks, the steps of a chunk, and into how many spans time is cut."""

import triton
from torch import Tensor

from nondual.ops.kernels import multiprocessors
from nondual.ops.selective_scan.triton.primitives import INTERPRETED

CHUNK = 8 if INTERPRETED else 64  # steps between two checkpoints, which are N/64 float32 numbers for each number of u
FULL = {"forward": 60, "backward": 192}  # channels for each multiprocessor from which on one level is faster
SPANNED = {"forward": 192, "backward": 384}  # and how many, counted in each span, two levels should have
TILES = {  # of the backward kernel, by N up to a power of two: D_LO, N_HI, D_HI, N_LO, STEPS, num_warps
    1: (4, 1, 32, 1, 2, 1),
    2: (4, 1, 32, 2, 2, 1),
    4: (4, 1, 32, 4, 2, 1),
    8: (4, 2, 16, 4, 2, 1),
    16: (4, 4, 8, 4, 4, 1),
    32: (8, 8, 4, 4, 2, 1),
    64: (4, 16, 8, 4, 2, 4),
    128: (4, 32, 8, 4, 2, 8),
    256: (2, 64, 8, 4, 2, 8),
}

FORWARD = {  # of the forward kernel, likewise: N_HI, BLOCK_D, N_LO, STEPS, num_warps
    1: (1, 32, 1, 8, 1),
    2: (1, 32, 2, 8, 1),
    4: (1, 32, 4, 8, 1),
    8: (2, 16, 4, 4, 1),
    16: (4, 16, 4, 8, 1),
    32: (8, 16, 4, 4, 1),
    64: (16, 16, 4, 2, 1),
    128: (32, 4, 4, 2, 1),
    256: (64, 2, 4, 2, 1),
}


def configuration(kernel: str, states: int) -> dict[str, int]:
    """The blocks, warps and unrolling of a kernel.

    Forward from timings on an H100 at 16 and 64 states; the rest from what compiles in few instructions and without a
    spill, as docs/measured/selective_scan_compile.json shows. Forward, a channel's states are shared by 32 / BLOCK_D
    threads, and each holds the numbers of 2 · STEPS steps: those it works on and those it has asked for.

    Args:
        kernel: "forward", "adjoint" or "backward".
        states: N.
    """
    block_n = triton.next_power_of_2(states)
    if kernel == "backward":
        config = dict(zip(("D_LO", "N_HI", "D_HI", "N_LO", "STEPS", "num_warps"), TILES[block_n]))
    elif kernel == "forward":
        config = dict(zip(("N_HI", "BLOCK_D", "N_LO", "STEPS", "num_warps"), FORWARD[block_n]))
    else:
        warps = 1 if block_n <= 16 else 2 if block_n <= 64 else 4
        config = {"BLOCK_D": min(32 * warps, 8192 // block_n), "BLOCK_N": block_n}
        config |= {"STEPS": 8 if block_n == 16 else 4, "num_warps": warps}
    if INTERPRETED:  # so that tests with short sequences have several groups of steps, and some steps left over
        config["STEPS"] = 2
    return config | {"num_stages": 1}


def spans_of(u: Tensor, kernel: str) -> int:
    """Into how many spans time is cut for the "forward" or the "backward" kernel; 1 where one level is enough.

    The rule: two levels take over where there are fewer channels, B · D, than FULL for each multiprocessor: on an H100
    7,920 forward and 25,344 backward. Time is then cut until there are SPANNED, into spans of at least two chunks; a
    sequence shorter than two such spans stays whole. The numbers are from timings on an H100. Forward, a step of two
    levels over 8,192 channels took longer there than one of one level over 16,384 channels, and fewer channels cannot
    take longer.
    """
    batch, length, channels = u.shape
    chip = multiprocessors(u.device, otherwise=8)
    if batch * channels >= FULL[kernel] * chip:
        return 1
    return max(1, min(triton.cdiv(SPANNED[kernel] * chip, batch * channels), length // (2 * CHUNK)))
