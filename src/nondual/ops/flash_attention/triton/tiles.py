"""The tiles of flash attention's kernels by kernel, head width, chip and dtype, and how decoding splits the keys.

Symbols as in `nondual.ops.flash_attention.triton`.
"""

import torch
import triton
from torch import Tensor

from nondual.ops.flash_attention.triton.primitives import INTERPRETED
from nondual.ops.kernels import block_size, multiprocessors

TILES = {  # BLOCK_Q, BLOCK_KV, num_warps, num_stages for heads up to 64, 128 and 256 wide
    "sm_80": {  # and every chip that is not listed: fits the 99 KiB of shared memory of consumer GPUs
        "forward": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        "forward, cut": ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 8, 2)),
        "decode, gates": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        "dq": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    "sm_90": {
        "forward": ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 2)),
        "forward, cut": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "dkdv": ((128, 64, 4, 2), (32, 64, 4, 3), (64, 32, 8, 1)),
        "dkdv, gates": ((64, 64, 4, 2), (32, 64, 8, 2), (64, 32, 8, 1)),
        "dq": ((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 1)),
    },
    "sm_100": {
        "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        "forward, cut": ((128, 64, 8, 3), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "dkdv": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 1)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 1)),
    },
    "gfx942": {
        "forward": ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        "forward, cut": ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
        "dkdv": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
        "dq": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "float32": {  # on every chip: on plain multipliers, since a tensor core would round to TF32
        "forward": ((64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
        "forward, cut": ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "decode": ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "dq": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}


def configuration(kernel: str, chip: str, d: int, dv: int, dtype: torch.dtype, gates: bool = False) -> dict[str, int]:
    """The tiles, warps and pipeline stages of a kernel.

    For "sm_90" from timings on an H100 at N = M = 4096 with causality; elsewhere from what compiles without a spill and
    keeps its tensor-core instructions in flight, as docs/measured/flash_attention_compile.json shows.

    Args:
        kernel: "forward", "decode", "delta", "dkdv" or "dq".
        chip: a key of TILES, as `nondual.ops.kernels.chip_of` gives it.
        d: D. A head that does not fill its power of two is cut by a mask, which costs the forward kernel registers.
        dv: Dv.
        dtype: of q.
        gates: whether there are forget gates, which cost registers and shared memory. Their tiles have not been timed.
    """
    if kernel == "delta":
        return {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 1}
    width = max(block_size(d), block_size(dv))
    lines = TILES["float32" if dtype == torch.float32 else chip]
    line = "forward, cut" if kernel == "forward" and (gates or not width == d == dv) else kernel
    line = f"{kernel}, gates" if gates and f"{kernel}, gates" in lines else line
    tiles = lines[line][(width > 64) + (width > 128)]
    if INTERPRETED:  # small tiles, so that tests with short sequences have many, whole and cut
        tiles = (32, 16, 4, 1)
    return dict(zip(("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"), tiles))


MOST_ROWS = 64  # queries of one key head that decoding holds in one tile
FEWEST_KEYS = 256  # in a part: fewer are not worth a program of their own
MOST_SPLITS = 128


def splits_of(q: Tensor, k: Tensor, window: int) -> int:
    """Into how many parts the keys are split; 0 where the plain kernel is used.

    The rule: decoding takes over where the N · H / G queries of a key head fit one tile of 64 and they see 512 keys or
    more. It splits the keys until there are two programs for each multiprocessor, into parts of at least 256 keys, and
    at most 128 parts.

    Args:
        q: (B, H, N, D).
        k: (B, G, M, D).
        window: how many keys a query sees, its own included; 0 where there is no window.
    """
    (b, _, n, _), (_, g, m, _) = q.shape, k.shape
    seen = min(m, window + n - 1) if window else m
    if n * (q.shape[1] // max(g, 1)) > MOST_ROWS or seen < 2 * FEWEST_KEYS:
        return 0
    programs = 2 * multiprocessors(q.device, otherwise=8)
    return max(1, min(MOST_SPLITS, triton.cdiv(programs, b * g), seen // FEWEST_KEYS))
