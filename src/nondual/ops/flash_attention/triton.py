"""Flash attention as Triton kernels: forward, decoding with split keys, and a backward without atomics.

Source: Dao 2023 (2307.08691), Algorithms 1 and 2; split keys as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
Symbols: B batch, H query heads, G key/value heads, SHARE = H / G, N queries, M keys, D and DV head widths. In the
kernels n and m are N and M, shift = M - N takes a query to its position among the keys, i_ is a program's index, o_ are
offsets, m_ masks, p_ pointers, s_ strides and b_ blocks on the chip.

Scores are held times log2(e), so that the exponential is the chip's own exp2: a score's factor and the subtraction of
the row's maximum are then one fused operation. The log-sum-exp is kept in two parts, a row's highest score ("top") and
the logarithm of its sum of exponentials ("total"): for a score of 1e4 their sum in float32 is off by up to a
thousandth, and exp(S - L) in the backward pass would be too. Rows are addressed in 64 bits. Sums run in float32 and in
one order: no atomics, so the same input gives the same bits. A tile in which no query may attend to any key is not
visited; one in which every query may attend to every key is not masked; only the others are masked.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- kernels: named steps ------------------------------------------------------------------------------------------


# --8<-- [start:load_tile]
@triton.jit
def load_tile(p, o_row, s_row, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Rows o_row of a matrix, (len(o_row), BLOCK); 0 beyond its WIDTH and, at an EDGE, beyond its last row."""
    o_col = tl.arange(0, BLOCK)
    p_tile = p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]
    if EDGE:
        m_tile = (o_row < rows)[:, None] & (o_col < WIDTH)[None, :]
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif WIDTH < BLOCK:
        b_tile = tl.load(p_tile, mask=(o_col < WIDTH)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


# --8<-- [end:load_tile]


@triton.jit
def store_tile(p, o_row, s_row, rows, b_tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the rows o_row of a matrix, as far as it has them."""
    o_col = tl.arange(0, BLOCK)
    m_tile = (o_row < rows)[:, None] & (o_col < WIDTH)[None, :]
    p_tile = p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]
    tl.store(p_tile, b_tile.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def load_top(p, o_q, n):
    """The highest score of rows o_q; +inf for a row without a visible key or past the end: P = exp2(S - inf) = 0."""
    b_top = tl.load(p + o_q, mask=o_q < n, other=float("inf"))
    return tl.where(b_top == float("-inf"), float("inf"), b_top)


@triton.jit
def visible(o_q, o_kv, m, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Which of the keys o_kv the queries o_q see; the two are shaped so that they broadcast."""
    m_seen = o_kv < m
    if CAUSAL:
        m_seen = m_seen & (o_kv <= o_q + shift)
    if WINDOWED:
        m_seen = m_seen & (o_kv > o_q + (shift - window))
    return m_seen


@triton.jit
def key_bounds(first, last, m, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_KV: tl.constexpr):
    """Where the keys of queries first..last lie: masked tiles lo..whole, tiles without a mask whole..part, masked tiles
    part..hi."""
    lo = 0
    hi = m
    whole = 0
    part = m // BLOCK_KV * BLOCK_KV
    if CAUSAL:
        hi = tl.maximum(0, tl.minimum(m, last + shift + 1))
        part = tl.maximum(0, tl.minimum(m, first + shift + 1)) // BLOCK_KV * BLOCK_KV
    if WINDOWED:
        lo = tl.maximum(0, first + shift - window + 1) // BLOCK_KV * BLOCK_KV
        whole = tl.cdiv(tl.maximum(0, last + shift - window + 1), BLOCK_KV) * BLOCK_KV
        whole = tl.minimum(whole, tl.cdiv(hi, BLOCK_KV) * BLOCK_KV)
        part = tl.maximum(part, whole)
    return lo, whole, part, hi


@triton.jit
def query_bounds(first, last, n, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Where the queries that see keys first..last lie: masked tiles lo..whole, tiles without a mask whole..part, masked
    tiles part..hi."""
    lo = 0
    hi = n
    whole = 0
    part = n // BLOCK_Q * BLOCK_Q
    if WINDOWED:
        hi = tl.maximum(0, tl.minimum(n, last + window - shift))
        part = tl.maximum(0, tl.minimum(n, first + window - shift)) // BLOCK_Q * BLOCK_Q
    if CAUSAL:
        lo = tl.maximum(0, first - shift) // BLOCK_Q * BLOCK_Q
        whole = tl.cdiv(tl.maximum(0, last - shift), BLOCK_Q) * BLOCK_Q
        whole = tl.minimum(whole, tl.cdiv(hi, BLOCK_Q) * BLOCK_Q)
        part = tl.maximum(part, whole)
    return lo, whole, part, hi


# --8<-- [start:online_softmax_update]
@triton.jit
def online_softmax_update(b_s, b_l, b_m, scale, MASKED: tl.constexpr):
    """Take a tile of raw scores b_s into each row's running maximum b_m and sum of exponentials b_l, to the base 2.

    Returns the tile's weights (not yet divided by b_l), the factor that rescales earlier sums, the new b_l and b_m.
    """
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_shift = b_m_new
    if MASKED:  # a row without a visible key so far: exp2(-inf - 0) = 0, where exp2(-inf + inf) is NaN
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s * scale - b_shift[:, None])
    b_forget = tl.exp2(b_m - b_shift)
    return b_p, b_forget, b_l * b_forget + tl.sum(b_p, 1), b_m_new


# --8<-- [end:online_softmax_update]


# --- kernels: forward ----------------------------------------------------------------------------------------------


# --8<-- [start:attend]
@triton.jit
def attend(
    b_acc, b_l, b_m, b_q, p_k, p_v, s_kn, s_vn, lo, hi, o_q, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attention of the queries b_q over the keys lo..hi, tile by tile."""
    for start in tl.range(lo, hi, BLOCK_KV):
        o_kv = start + tl.arange(0, BLOCK_KV)
        b_k = load_tile(p_k, o_kv, s_kn, m, D, BLOCK_D, MASKED)  # (BLOCK_KV, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        if MASKED:
            m_seen = visible(o_q[:, None], o_kv[None, :], m, shift, window, CAUSAL, WINDOWED)
            b_s = tl.where(m_seen, b_s, float("-inf"))
        b_p, b_forget, b_l, b_m = online_softmax_update(b_s, b_l, b_m, scale, MASKED)
        b_v = load_tile(p_v, o_kv, s_vn, m, DV, BLOCK_DV, MASKED)  # (BLOCK_KV, BLOCK_DV)
        b_acc = b_acc * b_forget[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")  # (BLOCK_Q, BLOCK_DV)
    return b_acc, b_l, b_m


# --8<-- [end:attend]


@triton.jit
def attend_all(
    b_q, p_k, p_v, s_kn, s_vn, lo, whole, part, hi, o_q, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Attention over all keys lo..hi, from empty sums: with a mask to whole, without one to part, with one to hi."""
    b_acc = tl.zeros((BLOCK_Q, BLOCK_DV), tl.float32)
    b_l = tl.zeros((BLOCK_Q,), tl.float32)
    b_m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    if WINDOWED:
        b_acc, b_l, b_m = attend(
            b_acc, b_l, b_m, b_q, p_k, p_v, s_kn, s_vn, lo, whole, o_q, m, shift, window, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_KV, CAUSAL, WINDOWED, True,
        )  # fmt: skip
    b_acc, b_l, b_m = attend(
        b_acc, b_l, b_m, b_q, p_k, p_v, s_kn, s_vn, whole, part, o_q, m, shift, window, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_KV, CAUSAL, WINDOWED, False,
    )  # fmt: skip
    b_acc, b_l, b_m = attend(
        b_acc, b_l, b_m, b_q, p_k, p_v, s_kn, s_vn, part, hi, o_q, m, shift, window, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_KV, CAUSAL, WINDOWED, True,
    )  # fmt: skip
    return b_acc, b_l, b_m


# --8<-- [start:forward_kernel]
@triton.jit(do_not_specialize=["n", "m", "window"])
def forward_kernel(
    p_q, p_k, p_v, p_out, p_top, p_total,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on,
    n, m, heads, window, scale,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one head."""
    tiles = tl.cdiv(n, BLOCK_Q)
    i_q = tiles - 1 - tl.program_id(0) % tiles  # under causality the last tile has the most keys: longest first
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h // SHARE * s_kh
    p_v += i_b * s_vb + i_h // SHARE * s_vh
    shift = m - n

    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_tile(p_q, o_q, s_qn, n, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
    last = tl.minimum(i_q * BLOCK_Q + BLOCK_Q, n) - 1
    lo, whole, part, hi = key_bounds(i_q * BLOCK_Q, last, m, shift, window, CAUSAL, WINDOWED, BLOCK_KV)
    b_acc, b_l, b_m = attend_all(
        b_q, p_k, p_v, s_kn, s_vn, lo, whole, part, hi, o_q, m, shift, window, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_KV, CAUSAL, WINDOWED,
    )  # fmt: skip

    b_l = tl.where(b_l == 0, 1.0, b_l)  # no visible key: 0 / 1, and lse = -inf + log 1
    store_tile(p_out + i_b * s_ob + i_h * s_oh, o_q, s_on, n, b_acc / b_l[:, None], DV, BLOCK_DV)
    tl.store(p_top + i_bh * n + o_q, b_m, mask=o_q < n)
    tl.store(p_total + i_bh * n + o_q, tl.log2(b_l), mask=o_q < n)


# --8<-- [end:forward_kernel]


@triton.jit(do_not_specialize=["n", "m", "window", "first", "length", "splits"])
def decode_kernel(
    p_q, p_k, p_v, p_part, p_part_m, p_part_l,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    n, m, groups, window, scale, first, length, splits,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """One program: all queries of the heads that share a key head, and `length` of its keys.

    Row r is head r // n of those, and query r % n.
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
    b_acc, b_l, b_m = attend_all(
        b_q, p_k, p_v, s_kn, s_vn, lo, whole, part, hi, o_q, m, shift, window, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_KV, CAUSAL, WINDOWED,
    )  # fmt: skip

    i_row = (i_bg * splits + i_split) * SHARE * n  # parts (B, G, splits, SHARE · N, DV) are not yet divided by l
    store_tile(p_part + i_row * DV, o_row, DV, SHARE * n, b_acc, DV, BLOCK_DV)
    tl.store(p_part_m + i_row + o_row, b_m, mask=m_rows)
    tl.store(p_part_l + i_row + o_row, b_l, mask=m_rows)


@triton.jit(do_not_specialize=["n", "splits"])
def combine_kernel(
    p_part, p_part_m, p_part_l, p_out, p_top, p_total, s_ob, s_oh, s_on, n, heads, splits,
    SHARE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: one query of one head; its parts are rescaled to their common maximum and added."""
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


# --- kernels: backward ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def delta_kernel(
    p_out, p_do, p_dtotal, p_delta, s_ob, s_oh, s_on, s_gb, s_gh, s_gn, n, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO ∘ O) - dlse, which is subtracted from every dP of the row. dlse is given to the base 2."""
    tiles = tl.cdiv(n, BLOCK_Q)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_q = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_out = load_tile(p_out + i_b * s_ob + i_h * s_oh, o_q, s_on, n, DV, BLOCK_DV, True)  # (BLOCK_Q, BLOCK_DV)
    b_do = load_tile(p_do + i_b * s_gb + i_h * s_gh, o_q, s_gn, n, DV, BLOCK_DV, True)  # (BLOCK_Q, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    b_dlse = tl.load(p_dtotal + i_bh * n + o_q, mask=o_q < n, other=0.0) * 1.4426950408889634
    tl.store(p_delta + i_bh * n + o_q, b_delta - b_dlse, mask=o_q < n)


# --8<-- [start:dkdv]
@triton.jit
def gather_dkdv(
    b_dk, b_dv, b_k, b_v, p_q, p_do, p_top, p_total, p_delta, s_qn, s_gn, lo, hi, o_kv, n, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys b_k from the queries lo..hi. Scores are (keys, queries): P and dS need no transposing."""
    for start in tl.range(lo, hi, BLOCK_Q):
        o_q = start + tl.arange(0, BLOCK_Q)
        b_q = load_tile(p_q, o_q, s_qn, n, D, BLOCK_D, MASKED)  # (BLOCK_Q, BLOCK_D)
        b_top = load_top(p_top, o_q, n)  # (BLOCK_Q,)
        b_total = tl.load(p_total + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # (BLOCK_KV, BLOCK_Q)
        b_p = tl.exp2((b_s * scale - b_top[None, :]) - b_total[None, :])
        if MASKED:
            b_p = tl.where(visible(o_q[None, :], o_kv[:, None], m, shift, window, CAUSAL, WINDOWED), b_p, 0.0)
        b_do = load_tile(p_do, o_q, s_gn, n, DV, BLOCK_DV, MASKED)  # (BLOCK_Q, BLOCK_DV)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")  # (BLOCK_KV, BLOCK_DV)
        b_delta = tl.load(p_delta + o_q, mask=o_q < n, other=0.0)  # (BLOCK_Q,)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # (BLOCK_KV, BLOCK_Q)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")  # (BLOCK_KV, BLOCK_D)
    return b_dk, b_dv


# --8<-- [end:dkdv]


@triton.jit(do_not_specialize=["n", "m", "window"])
def dkdv_kernel(
    p_q, p_k, p_v, p_do, p_top, p_total, p_delta, p_dk, p_dv,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn,
    s_dkb, s_dkh, s_dkn, s_dvb, s_dvh, s_dvn,
    n, m, groups, window, scale, factor,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of a tile of keys and values of one key head, summed over the heads that share it."""
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
    lo, whole, part, hi = query_bounds(i_kv * BLOCK_KV, last, n, shift, window, CAUSAL, WINDOWED, BLOCK_Q)
    for i_share in tl.range(0, SHARE):
        i_h = i_g * SHARE + i_share
        p_qh = p_q + i_b * s_qb + i_h * s_qh
        p_doh = p_do + i_b * s_gb + i_h * s_gh
        i_row = (i_bg * SHARE + i_share) * n
        if CAUSAL:
            b_dk, b_dv = gather_dkdv(
                b_dk, b_dv, b_k, b_v, p_qh, p_doh, p_top + i_row, p_total + i_row, p_delta + i_row, s_qn, s_gn,
                lo, whole, o_kv, n, m, shift, window, scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, CAUSAL, WINDOWED, True,
            )  # fmt: skip
        b_dk, b_dv = gather_dkdv(
            b_dk, b_dv, b_k, b_v, p_qh, p_doh, p_top + i_row, p_total + i_row, p_delta + i_row, s_qn, s_gn,
            whole, part, o_kv, n, m, shift, window, scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, CAUSAL, WINDOWED, False,
        )  # fmt: skip
        b_dk, b_dv = gather_dkdv(
            b_dk, b_dv, b_k, b_v, p_qh, p_doh, p_top + i_row, p_total + i_row, p_delta + i_row, s_qn, s_gn,
            part, hi, o_kv, n, m, shift, window, scale, D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, CAUSAL, WINDOWED, True,
        )  # fmt: skip
    store_tile(p_dk + i_b * s_dkb + i_g * s_dkh, o_kv, s_dkn, m, b_dk * factor, D, BLOCK_D)
    store_tile(p_dv + i_b * s_dvb + i_g * s_dvh, o_kv, s_dvn, m, b_dv, DV, BLOCK_DV)


@triton.jit
def gather_dq(
    b_dq, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, s_kn, s_vn, lo, hi, o_q, m, shift, window, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_KV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq of the queries b_q from the keys lo..hi."""
    for start in tl.range(lo, hi, BLOCK_KV):
        o_kv = start + tl.arange(0, BLOCK_KV)
        b_k = load_tile(p_k, o_kv, s_kn, m, D, BLOCK_D, MASKED)  # (BLOCK_KV, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        b_p = tl.exp2((b_s * scale - b_top[:, None]) - b_total[:, None])
        if MASKED:
            b_p = tl.where(visible(o_q[:, None], o_kv[None, :], m, shift, window, CAUSAL, WINDOWED), b_p, 0.0)
        b_v = load_tile(p_v, o_kv, s_vn, m, DV, BLOCK_DV, MASKED)  # (BLOCK_KV, BLOCK_DV)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # (BLOCK_Q, BLOCK_KV)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")  # (BLOCK_Q, BLOCK_D)
    return b_dq


@triton.jit(do_not_specialize=["n", "m", "window"])
def dq_kernel(
    p_q, p_k, p_v, p_do, p_top, p_total, p_delta, p_dq,
    s_qb, s_qh, s_qn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gn, s_dqb, s_dqh, s_dqn,
    n, m, heads, window, scale, factor,
    SHARE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a tile of queries of one head."""
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
    lo, whole, part, hi = key_bounds(i_q * BLOCK_Q, last, m, shift, window, CAUSAL, WINDOWED, BLOCK_KV)
    if WINDOWED:
        b_dq = gather_dq(
            b_dq, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, s_kn, s_vn, lo, whole, o_q, m, shift, window, scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_KV, CAUSAL, WINDOWED, True,
        )  # fmt: skip
    b_dq = gather_dq(
        b_dq, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, s_kn, s_vn, whole, part, o_q, m, shift, window, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_KV, CAUSAL, WINDOWED, False,
    )  # fmt: skip
    b_dq = gather_dq(
        b_dq, b_q, b_do, b_top, b_total, b_delta, p_k, p_v, s_kn, s_vn, part, hi, o_q, m, shift, window, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_KV, CAUSAL, WINDOWED, True,
    )  # fmt: skip
    store_tile(p_dq + i_b * s_dqb + i_h * s_dqh, o_q, s_dqn, n, b_dq * factor, D, BLOCK_D)


INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)

# --- launchers -----------------------------------------------------------------------------------------------------


TILES = {  # BLOCK_Q, BLOCK_KV, num_warps, num_stages for heads up to 64, 128 and 256 wide
    "sm_80": {  # and every chip not listed; fits the 99 KiB of shared memory of consumer GPUs
        "forward": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        "forward, cut": ((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
        "dq": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    "sm_90": {
        "forward": ((128, 128, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2)),
        "forward, cut": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
        "decode": ((16, 128, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
        "dkdv": ((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)),
        "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 1)),
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
    "float32": {  # everywhere: on plain multipliers, since a tensor core would round to TF32
        "forward": ((64, 32, 8, 2), (32, 16, 8, 1), (16, 16, 8, 1)),
        "forward, cut": ((32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "decode": ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
        "dkdv": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "dq": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
}


def configuration(kernel: str, chip: str, d: int, dv: int, dtype: torch.dtype) -> dict[str, int]:
    """The tiles, warps and pipeline stages of a kernel.

    Chosen from what compiles without a spill and keeps its tensor-core instructions in flight, as
    docs/measured/flash_attention_compile.json shows, not yet from timings.

    Args:
        kernel: "forward", "decode", "delta", "dkdv" or "dq".
        chip: a key of TILES, as `chip_of` gives it.
        d: D. A head that does not fill its power of two is cut by a mask, which costs the forward kernel registers.
        dv: Dv.
        dtype: of q.
    """
    if kernel == "delta":
        return {"BLOCK_Q": 64, "num_warps": 4, "num_stages": 1}
    width = max(_power(d), _power(dv))
    line = "forward, cut" if kernel == "forward" and not width == d == dv else kernel
    tiles = TILES["float32" if dtype == torch.float32 else chip][line][(width > 64) + (width > 128)]
    if INTERPRETED:  # small tiles, so that tests with short sequences have many, whole and cut
        tiles = (32, 16, 4, 1)
    return dict(zip(("BLOCK_Q", "BLOCK_KV", "num_warps", "num_stages"), tiles))


def chip_of(device: torch.device) -> str:
    """The key of TILES for a device."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def _blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """The head widths, and the powers of two that hold them."""
    d, dv = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": dv, "BLOCK_D": _power(d), "BLOCK_DV": _power(dv)}


def _power(x: int) -> int:
    return max(16, 1 << (x - 1).bit_length())


def _masks(causal: bool, window: int) -> dict[str, bool]:
    return {"CAUSAL": causal, "WINDOWED": window > 0}


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each row side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _made_like(x: Tensor, *shape: int) -> Tensor:
    """An empty (B, heads, length, width) in memory laid out as x is, (B, N, H, D) or (B, H, N, D): a module, whose
    projections give the first, then joins the heads without a copy."""
    b, h, n, d = shape
    if x.stride(1) < x.stride(2):
        return torch.empty(b, n, h, d, dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(b, h, n, d, dtype=x.dtype, device=x.device)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for out, top and total."""
    top, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    return _made_like(q, *q.shape[:3], v.shape[-1]), top, total


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out, top and total; one program for each tile of queries and head."""
    (b, h, n, _), m, outputs = q.shape, k.shape[2], _outputs(q, v)
    if outputs[1].numel():
        q, k, v = _rows(q), _rows(k), _rows(v)
        blocks = _blocks(q, v)
        config = configuration("forward", chip_of(q.device), blocks["D"], blocks["DV"], q.dtype)
        with torch.cuda.device_of(q):
            forward_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                q, k, v, *outputs, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *outputs[0].stride()[:3],
                n, m, h, window, scale * math.log2(math.e), SHARE=h // k.shape[1],
                **blocks, **_masks(causal, window), **config,
            )  # fmt: skip
    return outputs


MOST_ROWS = 64  # queries of one key head that decoding holds in one tile
FEWEST_KEYS = 256  # of a part: fewer are not worth a program of their own
MOST_SPLITS = 128


def splits_of(q: Tensor, k: Tensor, window: int) -> int:
    """Into how many parts the keys are split; 0 where the plain kernel is used.

    The rule: decoding takes over where the N · H / G queries of a key head fit one tile of 64 and they see 512 keys or
    more. It splits the keys until there are two programs for each multiprocessor, into parts of at least 256 keys, and
    at most 128 parts.
    """
    (b, _, n, _), (_, g, m, _) = q.shape, k.shape
    seen = min(m, window + n - 1) if window else m
    if n * (q.shape[1] // max(g, 1)) > MOST_ROWS or seen < 2 * FEWEST_KEYS:
        return 0
    chip = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    return max(1, min(MOST_SPLITS, triton.cdiv(2 * chip, b * g), seen // FEWEST_KEYS))


def launch_decode(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, splits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """out, top and total for few queries and many keys: a program for each key head and part of its keys, then one
    for each row."""
    (b, h, n, _), (_, g, m, _), outputs = q.shape, k.shape, _outputs(q, v)
    if not outputs[1].numel():
        return outputs
    q, k, v = _rows(q), _rows(k), _rows(v)
    blocks, rows = _blocks(q, v), n * (h // g)
    config = configuration("decode", chip_of(q.device), blocks["D"], blocks["DV"], q.dtype)
    config["BLOCK_Q"] = _power(rows)
    first = max(0, m - n - window + 1) // config["BLOCK_KV"] * config["BLOCK_KV"] if window else 0
    length = triton.cdiv(triton.cdiv(max(1, m - first), splits), config["BLOCK_KV"]) * config["BLOCK_KV"]
    splits = triton.cdiv(max(1, m - first), length)
    part = torch.empty(b, g, splits, rows, v.shape[-1], dtype=torch.float32, device=q.device)
    part_m, part_l = (torch.empty(b, g, splits, rows, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        decode_kernel[(splits * b * g,)](
            q, k, v, part, part_m, part_l, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            n, m, g, window, scale * math.log2(math.e), first, length, splits, SHARE=h // g,
            **blocks, **_masks(causal, window), **config,
        )  # fmt: skip
        combine_kernel[(b * h * n,)](
            part, part_m, part_l, *outputs, *outputs[0].stride()[:3], n, h, splits, SHARE=h // g, DV=blocks["DV"],
            BLOCK_DV=blocks["BLOCK_DV"], BLOCK_S=_power(splits), num_warps=4 if splits <= 64 else 8,
        )  # fmt: skip
    return outputs


def launch_backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor,
    causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv: first delta, then dq by one kernel, and dk and dv by another."""
    (b, h, n, _), (_, g, m, _) = q.shape, k.shape
    dq, dk, dv = (_made_like(x, *x.shape) for x in (q, k, v))
    q, k, v, d_out = (_rows(x) for x in (q, k, v, d_out))
    delta = torch.empty(top.shape, dtype=torch.float32, device=top.device)
    blocks, masks = _blocks(q, v), _masks(causal, window)
    log2_scale, share = scale * math.log2(math.e), h // max(g, 1)
    about = chip_of(q.device), blocks["D"], blocks["DV"], q.dtype
    strides = [s for x in (q, k, v, d_out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        if top.numel():
            config = configuration("delta", *about)
            delta_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                out, d_out, d_total.contiguous(), delta, *out.stride()[:3], *d_out.stride()[:3], n, h,
                DV=blocks["DV"], BLOCK_DV=blocks["BLOCK_DV"], **config,
            )  # fmt: skip
            config = configuration("dq", *about)
            dq_kernel[(triton.cdiv(n, config["BLOCK_Q"]) * b * h,)](
                q, k, v, d_out, top, total, delta, dq, *strides, *dq.stride()[:3], n, m, h, window, log2_scale, scale,
                SHARE=share, **blocks, **masks, **config,
            )  # fmt: skip
        if k.numel():
            config = configuration("dkdv", *about)
            dkdv_kernel[(triton.cdiv(m, config["BLOCK_KV"]) * b * g,)](
                q, k, v, d_out, top, total, delta, dk, dv, *strides, *dk.stride()[:3], *dv.stride()[:3],
                n, m, g, window, log2_scale, scale, SHARE=share, **blocks, **masks, **config,
            )  # fmt: skip
    return dq, dk, dv


# --- autograd ------------------------------------------------------------------------------------------------------
# custom_op and not triton_op: the latter traces into the launch, which Triton's interpreter cannot follow, and then
# what runs on a GPU would not be what is tested without one.


@torch.library.custom_op("nondual::flash_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if splits := splits_of(q, k, window):
        return launch_decode(q, k, v, causal, window, scale, splits)
    return launch_forward(q, k, v, causal, window, scale)


@_forward.register_fake
def _(q, k, v, causal, window, scale):
    return _outputs(q, v)


@torch.library.custom_op("nondual::flash_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor,
    causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_backward(d_out, d_total, q, k, v, out, top, total, causal, window, scale)


@_backward.register_fake
def _(d_out, d_total, q, k, v, out, top, total, causal, window, scale):
    return tuple(_made_like(x, *x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _differentiate(ctx, d_out, d_top, d_total):
    """top and total are used only as their sum, so both have the same gradient."""
    return *_backward(d_out, d_total, *ctx.saved_tensors, *ctx.options), None, None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        "flash_attention(impl='triton') has no second derivative; "
        "nondual.ops.attention.attention(impl='reference') has one"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)

# --- public --------------------------------------------------------------------------------------------------------


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float = 1.0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention and its log-sum-exp by the kernels; the input is taken as `nondual.ops.flash_attention` has checked it.

    Args:
        q: queries (B, H, N, D), float16, bfloat16 or float32, in any layout; D at most 256.
        k: keys (B, G, M, D).
        v: values (B, G, M, Dv), Dv at most 256.
        causal: each query sees its own position and those before, aligned at the end.
        window: each query sees the last `window` keys, its own included; implies causal.
        scale: factor on q · k.
        return_lse: return the log-sum-exp; otherwise None in its place.

    Returns:
        out (B, H, N, Dv) in q's dtype, and lse (B, H, N), natural, in float32, or None.

    Raises:
        RuntimeError: when differentiated twice.
    """
    if scale <= 0:  # the kernels take a row's maximum before they multiply by scale, which is right if scale > 0
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    out, top, total = _forward(q, k, v, causal or window is not None, window or 0, float(scale))
    return out, (top + total) * math.log(2) if return_lse else None
