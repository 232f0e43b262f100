"""Attention of a block of queries over the tiles of keys that its row lists.

Source: Dao et al. 2022 (2205.14135), Algorithm 5. Symbols as in `nondual.ops.sparse_attention.triton`.
"""

import triton
import triton.language as tl

from nondual.ops.flash_attention.triton.primitives import load_tile, online_softmax_update, store_tile
from nondual.ops.sparse_attention.triton.primitives import load_mask, spans


@triton.jit
def attend_listed(
    b_acc, b_l, b_m, b_q, p_k, p_v, p_columns, p_kinds, p_masks, s_kn, s_vn, count, o_row, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries b_q over `count` listed tiles of keys, added to the sums so far.

    p_columns and p_kinds stand at the first of them; o_row are the queries' rows within their tile.
    """
    # --8<-- [start:attend_listed]
    PARTS: tl.constexpr = TILE_KV // BLOCK_KV  # blocks in a tile
    for i in tl.range(0, count * PARTS):
        o_col = i % PARTS * BLOCK_KV + tl.arange(0, BLOCK_KV)  # within the tile
        o_kv = tl.load(p_columns + i // PARTS) * TILE_KV + o_col
        b_k = load_tile(p_k, o_kv, s_kn, m, D, BLOCK_D, MASKED)  # (BLOCK_KV, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        if MASKED:
            i_mask = tl.load(p_kinds + i // PARTS)
            o_tile = o_row[:, None] * TILE_KV + o_col[None, :]
            m_qk = load_mask(p_masks, i_mask, o_tile, TILE_Q * TILE_KV)
            b_s = tl.where(m_qk & (o_kv < m)[None, :], b_s, float("-inf"))
        b_p, b_rescale, b_l, b_m = online_softmax_update(b_s, b_l, b_m, scale, MASKED)
        b_v = load_tile(p_v, o_kv, s_vn, m, DV, BLOCK_DV, MASKED)  # (BLOCK_KV, BLOCK_DV)
        b_acc = b_acc * b_rescale[:, None]  # (BLOCK_Q, BLOCK_DV)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_l, b_m
    # --8<-- [end:attend_listed]


@triton.jit(do_not_specialize=["n", "m", "lines"])
def forward_kernel(
    p_q, p_k, p_v, p_out, p_top, p_total, p_start, p_part, p_columns, p_kinds, p_masks,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on, s_mb, s_mg,
    n, m, heads, lines, scale,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of one head.

    `lines` is T_q; s_mb and s_mg count lists from one sequence or key head to the next, 0 where all share one.
    """
    # --8<-- [start:forward_kernel]
    blocks = tl.cdiv(n, BLOCK_Q)
    # Under causality the last block has the longest list: longest first.
    i_q = blocks - 1 - tl.program_id(0) % blocks
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_g = i_h // SHARE
    i_list = i_b * s_mb + i_g * s_mg
    i_line = i_list * lines + i_q * BLOCK_Q // TILE_Q
    first, part, end = spans(p_start, p_part, i_line, i_list)
    # --8<-- [end:forward_kernel]

    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_row = i_q * BLOCK_Q % TILE_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q + i_b * s_qb + i_h * s_qh, o_q, s_qn, n, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
    b_acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    b_l = tl.zeros((BLOCK_Q,), tl.float32)
    b_m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for MASKED in tl.static_range(0, 2):  # the whole tiles, then the partial ones
        lo = part if MASKED else first
        hi = end if MASKED else part
        b_acc, b_l, b_m = attend_listed(
            b_acc, b_l, b_m, b_q, p_k, p_v, p_columns + lo, p_kinds + lo, p_masks, s_kn, s_vn, count=hi - lo,
            o_row=o_row, m=m, scale=scale, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_KV=BLOCK_KV,
            TILE_Q=TILE_Q, TILE_KV=TILE_KV, MASKED=MASKED == 1,
        )  # fmt: skip

    b_l = tl.where(b_l == 0, 1.0, b_l)  # no visible key: 0 / 1, and lse = -inf + log 1
    store_tile(p_out + i_b * s_ob + i_h * s_oh, o_q, s_on, n, b_acc / b_l[:, None], DV, BLOCK_DV)
    tl.store(p_top + i_bh * n + o_q, b_m, mask=o_q < n)
    tl.store(p_total + i_bh * n + o_q, tl.log2(b_l), mask=o_q < n)
