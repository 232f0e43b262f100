"""The gradients of q, k and v over the listed tiles: one kernel gathers dq by rows, another dk and dv by columns.

Source: Dao et al. 2022 (2205.14135), Algorithm 5 applied to the backward pass of Dao 2023 (2307.08691), Algorithm 2,
swept twice as in `nondual.ops.flash_attention.triton.backward`, whose delta_kernel comes first. Symbols as in
`nondual.ops.sparse_attention.triton`; g in a stride's name is d_out's.
"""

import triton
import triton.language as tl

from nondual.ops.flash_attention.triton.primitives import load_tile, load_top, store_tile
from nondual.ops.sparse_attention.triton.primitives import load_mask, spans


@triton.jit
def gather_dkdv_listed(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_top, p_total, p_delta, p_rows, p_kinds, p_masks, s_qn, s_gn, count, o_col, n,
    scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of the keys b_k what the queries of `count` listed tiles give them.

    p_rows and p_kinds stand at the first of them; o_col are the keys' columns within their tile. Scores are (keys,
    queries) here, so that P and dS need no transposing.
    """
    # --8<-- [start:dkdv_listed]
    PARTS: tl.constexpr = TILE_Q // BLOCK_Q  # blocks in a tile
    for i in tl.range(0, count * PARTS):
        o_row = i % PARTS * BLOCK_Q + tl.arange(0, BLOCK_Q)  # within the tile
        o_q = tl.load(p_rows + i // PARTS) * TILE_Q + o_row
        b_q = load_tile(p_q, o_q, s_qn, n, D, BLOCK_D, MASKED)  # (BLOCK_Q, BLOCK_D)
        b_top = load_top(p_top, o_q, n)  # (BLOCK_Q,)
        b_total = tl.load(p_total + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # (BLOCK_KV, BLOCK_Q)
        b_p = tl.exp2((b_s * scale - b_top[None, :]) - b_total[None, :])
        if MASKED:
            i_mask = tl.load(p_kinds + i // PARTS)
            o_tile = o_row[None, :] * TILE_KV + o_col[:, None]
            m_kq = load_mask(p_masks, i_mask, o_tile, TILE_Q * TILE_KV)
            b_p = tl.where(m_kq, b_p, 0.0)
        b_do = load_tile(p_do, o_q, s_gn, n, DV, BLOCK_DV, MASKED)  # (BLOCK_Q, BLOCK_DV)
        # (BLOCK_KV, BLOCK_DV)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_delta = tl.load(p_delta + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # (BLOCK_KV, BLOCK_Q)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")  # (BLOCK_KV, BLOCK_D)
    return b_dk, b_dv
    # --8<-- [end:dkdv_listed]


@triton.jit(do_not_specialize=["n", "m", "lines"])
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_top, p_total, p_delta, p_dk, p_dv, p_start, p_part, p_rows, p_kinds, p_masks,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn,
    s_dkb, s_dkh, s_dkn, s_dvb, s_dvh, s_dvn, s_mb, s_mg,
    n, m, groups, lines, scale, factor,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a block of keys and values of one key head, summed over the query heads that share
    it. `lines` is T_k; `scale` holds the factor log2(e), `factor` is the scale without it."""
    blocks = tl.cdiv(m, BLOCK_KV)
    i_kv = tl.program_id(0) % blocks  # under causality the first has the longest list: longest first
    i_bg = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    i_list = i_b * s_mb + i_g * s_mg
    first, part, end = spans(p_start, p_part, i_list * lines + i_kv * BLOCK_KV // TILE_KV, i_list)
    o_kv = i_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    o_col = i_kv * BLOCK_KV % TILE_KV + tl.arange(0, BLOCK_KV)
    b_k = load_tile(p_k + i_b * s_kb + i_g * s_kh, o_kv, s_kn, m, D, BLOCK_D, True)  # (BLOCK_KV, BLOCK_D)
    b_v = load_tile(p_v + i_b * s_vb + i_g * s_vh, o_kv, s_vn, m, DV, BLOCK_DV, True)  # (BLOCK_KV, BLOCK_DV)
    b_dk = tl.zeros((BLOCK_KV, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_KV, BLOCK_DV), tl.float32)
    for i_share in tl.range(0, SHARE):
        i_h = i_g * SHARE + i_share
        i_row = (i_bg * SHARE + i_share) * n
        p_qh = p_q + i_b * s_qb + i_h * s_qh
        p_doh = p_do + i_b * s_gb + i_h * s_gh
        for MASKED in tl.static_range(0, 2):  # the whole tiles, then the partial ones
            lo = part if MASKED else first
            hi = end if MASKED else part
            b_dk, b_dv = gather_dkdv_listed(
                b_dk, b_dv, b_k, b_v, p_q=p_qh, p_do=p_doh, p_top=p_top + i_row, p_total=p_total + i_row,
                p_delta=p_delta + i_row, p_rows=p_rows + lo, p_kinds=p_kinds + lo, p_masks=p_masks, s_qn=s_qn,
                s_gn=s_gn, count=hi - lo, o_col=o_col, n=n, scale=scale, D=D, DV=DV, BLOCK_D=BLOCK_D,
                BLOCK_DV=BLOCK_DV, BLOCK_Q=BLOCK_Q, TILE_Q=TILE_Q, TILE_KV=TILE_KV, MASKED=MASKED == 1,
            )  # fmt: skip
    store_tile(p_dk + i_b * s_dkb + i_g * s_dkh, o_kv, s_dkn, m, b_dk * factor, D, BLOCK_D)
    store_tile(p_dv + i_b * s_dvb + i_g * s_dvh, o_kv, s_dvn, m, b_dv, DV, BLOCK_DV)


@triton.jit
def gather_dq_listed(
    b_dq, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, p_columns, p_kinds, p_masks, s_kn, s_vn, count, o_row, m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_KV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dq of the queries b_q what the keys of `count` listed tiles give it. Arguments as in `attend_listed`."""
    PARTS: tl.constexpr = TILE_KV // BLOCK_KV  # blocks in a tile
    for i in tl.range(0, count * PARTS):
        o_col = i % PARTS * BLOCK_KV + tl.arange(0, BLOCK_KV)  # within the tile
        o_kv = tl.load(p_columns + i // PARTS) * TILE_KV + o_col
        b_k = load_tile(p_k, o_kv, s_kn, m, D, BLOCK_D, MASKED)  # (BLOCK_KV, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        b_p = tl.exp2((b_s * scale - b_top[:, None]) - b_total[:, None])
        if MASKED:
            i_mask = tl.load(p_kinds + i // PARTS)
            o_tile = o_row[:, None] * TILE_KV + o_col[None, :]
            m_qk = load_mask(p_masks, i_mask, o_tile, TILE_Q * TILE_KV)
            b_p = tl.where(m_qk & (o_kv < m)[None, :], b_p, 0.0)
        b_v = load_tile(p_v, o_kv, s_vn, m, DV, BLOCK_DV, MASKED)  # (BLOCK_KV, BLOCK_DV)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")  # (BLOCK_Q, BLOCK_D)
    return b_dq


@triton.jit(do_not_specialize=["n", "m", "lines"])
def dq_kernel(
    p_q, p_k, p_v, p_do, p_top, p_total, p_delta, p_dq, p_start, p_part, p_columns, p_kinds, p_masks,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn, s_dqb, s_dqh, s_dqn, s_mb, s_mg,
    n, m, heads, lines, scale, factor,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a block of queries of one head. `lines` is T_q; `scale` and `factor` as in
    `dkdv_kernel`."""
    blocks = tl.cdiv(n, BLOCK_Q)
    i_q = blocks - 1 - tl.program_id(0) % blocks
    i_bh = (tl.program_id(0) // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_g = i_h // SHARE
    i_list = i_b * s_mb + i_g * s_mg
    first, part, end = spans(p_start, p_part, i_list * lines + i_q * BLOCK_Q // TILE_Q, i_list)
    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_row = i_q * BLOCK_Q % TILE_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q + i_b * s_qb + i_h * s_qh, o_q, s_qn, n, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
    b_do = load_tile(p_do + i_b * s_gb + i_h * s_gh, o_q, s_gn, n, DV, BLOCK_DV, True)  # (BLOCK_Q, BLOCK_DV)
    b_top = load_top(p_top + i_bh * n, o_q, n)  # (BLOCK_Q,)
    b_total = tl.load(p_total + i_bh * n + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
    b_delta = tl.load(p_delta + i_bh * n + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
    b_dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(0, 2):  # the whole tiles, then the partial ones
        lo = part if MASKED else first
        hi = end if MASKED else part
        b_dq = gather_dq_listed(
            b_dq, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, p_columns + lo, p_kinds + lo, p_masks, s_kn, s_vn,
            count=hi - lo, o_row=o_row, m=m, scale=scale, D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV,
            BLOCK_KV=BLOCK_KV, TILE_Q=TILE_Q, TILE_KV=TILE_KV, MASKED=MASKED == 1,
        )  # fmt: skip
    store_tile(p_dq + i_b * s_dqb + i_h * s_dqh, o_q, s_dqn, n, b_dq * factor, D, BLOCK_D)
