"""The blocks of the kernels of block-sparse attention: flash attention's tiles, cut so that they divide the mask's.

Symbols as in `nondual.ops.sparse_attention.triton`.
"""

import torch

from nondual.ops.flash_attention.triton.tiles import configuration as tiles_of_flash_attention

SMALLEST = 16  # the fewest rows or columns of a tile: what `tl.dot` takes


def divisor(size: int, most: int) -> int:
    """The largest power of two that divides `size` and is at most `most`, which is one."""
    return min(size & -size, most)


def configuration(
    kernel: str, chip: str, d: int, dv: int, dtype: torch.dtype, tile_q: int, tile_kv: int
) -> dict[str, int]:
    """The blocks, warps and pipeline stages of a kernel.

    Args:
        kernel: "forward", "delta", "dkdv" or "dq".
        chip: as `nondual.ops.kernels.chip_of` gives it.
        d: D.
        dv: Dv.
        dtype: of q.
        tile_q: rows of a tile of the mask, a multiple of 16.
        tile_kv: its columns, a multiple of 16.
    """
    config = tiles_of_flash_attention(kernel, chip, d, dv, dtype)
    if kernel == "delta":
        return config
    block_q, block_kv = divisor(tile_q, config["BLOCK_Q"]), divisor(tile_kv, config["BLOCK_KV"])
    if block_q * block_kv < config["BLOCK_Q"] * config["BLOCK_KV"]:
        config["num_warps"] = 4
    return config | {"BLOCK_Q": block_q, "BLOCK_KV": block_kv}
