"""The sizes of the kernels' tiles by kernel, chip and dtype, and how heads are shared out to programs."""

import torch
import triton

from nondual.ops.kernels import block_size, multiprocessors
from nondual.ops.ssd.triton.primitives import INTERPRETED

CHUNK = {"half": 256, "float32": 64}  # float32 runs on plain multipliers: less to multiply within a chunk
TILES = {  # BLOCK, num_warps, num_stages for N up to 128 and up to 256; rows and columns have the same BLOCK
    "sm_80": {  # and every chip not listed; fits the 99 KiB of shared memory of consumer GPUs
        "states": ((32, 8, 2), (32, 8, 2)),
        "output": ((64, 4, 2), (64, 4, 2)),
        "rows": ((32, 8, 1), (16, 8, 1)),
        "columns": ((32, 8, 1), (16, 8, 1)),
    },
    "sm_90": {
        "states": ((32, 4, 3), (64, 8, 2)),
        "output": ((64, 4, 3), (64, 8, 2)),
        "rows": ((64, 4, 1), (32, 8, 1)),
        "columns": ((64, 4, 1), (32, 8, 1)),
    },
    "sm_100": {
        "states": ((64, 4, 2), (64, 4, 2)),
        "output": ((64, 4, 2), (64, 4, 2)),
        "rows": ((32, 8, 1), (32, 8, 1)),
        "columns": ((32, 8, 1), (32, 8, 1)),
    },
    "float32": {  # on every chip: plain multipliers, since a tensor core would round to TF32
        "states": ((16, 8, 1), (16, 8, 1)),
        "output": ((16, 8, 1), (16, 8, 1)),
        "rows": ((16, 8, 1), (16, 8, 1)),
        "columns": ((16, 8, 1), (16, 8, 1)),
    },
}
# How many numbers of a state a program may hold, for N up to 128 and up to 256; 8192 on every chip not listed.
STATE_NUMBERS = {"sm_90": (8192, 16384), "sm_100": (8192, 16384)}
PIECE = 1024  # numbers of a state that one program of pass and pass_back carries


def configuration(kernel: str, chip: str, p: int, n: int, dtype: torch.dtype, chunk: int) -> dict[str, int]:
    """The tiles, warps and pipeline stages of a kernel.

    For "sm_90" and N up to 128 from timings on an H100; elsewhere from what compiles with no spill forward and few
    backward, as docs/measured/ssd_compile.json shows.

    Args:
        kernel: "steps", "states", "pass", "output", "pass_back", "rows", "columns" or "steps_back".
        chip: as `nondual.ops.kernels.chip_of` names it; one that TILES does not have gets the tiles of "sm_80".
        p: P.
        n: N.
        dtype: of x.
        chunk: CHUNK.
    """
    if kernel in ("pass", "pass_back"):
        return {"CHUNK": chunk, "BLOCK": min(PIECE, block_size(p * n)), "num_warps": 4, "num_stages": 1}
    if kernel == "steps":
        return {"CHUNK": chunk, "BLOCK": 16, "num_warps": 4, "num_stages": 1}
    if kernel == "steps_back":
        block = configuration("rows", chip, p, n, dtype, chunk)["BLOCK"]
        return {"CHUNK": chunk, "BLOCK": block, "num_warps": 4, "num_stages": 1}
    tiles = TILES["float32"] if dtype == torch.float32 else TILES.get(chip, TILES["sm_80"])
    block, warps, stages = tiles[kernel][n > 128]
    if INTERPRETED:  # small tiles, so that tests with short sequences have many
        block = 16
    widest = 128 if kernel == "states" else 256
    return {
        "BLOCK_P": block_size(p),
        "BLOCK_N": min(block_size(n), widest),
        "CHUNK": chunk,
        "BLOCK": min(block, chunk),
        "num_warps": warps,
        "num_stages": stages,
    }


def chunk_of(dtype: torch.dtype) -> int:
    """Steps of a chunk, where the caller does not say."""
    if INTERPRETED:
        return 32
    return CHUNK["float32" if dtype == torch.float32 else "half"]


def parts_of(chip: str, p: int, n: int, dtype: torch.dtype) -> int:
    """Into how many heads of fewer channels a head is split, so that a program can hold its state: the channels of a
    head share A, Δ, B and C, and are independent otherwise."""
    room = STATE_NUMBERS.get("float32" if dtype == torch.float32 else chip, (8192, 8192))[n > 128]
    parts = 1
    while block_size(triton.cdiv(p, parts)) * block_size(n) > room:
        parts *= 2
    return parts


def heads_of_a_program(programs: int, share: int, device: torch.device) -> int:
    """How many heads of a group one program of rows or columns adds up in dC or dB.

    As few as make two programs for each multiprocessor: more heads in a program mean fewer parts of dB and dC, each of
    which is a whole copy of them in memory.

    Args:
        programs: how many there are with all heads of a group in one program.
        share: heads of a group.
        device: where the kernels run; one that is not CUDA counts as two multiprocessors.
    """
    splits = min(share, triton.cdiv(2 * multiprocessors(device, otherwise=2), max(1, programs)))
    return triton.cdiv(share, splits)
