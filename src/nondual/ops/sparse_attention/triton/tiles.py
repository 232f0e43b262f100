"""The blocks of the kernels of block-sparse attention: flash attention's tiles, cut so that they divide the mask's.

Symbols as in `nondual.ops.sparse_attention.triton`.
"""

import torch

from nondual.ops.flash_attention.triton.primitives import INTERPRETED
from nondual.ops.flash_attention.triton.tiles import configuration as tiles_of_flash_attention
from nondual.ops.kernels import block_size

# Used in place of flash attention's tile where that spills registers: BLOCK_Q, BLOCK_KV, num_warps, num_stages for
# heads up to 64, 128 and 256 wide. Chosen from what compiles with no spill or few, as
# docs/measured/sparse_compile.json shows; not timed on a GPU.
OWN: dict[tuple[str, str], tuple[tuple[int, int, int, int] | None, ...]] = {
    ("sm_80", "dq"): (None, None, (32, 32, 8, 2)),
    ("sm_90", "dkdv"): ((64, 64, 4, 2), (32, 64, 8, 3), (32, 32, 8, 1)),
    ("sm_90", "dq"): (None, None, (64, 64, 8, 2)),
    ("sm_100", "dkdv"): ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
    ("gfx942", "dkdv"): (None, None, (16, 32, 8, 1)),
    ("gfx942", "dq"): (None, None, (32, 16, 8, 1)),
    ("float32", "forward"): (None, (32, 16, 8, 2), None),
    ("float32", "dq"): (None, None, (16, 16, 8, 2)),
}


def divisor(size: int, most: int) -> int:
    """The largest power of two that divides `size` and is at most `most`, which is one."""
    return min(size & -size, most)


def configuration(
    kernel: str, chip: str, d: int, dv: int, dtype: torch.dtype, tile_q: int, tile_kv: int
) -> dict[str, int]:
    """The blocks, warps and pipeline stages of a kernel.

    Args:
        kernel: "forward", "dkdv" or "dq".
        chip: as `nondual.ops.kernels.chip_of` gives it.
        d: D.
        dv: Dv.
        dtype: of q.
        tile_q: rows of a tile of the mask, a multiple of 16.
        tile_kv: its columns, a multiple of 16.
    """
    config = tiles_of_flash_attention(kernel, chip, d, dv, dtype)
    width = max(block_size(d), block_size(dv))
    line = "forward, cut" if kernel == "forward" and not width == d == dv else kernel
    own = OWN.get(("float32" if dtype == torch.float32 else chip, line), (None, None, None))
    if (mine := own[(width > 64) + (width > 128)]) and not INTERPRETED:
        config = dict(zip(("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"), mine))
    block_q, block_kv = divisor(tile_q, config["BLOCK_Q"]), divisor(tile_kv, config["BLOCK_KV"])
    if block_q * block_kv < config["BLOCK_Q"] * config["BLOCK_KV"]:
        wide = width > (128 if kernel == "forward" else 64) and min(block_q, block_kv) >= 64
        config["num_warps"] = 8 if wide else 4
    return config | {"BLOCK_Q": block_q, "BLOCK_KV": block_kv}
