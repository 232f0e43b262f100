"""Attention of a tile of queries, and decoding: few queries over keys that are split among programs, then combined.

Source: Dao 2023 (2307.08691), Algorithm 1; split keys: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023). Symbols as in
`nondual.ops.flash_attention.triton`. Each kernel's last arguments are its forget gates, if there are any: `decay`.
"""

import triton
import triton.language as tl

from nondual.ops.flash_attention.triton.decay import decay_of_keys, gates_at, load_gates
from nondual.ops.flash_attention.triton.primitives import (
    key_bounds,
    load_tile,
    online_softmax_update,
    store_tile,
    visible,
)


@triton.jit
def attend(
    b_acc, b_l, b_m, b_q, p_k, p_v, gates, at_q, s_kn, s_vn, lo, hi, o_q, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, FORGETS: tl.constexpr,
):  # fmt: skip
    """Attention of the queries b_q over the keys lo..hi, tile by tile, added to the sums so far."""
    unit = 1.0 if FORGETS else scale  # what scores are still to be multiplied by
    GUARD: tl.constexpr = MASKED or FORGETS
    # --8<-- [start:attend]
    for start in tl.range(lo, hi, BLOCK_KV):
        o_kv = start + tl.arange(0, BLOCK_KV)
        b_k = load_tile(p_k, o_kv, s_kn, m, D, BLOCK_D, MASKED)  # (BLOCK_KV, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        if FORGETS:
            end = start + BLOCK_KV - 1
            b_s = b_s * scale + decay_of_keys(gates, at_q, o_kv, end, m, MASKED)
        if MASKED:
            m_qk = visible(o_q[:, None], o_kv[None, :], m, shift, window, CAUSAL, WINDOWED)
            b_s = tl.where(m_qk, b_s, float("-inf"))
        b_p, b_rescale, b_l, b_m = online_softmax_update(b_s, b_l, b_m, unit, GUARD)
        b_v = load_tile(p_v, o_kv, s_vn, m, DV, BLOCK_DV, MASKED)  # (BLOCK_KV, BLOCK_DV)
        b_acc = b_acc * b_rescale[:, None]  # (BLOCK_Q, BLOCK_DV)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_l, b_m
    # --8<-- [end:attend]


@triton.jit
def attend_all(
    b_q, p_k, p_v, gates, at_q, s_kn, s_vn, bounds, o_q, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    FORGETS: tl.constexpr,
):  # fmt: skip
    """Attention of the queries b_q over all their keys, within `bounds` as `key_bounds` gives them.

    Returns the output, not yet divided by the sum of exponentials; that sum; and the highest score, to the base 2.
    """
    b_acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    b_l = tl.zeros((BLOCK_Q,), tl.float32)
    b_m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for SPAN in tl.static_range(0 if WINDOWED else 1, 3):  # tiles with a mask (of a window), without, with one
        b_acc, b_l, b_m = attend(
            b_acc, b_l, b_m, b_q, p_k, p_v, gates, at_q, s_kn, s_vn,
            lo=bounds[SPAN], hi=bounds[SPAN + 1], o_q=o_q, m=m, shift=shift, window=window, scale=scale,
            D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_KV=BLOCK_KV,
            CAUSAL=CAUSAL, WINDOWED=WINDOWED, MASKED=SPAN != 1, FORGETS=FORGETS,
        )  # fmt: skip
    return b_acc, b_l, b_m


@triton.jit(do_not_specialize=["n", "m", "window"])
def forward_kernel(
    p_q, p_k, p_v, p_out, p_top, p_total,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on,
    n, m, heads, window, scale,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    p_high=None, p_low=None, p_first=None,
):  # fmt: skip
    """One program: a tile of queries of one head."""
    # --8<-- [start:forward_kernel]
    tiles = tl.cdiv(n, BLOCK_Q)
    # Under causality the last tile has the most keys: longest first.
    i_q = tiles - 1 - tl.program_id(0) % tiles
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h // SHARE * s_kh
    p_v += i_b * s_vb + i_h // SHARE * s_vh
    shift = m - n
    # --8<-- [end:forward_kernel]

    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q, o_q, s_qn, n, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
    last = tl.minimum(i_q * BLOCK_Q + BLOCK_Q, n) - 1
    bounds = key_bounds(i_q * BLOCK_Q, last, m, shift, window, CAUSAL, WINDOWED, BLOCK_KV)
    FORGETS: tl.constexpr = p_high is not None
    gates, at_q = None, None
    if FORGETS:
        gates = gates_at(p_high, p_low, p_first, i_bh * m)
        at_q = load_gates(gates, (o_q + shift)[:, None], m)
    b_acc, b_l, b_m = attend_all(
        b_q, p_k, p_v, gates, at_q, s_kn, s_vn, bounds, o_q=o_q, m=m, shift=shift, window=window, scale=scale,
        D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_Q=BLOCK_Q, BLOCK_KV=BLOCK_KV,
        CAUSAL=CAUSAL, WINDOWED=WINDOWED, FORGETS=FORGETS,
    )  # fmt: skip

    b_l = tl.where(b_l == 0, 1.0, b_l)  # no visible key: 0 / 1, and lse = -inf + log 1
    store_tile(p_out + i_b * s_ob + i_h * s_oh, o_q, s_on, n, b_acc / b_l[:, None], DV, BLOCK_DV)
    tl.store(p_top + i_bh * n + o_q, b_m, mask=o_q < n)
    tl.store(p_total + i_bh * n + o_q, tl.log2(b_l), mask=o_q < n)


