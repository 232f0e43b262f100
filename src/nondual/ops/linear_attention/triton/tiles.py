"""The sizes of the delta rule's tiles by kernel, chip, dtype and width; those of the other forms are ssd's."""

import torch

from nondual.ops.kernels import block_size
from nondual.ops.ssd.triton.primitives import INTERPRETED
from nondual.ops.ssd.triton.tiles import chunk_of as chunk_of_sum

CHUNK = {"half": 64, "float32": 32}  # float32 runs on plain multipliers: less to multiply within a chunk
CHUNKS = (16, 32, 64)  # the inverse of a chunk's matrix is held on the chip
KERNELS = ("solve", "carry", "read", "written", "carry_back", "chunk_back")
# BLOCK_D, BLOCK_V, num_warps, num_stages for D and Dv up to 64, up to 128 and up to 256. carry and carry_back hold all
# of D, whatever BLOCK_D says.
TILES = {
    "sm_80": {  # and every chip not listed; fits the 99 KiB of shared memory of consumer GPUs
        "solve": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "carry": ((64, 32, 4, 2), (128, 32, 4, 2), (256, 16, 8, 1)),
        "read": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "written": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "carry_back": ((64, 32, 4, 1), (128, 32, 4, 1), (256, 16, 8, 1)),
        "chunk_back": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "sm_90": {
        "solve": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "carry": ((64, 32, 4, 3), (128, 32, 4, 2), (256, 16, 4, 2)),
        "read": ((64, 64, 4, 2), (64, 128, 4, 2), (64, 128, 4, 2)),
        "written": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "carry_back": ((64, 32, 4, 2), (128, 32, 4, 2), (256, 16, 4, 2)),
        "chunk_back": ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    },
    "sm_100": {
        "solve": ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
        "carry": ((64, 32, 4, 2), (128, 32, 4, 2), (256, 16, 4, 2)),
        "read": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "written": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
        "carry_back": ((64, 32, 4, 2), (128, 32, 4, 2), (256, 16, 4, 2)),
        "chunk_back": ((64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    },
    "gfx942": {  # 64 KiB of shared memory
        "solve": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        "carry": ((64, 32, 4, 1), (128, 32, 4, 1), (256, 16, 4, 1)),
        "read": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        "written": ((64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        "carry_back": ((64, 32, 4, 1), (128, 32, 4, 1), (256, 16, 4, 1)),
        "chunk_back": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
    "float32": {  # on every chip: plain multipliers, since a tensor core would round to TF32
        "solve": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "carry": ((64, 16, 4, 1), (128, 16, 8, 1), (256, 16, 16, 1)),
        "read": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "written": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        "carry_back": ((64, 16, 4, 1), (128, 16, 8, 1), (256, 16, 16, 1)),
        "chunk_back": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
}


def configuration(kernel: str, chip: str, d: int, v: int, dtype: torch.dtype, chunk: int) -> dict:
    """The tiles, warps and pipeline stages of a kernel of the delta rule.

    From what compiles with no spill forward and few backward, as docs/measured/linear_compile.json shows; not timed.

    Args:
        kernel: one of KERNELS.
        chip: as `nondual.ops.kernels.chip_of` names it; one that TILES does not have gets the tiles of "sm_80".
        d: D.
        v: Dv.
        dtype: of q.
        chunk: CHUNK.
    """
    tiles = TILES["float32"] if dtype == torch.float32 else TILES.get(chip, TILES["sm_80"])
    widest = max(block_size(d), block_size(v))
    block_d, block_v, warps, stages = tiles[kernel][(widest > 64) + (widest > 128)]
    if INTERPRETED:  # small tiles, so that tests with narrow heads have many
        block_d, block_v = 16, 16
    config = {
        "BLOCK_D": block_size(d) if kernel.startswith("carry") else min(block_d, block_size(d)),
        "BLOCK_V": min(block_v, block_size(v)),
        "CHUNK": chunk,
        "num_warps": warps,
        "num_stages": stages,
    }
    if kernel == "solve":  # for half precision: TF32 has float16's 11 bits, and the result is rounded to these anyway
        config["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
    return config


def chunk_of(dtype: torch.dtype, delta: bool, chunk: int | None) -> int:
    """Steps of a chunk.

    Args:
        dtype: of q.
        delta: whether this is the delta rule, whose chunks have 64 steps at most.
        chunk: what the caller asked for; None for our own.
    """
    if not delta:
        return chunk or chunk_of_sum(dtype)
    own = 32 if INTERPRETED else CHUNK["float32" if dtype == torch.float32 else "half"]
    return min(chunk or own, CHUNKS[-1])
