"""The gradients of q, k and v, without atomic additions: one kernel gathers dq, another dk and dv.

Source: Dao 2023 (2307.08691), Algorithm 2, whose single sweep adds to dq from many programs; ours sweeps twice and
computes the scores twice. With forget gates (`decay`) each sweep sums dS too, by rows or by columns. Symbols as in
`nondual.ops.flash_attention.triton`; g in a stride's name is d_out's.
"""

import triton
import triton.language as tl

from nondual.ops.flash_attention.triton.decay import decay_between, decay_of_keys, gates_at, load_gates
from nondual.ops.flash_attention.triton.primitives import (
    key_bounds,
    load_tile,
    load_top,
    query_bounds,
    store_tile,
    visible,
)


@triton.jit(do_not_specialize=["n"])
def delta_kernel(
    p_out, p_do, p_dtotal, p_delta, s_ob, s_oh, s_on, s_gb, s_gh, s_gn, n, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One program: delta = rowsum(dO ∘ O) - dlse for a tile of queries; dS = P ∘ (dP - delta).

    p_dtotal holds the gradient of the log-sum-exp to the base 2; times log2(e) it is dlse.
    """
    tiles = tl.cdiv(n, BLOCK_Q)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_q = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_out = load_tile(p_out + i_b * s_ob + i_h * s_oh, o_q, s_on, n, DV, BLOCK_DV, True)  # (BLOCK_Q, BLOCK_DV)
    b_do = load_tile(p_do + i_b * s_gb + i_h * s_gh, o_q, s_gn, n, DV, BLOCK_DV, True)  # (BLOCK_Q, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    b_dlse = tl.load(p_dtotal + i_bh * n + o_q, mask=o_q < n, other=0.0) * 1.4426950408889634
    tl.store(p_delta + i_bh * n + o_q, b_delta - b_dlse, mask=o_q < n)


@triton.jit
def gather_dkdv(
    b_dk, b_dv, b_dc, b_k, b_v, p_q, p_do, p_top, p_total, p_delta, gates, at_kv, at_last, s_qn, s_gn, lo, hi,
    o_kv, last, n, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, FORGETS: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv of the keys b_k what the queries lo..hi give them, tile by tile; with gates, to b_dc their dS.

    Scores are (keys, queries) here, so that P and dS need no transposing.
    """
    # --8<-- [start:dkdv]
    for start in tl.range(lo, hi, BLOCK_Q):
        o_q = start + tl.arange(0, BLOCK_Q)
        b_q = load_tile(p_q, o_q, s_qn, n, D, BLOCK_D, MASKED)  # (BLOCK_Q, BLOCK_D)
        b_top = load_top(p_top, o_q, n)  # (BLOCK_Q,)
        b_total = tl.load(p_total + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
        # (BLOCK_KV, BLOCK_Q)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
        if FORGETS:
            at_q = load_gates(gates, (o_q + shift)[None, :], m)
            b_s += decay_between(at_q, at_kv, at_last, o_kv[:, None], last, MASKED)
        b_p = tl.exp2((b_s - b_top[None, :]) - b_total[None, :])
        if MASKED:
            m_kq = visible(o_q[None, :], o_kv[:, None], m, shift, window, CAUSAL, WINDOWED)
            b_p = tl.where(m_kq, b_p, 0.0)
        b_do = load_tile(p_do, o_q, s_gn, n, DV, BLOCK_DV, MASKED)  # (BLOCK_Q, BLOCK_DV)
        # (BLOCK_KV, BLOCK_DV)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_delta = tl.load(p_delta + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # (BLOCK_KV, BLOCK_Q)
        b_ds = b_p * (b_dp - b_delta[None, :])
        # (BLOCK_KV, BLOCK_D)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
        if FORGETS:
            b_dc += tl.sum(b_ds, 1)
    return b_dk, b_dv, b_dc
    # --8<-- [end:dkdv]


@triton.jit(do_not_specialize=["n", "m", "window"])
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_top, p_total, p_delta, p_dk, p_dv,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn,
    s_dkb, s_dkh, s_dkn, s_dvb, s_dvh, s_dvn,
    n, m, groups, window, scale, factor,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    p_high=None, p_low=None, p_first=None, p_dc=None,
):  # fmt: skip
    """One program: the gradients of a tile of keys and values of one key head, summed over the query heads that share
    it. `scale` holds the factor log2(e), `factor` is the scale without it. With forget gates, p_dc (B, H, M) takes the
    sum of dS over the queries, for each query head."""
    tiles = tl.cdiv(m, BLOCK_KV)
    i_kv = tl.program_id(0) % tiles  # under causality the first tile has the most queries: longest first
    i_bg = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    shift = m - n
    o_kv = i_kv * BLOCK_KV + tl.arange(0, BLOCK_KV)
    b_k = load_tile(p_k + i_b * s_kb + i_g * s_kh, o_kv, s_kn, m, D, BLOCK_D, True)  # (BLOCK_KV, BLOCK_D)
    b_v = load_tile(p_v + i_b * s_vb + i_g * s_vh, o_kv, s_vn, m, DV, BLOCK_DV, True)  # (BLOCK_KV, BLOCK_DV)
    b_dk = tl.zeros((BLOCK_KV, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_KV, BLOCK_DV), tl.float32)
    last = tl.minimum(i_kv * BLOCK_KV + BLOCK_KV, m) - 1
    bounds = query_bounds(i_kv * BLOCK_KV, last, n, shift, window, CAUSAL, WINDOWED, BLOCK_Q)
    FORGETS: tl.constexpr = p_high is not None
    for i_share in tl.range(0, SHARE):
        i_h = i_g * SHARE + i_share
        p_qh = p_q + i_b * s_qb + i_h * s_qh
        p_doh = p_do + i_b * s_gb + i_h * s_gh
        i_row = (i_bg * SHARE + i_share) * n
        gates, at_kv, at_last = None, None, None
        if FORGETS:
            gates = gates_at(p_high, p_low, p_first, (i_bg * SHARE + i_share) * m)
            at_kv, at_last = load_gates(gates, o_kv[:, None], m), load_gates(gates, last, m)
        b_dc = tl.zeros((BLOCK_KV,), tl.float32)
        for SPAN in tl.static_range(0 if CAUSAL else 1, 3):  # tiles with a mask (of causality), without, with one
            b_dk, b_dv, b_dc = gather_dkdv(
                b_dk, b_dv, b_dc, b_k, b_v, p_q=p_qh, p_do=p_doh,
                p_top=p_top + i_row, p_total=p_total + i_row, p_delta=p_delta + i_row,
                gates=gates, at_kv=at_kv, at_last=at_last, s_qn=s_qn, s_gn=s_gn,
                lo=bounds[SPAN], hi=bounds[SPAN + 1], o_kv=o_kv, last=last, n=n, m=m, shift=shift, window=window,
                scale=scale,
                D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_Q=BLOCK_Q,
                CAUSAL=CAUSAL, WINDOWED=WINDOWED, MASKED=SPAN != 1, FORGETS=FORGETS,
            )  # fmt: skip
        if FORGETS:
            tl.store(p_dc + (i_bg * SHARE + i_share) * m + o_kv, b_dc, mask=o_kv < m)
    store_tile(p_dk + i_b * s_dkb + i_g * s_dkh, o_kv, s_dkn, m, b_dk * factor, D, BLOCK_D)
    store_tile(p_dv + i_b * s_dvb + i_g * s_dvh, o_kv, s_dvn, m, b_dv, DV, BLOCK_DV)


@triton.jit
def gather_dq(
    b_dq, b_dc, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, gates, at_q, s_kn, s_vn, lo, hi, o_q, m, shift, window,
    scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, FORGETS: tl.constexpr,
):  # fmt: skip
    """Add to dq of the queries b_q what the keys lo..hi give it, tile by tile; with gates, to b_dc their dS."""
    for start in tl.range(lo, hi, BLOCK_KV):
        o_kv = start + tl.arange(0, BLOCK_KV)
        b_k = load_tile(p_k, o_kv, s_kn, m, D, BLOCK_D, MASKED)  # (BLOCK_KV, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # (BLOCK_Q, BLOCK_KV)
        if FORGETS:
            b_s += decay_of_keys(gates, at_q, o_kv, start + BLOCK_KV - 1, m, MASKED)
        b_p = tl.exp2((b_s - b_top[:, None]) - b_total[:, None])
        if MASKED:
            b_p = tl.where(visible(o_q[:, None], o_kv[None, :], m, shift, window, CAUSAL, WINDOWED), b_p, 0.0)
        b_v = load_tile(p_v, o_kv, s_vn, m, DV, BLOCK_DV, MASKED)  # (BLOCK_KV, BLOCK_DV)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # (BLOCK_Q, BLOCK_D)
        if FORGETS:
            b_dc += tl.sum(b_ds, 1)
    return b_dq, b_dc


@triton.jit(do_not_specialize=["n", "m", "window"])
def dq_kernel(
    p_q, p_k, p_v, p_do, p_top, p_total, p_delta, p_dq,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn, s_dqb, s_dqh, s_dqn,
    n, m, heads, window, scale, factor,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    p_high=None, p_low=None, p_first=None, p_dc=None,
):  # fmt: skip
    """One program: the gradient of a tile of queries of one head. `scale` and `factor` as in `dkdv_kernel`. With forget
    gates, p_dc (B, H, N) takes the sum of dS over the keys."""
    tiles = tl.cdiv(n, BLOCK_Q)
    i_q = tiles - 1 - tl.program_id(0) % tiles
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_k += i_b * s_kb + i_h // SHARE * s_kh
    p_v += i_b * s_vb + i_h // SHARE * s_vh
    shift = m - n
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q + i_b * s_qb + i_h * s_qh, o_q, s_qn, n, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
    b_do = load_tile(p_do + i_b * s_gb + i_h * s_gh, o_q, s_gn, n, DV, BLOCK_DV, True)  # (BLOCK_Q, BLOCK_DV)
    b_top = load_top(p_top + i_bh * n, o_q, n)  # (BLOCK_Q,)
    b_total = tl.load(p_total + i_bh * n + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
    b_delta = tl.load(p_delta + i_bh * n + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
    b_dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    last = tl.minimum(i_q * BLOCK_Q + BLOCK_Q, n) - 1
    bounds = key_bounds(i_q * BLOCK_Q, last, m, shift, window, CAUSAL, WINDOWED, BLOCK_KV)
    FORGETS: tl.constexpr = p_high is not None
    gates, at_q = None, None
    if FORGETS:
        gates = gates_at(p_high, p_low, p_first, i_bh * m)
        at_q = load_gates(gates, (o_q + shift)[:, None], m)
    b_dc = tl.zeros((BLOCK_Q,), tl.float32)
    for SPAN in tl.static_range(0 if WINDOWED else 1, 3):  # tiles with a mask (of a window), without, with one
        b_dq, b_dc = gather_dq(
            b_dq, b_dc, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, gates, at_q, s_kn, s_vn,
            lo=bounds[SPAN], hi=bounds[SPAN + 1], o_q=o_q, m=m, shift=shift, window=window, scale=scale,
            D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_KV=BLOCK_KV,
            CAUSAL=CAUSAL, WINDOWED=WINDOWED, MASKED=SPAN != 1, FORGETS=FORGETS,
        )  # fmt: skip
    if FORGETS:
        tl.store(p_dc + i_bh * n + o_q, b_dc, mask=o_q < n)
    store_tile(p_dq + i_b * s_dqb + i_h * s_dqh, o_q, s_dqn, n, b_dq * factor, D, BLOCK_D)