@triton.jit(do_not_specialize=["n", "m", "window", "first", "length", "splits"])
def decode_kernel(
    p_q, p_k, p_v, p_part, p_part_m, p_part_l,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    n, m, groups, window, scale, first, length, splits,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    p_high=None, p_low=None, p_first=None,
):  # fmt: skip
    """One program: all queries of the heads that share a key head, and `length` of its keys.

    Row r of the tile of queries is query r % n of the (r // n)-th of these heads. What is stored are parts: an output
    not yet divided by its sum of exponentials, the highest score and that sum, which `combine_kernel` joins.
    """
    i_split = tl.program_id(0) % splits
    i_bg = (tl.program_id(0) // splits).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    p_q += i_b * s_qb + i_g * SHARE * s_qh
    p_k += i_b * s_kb + i_g * s_kh
    p_v += i_b * s_vb + i_g * s_vh
    shift = m - n

    o_row = tl.arange(0, BLOCK_Q)
    o_q = o_row % n
    o_col = tl.arange(0, BLOCK_D)
    p_rows = p_q + (o_row // n).to(tl.int64) * s_qh + o_q.to(tl.int64) * s_qn
    m_rows = o_row < SHARE * n
    b_q = tl.load(p_rows[:, None] + o_col[None, :], mask=m_rows[:, None] & (o_col < D)[None, :], other=0.0)
    start = first + i_split * length  # first and length are multiples of BLOCK_KV
    stop = tl.minimum(start + length, m)
    lo, whole, part, hi = key_bounds(0, n - 1, m, shift, window, CAUSAL, WINDOWED, BLOCK_KV)
    lo, hi = tl.maximum(lo, start), tl.minimum(hi, stop)
    whole = tl.minimum(tl.maximum(whole, start), tl.cdiv(stop, BLOCK_KV) * BLOCK_KV)
    part = tl.maximum(tl.minimum(part, stop // BLOCK_KV * BLOCK_KV), whole)
    FORGETS: tl.constexpr = p_high is not None
    gates, at_q = None, None
    if FORGETS:  # those of each row's own head
        i_head = i_bg * SHARE + tl.minimum(o_row // n, SHARE - 1)
        gates = gates_at(p_high, p_low, p_first, (i_head * m)[:, None])
        at_q = load_gates(gates, (o_q + shift)[:, None], m)
    b_acc, b_l, b_m = attend_all(
        b_q, p_k, p_v, gates, at_q, s_kn, s_vn, (lo, whole, part, hi), o_q=o_q, m=m, shift=shift, window=window,
        scale=scale,
        D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_Q=BLOCK_Q, BLOCK_KV=BLOCK_KV,
        CAUSAL=CAUSAL, WINDOWED=WINDOWED, FORGETS=FORGETS,
    )  # fmt: skip

    i_row = (i_bg * splits + i_split) * SHARE * n  # the parts are (B, G, splits, SHARE · N, DV)
    store_tile(p_part + i_row * DV, o_row, DV, SHARE * n, b_acc, DV, BLOCK_DV)
    tl.store(p_part_m + i_row + o_row, b_m, mask=m_rows)
    tl.store(p_part_l + i_row + o_row, b_l, mask=m_rows)


@triton.jit(do_not_specialize=["n", "splits"])
def combine_kernel(
    p_part, p_part_m, p_part_l, p_out, p_top, p_total, s_ob, s_oh, s_on, n, heads, splits,
    SHARE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: one query of one head, whose parts from `decode_kernel` are rescaled to one maximum and added."""
    i_row = tl.program_id(0).to(tl.int64)  # of B · H · N
    i_bh, i_q = i_row // n, i_row % n
    i_b, i_h = i_bh // heads, i_bh % heads
    i_bg = i_bh // SHARE
    rows = SHARE * n
    o_split = tl.arange(0, BLOCK_S)
    o_part = (i_bg * splits + o_split) * rows + (i_h % SHARE) * n + i_q
    b_m = tl.load(p_part_m + o_part, mask=o_split < splits, other=float("-inf"))  # (BLOCK_S,)
    b_l = tl.load(p_part_l + o_part, mask=o_split < splits, other=0.0)  # (BLOCK_S,)
    top = tl.max(b_m, 0)
    b_w = tl.exp2(b_m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(b_w * b_l, 0)
    total = tl.where(total == 0, 1.0, total)
    o_col = tl.arange(0, BLOCK_DV)
    m_part = (o_split < splits)[:, None] & (o_col < DV)[None, :]
    b_part = tl.load(p_part + o_part[:, None] * DV + o_col[None, :], mask=m_part, other=0.0)  # (BLOCK_S, BLOCK_DV)
    b_out = tl.sum(b_part * b_w[:, None], 0) / total
    p_row = p_out + i_b * s_ob + i_h * s_oh + i_q * s_on
    tl.store(p_row + o_col, b_out.to(p_out.dtype.element_ty), mask=o_col < DV)
    tl.store(p_top + i_row, top)
    tl.store(p_total + i_row, tl.log2(total))
