"""What the kernels of block-sparse attention need besides flash attention's steps: a row's lists, and a tile's mask.

Symbols as in `nondual.ops.sparse_attention.triton`.
"""

import triton
import triton.language as tl

from nondual.ops.flash_attention.triton.primitives import INTERPRETED

__all__ = ["INTERPRETED", "load_mask", "spans"]


@triton.jit
def spans(p_start, p_part, i_line, i_list):
    """Where the tiles of one row (or column) of tiles stand in the list: its first, its first partial one, its end.

    p_start has one entry more than p_part for each of the masks: i_list says how many masks come before.
    """
    # --8<-- [start:spans]
    first = tl.load(p_start + i_line + i_list)
    part = tl.load(p_part + i_line)
    end = tl.load(p_start + i_line + i_list + 1)
    # --8<-- [end:spans]
    return first, part, end


@triton.jit
def load_mask(p_masks, i_mask, o_tile, SIZE: tl.constexpr):
    """The places o_tile of the tile mask i_mask, which has SIZE of them.

    All True for i_mask = -1: a whole tile that the last query or the last key cuts.
    """
    # --8<-- [start:load_mask]
    p_tile = p_masks + i_mask.to(tl.int64) * SIZE
    return tl.load(p_tile + o_tile, mask=i_mask >= 0, other=1) != 0
    # --8<-- [end:load_mask]
