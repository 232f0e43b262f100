"""State space duality as Triton kernels: by blocks, forward and backward, without atomics.

Source: Dao and Gu 2024 (2405.21060), section 6 and Listing 1. Symbols: B batch, L steps, H heads, P a head's channels,
N states, G groups of SHARE = H / G heads. Time is cut into chunks of CHUNK steps, and these into tiles of BLOCK rows; t
is an output's step, s an input's. In the kernels i_ is a program's index, o_ are offsets, m_ masks, p_ pointers, s_
strides and b_ blocks on the chip.

Four passes: the log of the decay up to every step (steps), each chunk's own state (states), the states carried from
chunk to chunk (pass), the outputs (output). A single pass would read x, B and C once, but go through a head's chunks
one after another: a batch of one with 24 heads would keep only 24 programs busy, in the backward pass too. Here every
chunk has its own program, and its state is written to memory: P · N float32 numbers for each chunk and head, which for
the usual sizes (P 64, N 128, CHUNK 256) are as many bytes as the chunk's x has in half precision.

In names a factor of decay, exp(Σ Δ A), is a fade. Its log is multiplied by log2(e), for the chip's own exp2, and stored
in two parts, "high" and "low", the highest 24 bits of a float64 and the next 24: high alone would lose the difference
of two nearly equal sums to rounding. Resets are given as `start`: for each step the first step of its sequence, -1
where that lies before this call. Input s reaches output t if start[t] <= s <= t; the state before a chunk reaches t if
start[t] lies before the chunk. Offsets are in 64 bits, sums in float32 and in one order: no atomics, so the same input
gives the same bits. Only the inputs are saved for the backward pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- kernels: named steps ------------------------------------------------------------------------------------------


@triton.jit
def load_rows(p, o_row, s_row, m_row, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows o_row of a matrix (len(o_row), BLOCK_W); 0 where m_row is not, and beyond its WIDTH."""
    o_col = tl.arange(0, BLOCK_W)
    m_tile = m_row[:, None]
    if WIDTH < BLOCK_W:
        m_tile = m_tile & (o_col < WIDTH)[None, :]
    return tl.load(p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_rows(p, o_row, s_row, m_row, b_tile, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Write rows o_row of a matrix, where m_row is."""
    o_col = tl.arange(0, BLOCK_W)
    m_tile = m_row[:, None]
    if WIDTH < BLOCK_W:
        m_tile = m_tile & (o_col < WIDTH)[None, :]
    p_tile = p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]
    tl.store(p_tile, b_tile.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def load_state(p, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A whole state (BLOCK_P, BLOCK_N), in float32; its strides are constants, which saves registers for addresses."""
    o_p, o_n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    p_tile = p + o_p[:, None] * N + o_n[None, :]
    if P == BLOCK_P and N == BLOCK_N:
        b_state = tl.load(p_tile)
    else:
        b_state = tl.load(p_tile, mask=(o_p < P)[:, None] & (o_n < N)[None, :], other=0.0)
    return b_state


# --8<-- [start:narrowed]
@triton.jit
def narrowed(b_tile, b_like):
    """A float32 tile for the tensor cores: the tile in b_like's dtype, and the factor that its products still need.

    In float16, whose range is small, the tile is first divided by its greatest number.
    """
    scale = 1.0
    if b_like.dtype == tl.float16:
        scale = tl.max(tl.abs(b_tile))  # of both axes at once: one after the other, Triton 3.7 fails on sm_100
        scale = tl.where(scale < float("inf"), tl.maximum(scale, 1e-30), 1.0)  # so 1 / scale is finite
        b_tile = b_tile * (1.0 / scale)
    return b_tile.to(b_like.dtype), scale


# --8<-- [end:narrowed]


@triton.jit
def product(b_a, b_b, b_acc):
    """acc + a b, with a in float32 and b in the inputs' dtype."""
    b_narrow, scale = narrowed(b_a, b_b)
    if b_b.dtype == tl.float16:
        return b_acc + tl.dot(b_narrow, b_b, input_precision="ieee") * scale
    return tl.dot(b_narrow, b_b, b_acc, input_precision="ieee")


@triton.jit
def softplus(x):
    """log(1 + exp(x)), to the last place below 0 too: the rounding of 1 + exp(x) is divided out (Kahan)."""
    b_e = tl.exp(tl.minimum(x, 20.0))
    b_u = 1.0 + b_e
    b_d = b_u - 1.0
    b_log = tl.where(b_d == 0, b_e, tl.log(b_u) * (b_e / tl.where(b_d == 0, 1.0, b_d)))
    return tl.where(x > 20.0, x, b_log)


@triton.jit
def load_fade(p_high, p_low, o, m):
    """The log of the decay to each step o from the start of its chunk, or of its sequence if later: in two parts."""
    return tl.load(p_high + o, mask=m, other=0.0), tl.load(p_low + o, mask=m, other=0.0)


# --8<-- [start:between]
@triton.jit
def between(b_high_t, b_low_t, b_high_s, b_low_s, m_seen):
    """The decay from s to t; the parts are shaped so that they broadcast. Masked before the exponential."""
    b_log = (b_high_t - b_high_s) + (b_low_t - b_low_s)
    return tl.exp2(tl.where(m_seen, b_log, float("-inf")))


# --8<-- [end:between]


@triton.jit
def load_gradient(p_dy, p_z, o_row, s_dyl, s_zl, m_row, GATED: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The gradient of y before its gate, in float32 (len(o_row), BLOCK_P)."""
    b_dy = load_rows(p_dy, o_row, s_dyl, m_row, P, BLOCK_P).to(tl.float32)
    if GATED:
        b_z = load_rows(p_z, o_row, s_zl, m_row, P, BLOCK_P).to(tl.float32)
        b_dy = b_dy * b_z * tl.sigmoid(b_z)
    return b_dy


# --- kernels: forward ----------------------------------------------------------------------------------------------
# Layout between kernels: step, high, low and the like (B, H, L), states (B, H, K, P, N) with K chunks, in float32.


@triton.jit(do_not_specialize=["length", "chunks"])
def steps_kernel(
    p_delta, p_a, p_bias, p_start, p_step, p_high, p_low, s_db, s_dl, s_dh, length, heads, chunks,
    SOFTPLUS: tl.constexpr, RESET: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the step lengths of a chunk of a head, and the log of the decay from the chunk's start to each."""
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    a = tl.load(p_a + i_h).to(tl.float64) * 1.4426950408889634
    bias = tl.load(p_bias + i_h)
    p_delta += i_b * s_db + i_h * s_dh
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    m_t = o_t < length
    b_step = tl.load(p_delta + o_t.to(tl.int64) * s_dl, mask=m_t, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        b_step = softplus(b_step)
    b_step = tl.where(m_t, b_step, 0.0)
    tl.store(p_step + i_bh * length + o_t, b_step, mask=m_t)
    if RESET:  # sum each row by itself, from its own start: a running sum would carry a NaN across a reset
        b_start = tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)
        b_sum = tl.zeros((CHUNK,), tl.float64)
        for first in tl.range(i_c * CHUNK, i_c * CHUNK + CHUNK, BLOCK):
            o_s = first + tl.arange(0, BLOCK)
            b_rate = tl.load(p_delta + o_s.to(tl.int64) * s_dl, mask=o_s < length, other=0.0).to(tl.float32) + bias
            if SOFTPLUS:
                b_rate = softplus(b_rate)
            b_rate = log_fade(b_rate, a)
            m_seen = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None])
            b_sum += tl.sum(tl.where(m_seen, b_rate[None, :], 0.0), 1)
    else:
        b_sum = tl.cumsum(log_fade(b_step, a), 0)
    b_high = b_sum.to(tl.float32)
    tl.store(p_high + i_bh * length + o_t, b_high, mask=m_t)
    tl.store(p_low + i_bh * length + o_t, (b_sum - b_high.to(tl.float64)).to(tl.float32), mask=m_t)


@triton.jit
def log_fade(b_step, a):
    """Δ A in float64, to the base 2, and -1500 at the least: exp2 gives 0 there already, and larger sums are less
    precise. NaN stays NaN."""
    b_rate = b_step.to(tl.float64) * a
    return tl.where(b_rate < -1500.0, -1500.0, b_rate)


@triton.jit(do_not_specialize=["length", "chunks"])
def states_kernel(
    p_v, p_z, p_m, p_step, p_high, p_low, p_start, p_states,
    s_vb, s_vl, s_vh, s_zb, s_zl, s_zh, s_mb, s_ml, s_mg, length, heads, chunks,
    BACKWARD: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: what a chunk of a head adds to the state, (BLOCK_P, BLOCK_N) of it.

    Forward, Σ_s (decay from s to the chunk's end) Δ_s x_s B_sᵀ. Backward, with dy for x and C for B, what it adds to
    the gradient of the state before it: Σ_t (decay from the chunk's start to t) dy_t C_tᵀ.
    """
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_n = tl.program_id(0) % tiles_n
    i_c = tl.program_id(0) // tiles_n % chunks
    i_bh = (tl.program_id(0) // tiles_n // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_v += i_b * s_vb + i_h * s_vh
    p_z += i_b * s_zb + i_h * s_zh
    p_m += i_b * s_mb + i_h // SHARE * s_mg
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum(i_c * CHUNK + CHUNK, length)
    p_high += i_bh * length
    p_low += i_bh * length
    high_end, low_end = tl.load(p_high + end - 1), tl.load(p_low + end - 1)
    b_acc = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for first in tl.range(i_c * CHUNK, end, BLOCK):
        o_t = first + tl.arange(0, BLOCK)
        m_t = o_t < end
        b_high, b_low = load_fade(p_high, p_low, o_t, m_t)
        if BACKWARD:
            b_v = load_gradient(p_v, p_z, o_t, s_vl, s_zl, m_t, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            if RESET:
                m_t = m_t & (tl.load(p_start + i_b * length + o_t, mask=m_t, other=0) < i_c * CHUNK)
            b_w = tl.exp2(tl.where(m_t, b_high + b_low, float("-inf")))
        else:
            b_v = load_rows(p_v, o_t, s_vl, m_t, P, BLOCK_P).to(tl.float32)
            if RESET:
                m_t = m_t & (o_t >= tl.load(p_start + i_b * length + end - 1))
            b_w = between(high_end, low_end, b_high, b_low, m_t)
            b_w = b_w * tl.load(p_step + i_bh * length + o_t, mask=m_t, other=0.0)
        b_v = b_v * b_w[:, None]
        if RESET:  # 0 · NaN would be NaN
            b_v = tl.where(m_t[:, None], b_v, 0.0)
        m_m = m_t[:, None] & (o_n < N)[None, :]
        b_m = tl.load(p_m + o_t.to(tl.int64)[:, None] * s_ml + o_n[None, :], mask=m_m, other=0.0)  # (BLOCK, BLOCK_N)
        b_v, scale = narrowed(b_v, b_m)
        b_acc += tl.dot(tl.trans(b_m), b_v, input_precision="ieee") * scale
    o_p = tl.arange(0, BLOCK_P)
    p_tile = p_states + (i_bh * chunks + i_c) * P * N + o_p[:, None] * N + o_n[None, :]
    tl.store(p_tile, tl.trans(b_acc), mask=(o_p < P)[:, None] & (o_n < N)[None, :])


# --8<-- [start:pass]
@triton.jit(do_not_specialize=["length", "chunks"])
def pass_kernel(
    p_states, p_first, p_high, p_low, p_start, p_last, length, heads, chunks,
    RESET: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a piece of a head's state, from chunk to chunk. Replaces each chunk's own by the state before it."""
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    o = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    b_h = tl.load(p_first + i_bh * SIZE + o, mask=m, other=0.0)
    for i_c in tl.range(0, chunks):
        p_chunk = p_states + (i_bh * chunks + i_c) * SIZE + o
        b_own = tl.load(p_chunk, mask=m, other=0.0)
        tl.store(p_chunk, b_h, mask=m)
        end = tl.minimum(i_c * CHUNK + CHUNK, length) - 1
        fade = tl.exp2(tl.load(p_high + i_bh * length + end) + tl.load(p_low + i_bh * length + end))
        b_h = b_h * fade
        if RESET:
            b_h = tl.where(tl.load(p_start + i_bh // heads * length + end) < i_c * CHUNK, b_h, 0.0)
        b_h += b_own
    tl.store(p_last + i_bh * SIZE + o, b_h, mask=m)


# --8<-- [end:pass]


# --8<-- [start:output]
@triton.jit(do_not_specialize=["length", "chunks", "tiles"])
def output_kernel(
    p_x, p_b, p_c, p_d, p_z, p_step, p_high, p_low, p_start, p_states, p_y,
    s_xb, s_xl, s_xh, s_bb, s_bl, s_bg, s_cb, s_cl, s_cg, s_zb, s_zl, s_zh, length, heads, chunks, tiles,
    SKIP: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of a tile of steps of a head."""
    i_tile = tl.program_id(0) % tiles
    i_c = i_tile * BLOCK // CHUNK
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_x += i_b * s_xb + i_h * s_xh
    p_b += i_b * s_bb + i_h // SHARE * s_bg
    p_c += i_b * s_cb + i_h // SHARE * s_cg
    p_z += i_b * s_zb + i_h * s_zh
    p_step += i_bh * length
    p_high += i_bh * length
    p_low += i_bh * length
    begin = i_c * CHUNK
    o_t = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < length
    b_c = load_rows(p_c, o_t, s_cl, m_t, N, BLOCK_N)  # (BLOCK, BLOCK_N)
    b_high_t, b_low_t = load_fade(p_high, p_low, o_t, m_t)  # (BLOCK,)
    b_start = o_t * 0 - 1
    if RESET:
        b_start = tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)

    # the state before the chunk
    o_p = tl.arange(0, BLOCK_P)
    b_h = load_state(p_states + (i_bh * chunks + i_c) * P * N, P, N, BLOCK_P, BLOCK_N)  # (BLOCK_P, BLOCK_N)
    b_h, scale = narrowed(b_h, b_c)
    b_y = tl.dot(b_c, tl.trans(b_h), input_precision="ieee") * scale  # (BLOCK, BLOCK_P)
    m_reached = m_t & (b_start < begin)
    b_y = b_y * tl.exp2(tl.where(m_reached, b_high_t + b_low_t, float("-inf")))[:, None]
    if RESET:
        b_y = tl.where(m_reached[:, None], b_y, 0.0)

    # within the chunk
    for first in tl.range(begin, i_tile * BLOCK + BLOCK, BLOCK):
        o_s = first + tl.arange(0, BLOCK)
        m_s = o_s < length
        b_b = load_rows(p_b, o_s, s_bl, m_s, N, BLOCK_N)  # (BLOCK, BLOCK_N)
        b_w = tl.dot(b_c, tl.trans(b_b), input_precision="ieee")  # (BLOCK, BLOCK)
        b_high_s, b_low_s = load_fade(p_high, p_low, o_s, m_s)
        m_seen = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None]) & m_t[:, None]
        b_w = b_w * between(b_high_t[:, None], b_low_t[:, None], b_high_s[None, :], b_low_s[None, :], m_seen)
        b_w = tl.where(m_seen, b_w * tl.load(p_step + o_s, mask=m_s, other=0.0)[None, :], 0.0)
        b_x = load_rows(p_x, o_s, s_xl, m_s, P, BLOCK_P)  # (BLOCK, BLOCK_P)
        b_y = product(b_w, b_x, b_y)

    if SKIP:
        b_d = tl.load(p_d + i_h * P + o_p, mask=o_p < P, other=0.0)  # (BLOCK_P,)
        b_y += load_rows(p_x, o_t, s_xl, m_t, P, BLOCK_P).to(tl.float32) * b_d[None, :]
    if GATED:
        b_z = load_rows(p_z, o_t, s_zl, m_t, P, BLOCK_P).to(tl.float32)
        b_y = b_y * b_z * tl.sigmoid(b_z)
    store_rows(p_y + (i_b * length * heads + i_h) * P, o_t, heads * P, m_t, b_y, P, BLOCK_P)


# --8<-- [end:output]


# --- kernels: backward ---------------------------------------------------------------------------------------------
# With W = decay · Δ_s · (C_t · B_s), y = W x, dW = dy xᵀ and Q = W ∘ dW, the gradient of the log decay of step r is the
# sum of Q[t, s] over s < r <= t. It is summed directly, in four parts (rows, columns, over, own): as the sums of all
# rows less the sums of all columns it would be the small difference of large numbers.


@triton.jit(do_not_specialize=["length", "chunks"])
def pass_back_kernel(
    p_states, p_grads, p_last, p_high, p_low, p_start, p_first, p_whole, length, heads, chunks,
    RESET: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a piece of a head's state, from the last chunk to the first.

    p_grads holds what each chunk's outputs add to the gradient of the state before it, and is overwritten by the
    gradient of the state after it. p_whole receives this piece's part of the gradient of the whole chunk's log decay.
    """
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    o = i_tile * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    b_dh = tl.load(p_last + i_bh * SIZE + o, mask=m, other=0.0)
    for i in tl.range(0, chunks):
        i_c = chunks - 1 - i
        i_chunk = i_bh * chunks + i_c
        b_own = tl.load(p_grads + i_chunk * SIZE + o, mask=m, other=0.0)
        tl.store(p_grads + i_chunk * SIZE + o, b_dh, mask=m)
        end = tl.minimum(i_c * CHUNK + CHUNK, length) - 1
        b_dh = b_dh * tl.exp2(tl.load(p_high + i_bh * length + end) + tl.load(p_low + i_bh * length + end))
        b_h = tl.load(p_states + i_chunk * SIZE + o, mask=m, other=0.0)
        if RESET:
            crosses = tl.load(p_start + i_bh // heads * length + end) < i_c * CHUNK
            b_dh = tl.where(crosses, b_dh, 0.0)
            b_h = tl.where(crosses, b_h, 0.0)
        tl.store(p_whole + i_chunk * tiles + i_tile, tl.sum(b_h * b_dh, 0))
        b_dh += b_own
    tl.store(p_first + i_bh * SIZE + o, b_dh, mask=m)


@triton.jit(do_not_specialize=["batch", "length", "chunks", "tiles", "splits"])
def rows_kernel(
    p_x, p_b, p_c, p_d, p_z, p_dy, p_step, p_high, p_low, p_start, p_states, p_dc, p_dz, p_rows, p_over, p_own,
    p_before,
    s_xb, s_xl, s_xh, s_bb, s_bl, s_bg, s_cb, s_cl, s_cg, s_zb, s_zl, s_zh, s_dyb, s_dyl, s_dyh,
    batch, length, heads, chunks, tiles, splits,
    SKIP: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr, PER: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of output steps, for PER heads of a group: their part of dC, each one's dz, and Q's rows."""
    groups = heads // SHARE
    i_tile = tl.program_id(0) % tiles
    i_c = i_tile * BLOCK // CHUNK
    i_split = tl.program_id(0) // tiles % splits
    i_bg = (tl.program_id(0) // tiles // splits).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    p_b += i_b * s_bb + i_g * s_bg
    p_c += i_b * s_cb + i_g * s_cg
    begin = i_c * CHUNK
    o_t = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < length
    o_p = tl.arange(0, BLOCK_P)
    b_start = o_t * 0 - 1
    if RESET:
        b_start = tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)
    m_reached = m_t & (b_start < begin)
    b_c = load_rows(p_c, o_t, s_cl, m_t, N, BLOCK_N)  # (BLOCK, BLOCK_N)
    b_dc = tl.zeros((BLOCK, BLOCK_N), tl.float32)

    for i_h in tl.range(i_g * SHARE + i_split * PER, i_g * SHARE + tl.minimum(i_split * PER + PER, SHARE)):
        i_bh = i_b * heads + i_h
        p_xh = p_x + i_b * s_xb + i_h * s_xh
        p_zh = p_z + i_b * s_zb + i_h * s_zh
        p_dyh = p_dy + i_b * s_dyb + i_h * s_dyh
        b_high_t, b_low_t = load_fade(p_high + i_bh * length, p_low + i_bh * length, o_t, m_t)  # (BLOCK,)
        b_dy = load_gradient(p_dyh, p_zh, o_t, s_dyl, s_zl, m_t, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
        b_dyn, s_dyn = narrowed(b_dy, b_c)

        # the state before the chunk
        b_h = load_state(p_states + (i_bh * chunks + i_c) * P * N, P, N, BLOCK_P, BLOCK_N)  # (BLOCK_P, BLOCK_N)
        b_h, s_h = narrowed(b_h, b_c)
        b_fade = tl.exp2(tl.where(m_reached, b_high_t + b_low_t, float("-inf")))
        b_y = tl.dot(b_c, tl.trans(b_h), input_precision="ieee") * (b_fade * s_h)[:, None]  # (BLOCK, BLOCK_P)
        b_more = tl.dot(b_dyn, b_h, input_precision="ieee") * (b_fade * s_dyn * s_h)[:, None]  # (BLOCK, BLOCK_N)
        if RESET:
            b_y = tl.where(m_reached[:, None], b_y, 0.0)
            b_more = tl.where(m_reached[:, None], b_more, 0.0)
        b_dc += b_more
        tl.store(p_before + i_bh * length + o_t, tl.sum(b_y * b_dy, 1), mask=m_t)

        # within the chunk
        b_rows = tl.zeros((BLOCK,), tl.float32)
        for first in tl.range(begin, i_tile * BLOCK + BLOCK, BLOCK):
            o_s = first + tl.arange(0, BLOCK)
            m_s = o_s < length
            m_seen = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None]) & m_t[:, None]
            b_high_s, b_low_s = load_fade(p_high + i_bh * length, p_low + i_bh * length, o_s, m_s)
            b_fade_ts = between(b_high_t[:, None], b_low_t[:, None], b_high_s[None, :], b_low_s[None, :], m_seen)
            b_fade_ts *= tl.load(p_step + i_bh * length + o_s, mask=m_s, other=0.0)[None, :]
            b_x = load_rows(p_xh, o_s, s_xl, m_s, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            b_dw = tl.dot(b_dyn, tl.trans(b_x), input_precision="ieee") * s_dyn  # (BLOCK, BLOCK)
            b_dw = tl.where(m_seen, b_dw * b_fade_ts, 0.0)
            b_b = load_rows(p_b, o_s, s_bl, m_s, N, BLOCK_N)  # (BLOCK, BLOCK_N)
            b_scores = tl.dot(b_c, tl.trans(b_b), input_precision="ieee")  # (BLOCK, BLOCK)
            b_q = tl.where(m_seen & (o_s[None, :] != o_t[:, None]), b_scores * b_dw, 0.0)
            if first == i_tile * BLOCK:  # Q across step r with s and t both in this tile
                b_passed = tl.where(o_s[None, :] <= o_t[:, None], tl.cumsum(b_q, 1) - b_q, 0.0)
                tl.store(p_own + i_bh * length + o_s, tl.sum(b_passed, 0), mask=m_s)
            else:
                i_over = (i_bh * tiles + i_tile) * (CHUNK // BLOCK) + (first - begin) // BLOCK
                tl.store(p_over + i_over, tl.sum(b_rows, 0))  # Q across the earlier tile: s before it, t in this
                b_rows += tl.sum(b_q, 1)
            b_dc = product(b_dw, b_b, b_dc)
            if GATED:
                b_y = product(tl.where(m_seen, b_scores * b_fade_ts, 0.0), b_x, b_y)
        tl.store(p_rows + i_bh * length + o_t, b_rows, mask=m_t)

        if GATED:
            if SKIP:
                b_d = tl.load(p_d + i_h * P + o_p, mask=o_p < P, other=0.0)  # (BLOCK_P,)
                b_y += load_rows(p_xh, o_t, s_xl, m_t, P, BLOCK_P).to(tl.float32) * b_d[None, :]
            b_z = load_rows(p_zh, o_t, s_zl, m_t, P, BLOCK_P).to(tl.float32)
            b_s = tl.sigmoid(b_z)
            b_dz = load_rows(p_dyh, o_t, s_dyl, m_t, P, BLOCK_P).to(tl.float32) * b_y * b_s * (1 + b_z * (1 - b_s))
            store_rows(p_dz + (i_b * length * heads + i_h) * P, o_t, heads * P, m_t, b_dz, P, BLOCK_P)

    # parts are (splits, B, L, G, N)
    p_dc += ((i_split * batch + i_b) * length * groups + i_g) * N
    store_rows(p_dc, o_t, groups * N, m_t, b_dc, N, BLOCK_N)


@triton.jit(do_not_specialize=["batch", "length", "chunks", "tiles", "splits"])
def columns_kernel(
    p_x, p_b, p_c, p_d, p_z, p_dy, p_step, p_high, p_low, p_start, p_grads, p_db, p_dx, p_dd, p_dstep, p_columns,
    p_after,
    s_xb, s_xl, s_xh, s_bb, s_bl, s_bg, s_cb, s_cl, s_cg, s_zb, s_zl, s_zh, s_dyb, s_dyl, s_dyh,
    batch, length, heads, chunks, tiles, splits,
    SKIP: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr, PER: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of input steps, for PER heads of a group: their part of dB, each one's dx, and Q's columns.

    Tiles are transposed: rows are inputs, columns outputs. The gradients of D, and of Δ as x's factor, are summed too.
    """
    groups = heads // SHARE
    i_tile = tl.program_id(0) % tiles
    i_c = i_tile * BLOCK // CHUNK
    i_split = tl.program_id(0) // tiles % splits
    i_bg = (tl.program_id(0) // tiles // splits).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    p_b += i_b * s_bb + i_g * s_bg
    p_c += i_b * s_cb + i_g * s_cg
    begin = i_c * CHUNK
    end = tl.minimum(begin + CHUNK, length)
    o_s = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < length
    o_p = tl.arange(0, BLOCK_P)
    m_kept = m_s
    if RESET:
        m_kept = m_s & (o_s >= tl.load(p_start + i_b * length + end - 1))
    b_b = load_rows(p_b, o_s, s_bl, m_s, N, BLOCK_N)  # (BLOCK, BLOCK_N)
    b_db = tl.zeros((BLOCK, BLOCK_N), tl.float32)

    for i_h in tl.range(i_g * SHARE + i_split * PER, i_g * SHARE + tl.minimum(i_split * PER + PER, SHARE)):
        i_bh = i_b * heads + i_h
        p_zh = p_z + i_b * s_zb + i_h * s_zh
        p_dyh = p_dy + i_b * s_dyb + i_h * s_dyh
        b_high_s, b_low_s = load_fade(p_high + i_bh * length, p_low + i_bh * length, o_s, m_s)  # (BLOCK,)
        b_step = tl.load(p_step + i_bh * length + o_s, mask=m_s, other=0.0)  # (BLOCK,)
        b_x = load_rows(p_x + i_b * s_xb + i_h * s_xh, o_s, s_xl, m_s, P, BLOCK_P)  # (BLOCK, BLOCK_P)

        # from the gradient of the state after the chunk; b_du is the gradient of u = Δ x
        b_dh = load_state(p_grads + (i_bh * chunks + i_c) * P * N, P, N, BLOCK_P, BLOCK_N)  # (BLOCK_P, BLOCK_N)
        b_dh, s_dh = narrowed(b_dh, b_b)
        high_end, low_end = tl.load(p_high + i_bh * length + end - 1), tl.load(p_low + i_bh * length + end - 1)
        b_fade = between(high_end, low_end, b_high_s, b_low_s, m_kept)
        b_du = tl.dot(b_b, tl.trans(b_dh), input_precision="ieee") * (b_fade * s_dh)[:, None]  # (BLOCK, BLOCK_P)
        b_more = tl.dot(b_x, b_dh, input_precision="ieee") * (b_fade * b_step * s_dh)[:, None]  # (BLOCK, BLOCK_N)
        if RESET:
            b_du = tl.where(m_kept[:, None], b_du, 0.0)
            b_more = tl.where(m_kept[:, None], b_more, 0.0)
        b_db += b_more
        tl.store(p_after + i_bh * length + o_s, tl.sum(b_du * b_x.to(tl.float32), 1) * b_step, mask=m_s)

        # within the chunk
        b_columns = tl.zeros((BLOCK,), tl.float32)
        for first in tl.range(i_tile * BLOCK, end, BLOCK):
            o_t = first + tl.arange(0, BLOCK)
            m_t = o_t < length
            m_seen = (o_s[:, None] <= o_t[None, :]) & m_t[None, :]
            if RESET:
                m_seen = m_seen & (o_s[:, None] >= tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)[None, :])
            b_high_t, b_low_t = load_fade(p_high + i_bh * length, p_low + i_bh * length, o_t, m_t)
            b_fade_st = between(b_high_t[None, :], b_low_t[None, :], b_high_s[:, None], b_low_s[:, None], m_seen)
            b_c = load_rows(p_c, o_t, s_cl, m_t, N, BLOCK_N)  # (BLOCK, BLOCK_N)
            b_scores = tl.dot(b_b, tl.trans(b_c), input_precision="ieee")  # (BLOCK, BLOCK)
            b_dy = load_gradient(p_dyh, p_zh, o_t, s_dyl, s_zl, m_t, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            b_dyn, s_dyn = narrowed(b_dy, b_b)
            b_du = product(tl.where(m_seen, b_scores * b_fade_st * s_dyn, 0.0), b_dyn, b_du)
            b_dw = tl.dot(b_x, tl.trans(b_dyn), input_precision="ieee") * s_dyn  # (BLOCK, BLOCK)
            b_dw = tl.where(m_seen, b_dw * b_fade_st * b_step[:, None], 0.0)
            if first != i_tile * BLOCK:  # the rows kernel sums Q of the tile on the diagonal
                b_columns += tl.sum(b_scores * b_dw, 1)
            b_db = product(b_dw, b_c, b_db)
        tl.store(p_columns + i_bh * length + o_s, b_columns, mask=m_s)
        tl.store(p_dstep + i_bh * length + o_s, tl.sum(b_du * b_x.to(tl.float32), 1), mask=m_s)

        b_du = b_du * b_step[:, None]
        if SKIP:
            b_dy = load_gradient(p_dyh, p_zh, o_s, s_dyl, s_zl, m_s, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            b_d = tl.load(p_d + i_h * P + o_p, mask=o_p < P, other=0.0)  # (BLOCK_P,)
            b_du += b_dy * b_d[None, :]
            p_part = p_dd + ((i_b * tiles + i_tile) * heads + i_h) * P  # parts are (B, tiles, H, P)
            tl.store(p_part + o_p, tl.sum(b_dy * b_x.to(tl.float32), 0), mask=o_p < P)
        store_rows(p_dx + (i_b * length * heads + i_h) * P, o_s, heads * P, m_s, b_du, P, BLOCK_P)

    p_db += ((i_split * batch + i_b) * length * groups + i_g) * N  # parts are (splits, B, L, G, N)
    store_rows(p_db, o_s, groups * N, m_s, b_db, N, BLOCK_N)


@triton.jit(do_not_specialize=["length", "chunks", "tiles", "pieces"])
def steps_back_kernel(
    p_delta, p_a, p_bias, p_step, p_rows, p_over, p_own, p_before, p_columns, p_after, p_whole, p_dstep,
    p_ddelta, p_da, p_dbias, s_db, s_dl, s_dh, length, heads, chunks, tiles, pieces,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """One program: ddelta of a chunk of a head, and the chunk's parts of dA and dbias.

    The gradient of a step's log decay is the sum of four: Q across the step (with t in its tile, with s in its tile,
    with both, with neither); what the outputs from the step on read of the state before the chunk; what the inputs
    before the step leave in the state after the chunk; and what is left of the state before in the state after.
    """
    own: tl.constexpr = CHUNK // BLOCK  # tiles of a chunk
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_tile = tl.arange(0, own)
    o_rt = i_c * CHUNK + o_tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_rows = tl.load(p_rows + i_bh * length + o_rt, mask=o_rt < length, other=0.0)  # (own, BLOCK)
    b_columns = tl.load(p_columns + i_bh * length + o_rt, mask=o_rt < length, other=0.0)
    i_row = i_c * own + o_tile[:, None]
    m_over = (o_tile[:, None] > o_tile[None, :]) & (i_row < tiles)
    b_over = tl.load(p_over + (i_bh * tiles + i_row) * own + o_tile[None, :], mask=m_over, other=0.0)  # (own, own)
    b_q = tl.cumsum(b_rows, 1, reverse=True) + (tl.cumsum(b_columns, 1) - b_columns) + tl.sum(b_over, 0)[:, None]

    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    m_t = o_t < length
    o = i_bh * length + o_t
    b_before = tl.load(p_before + o, mask=m_t, other=0.0)
    b_after = tl.load(p_after + o, mask=m_t, other=0.0)
    o_piece = tl.arange(0, BLOCK_PIECES)
    b_whole = tl.load(p_whole + (i_bh * chunks + i_c) * pieces + o_piece, mask=o_piece < pieces, other=0.0)
    b_rate = tl.reshape(b_q, (CHUNK,)) + tl.load(p_own + o, mask=m_t, other=0.0)
    b_rate += tl.cumsum(b_before, 0, reverse=True) + (tl.cumsum(b_after, 0) - b_after) + tl.sum(b_whole, 0)
    b_rate = tl.where(m_t, b_rate, 0.0)

    b_step = tl.load(p_step + o, mask=m_t, other=0.0)
    b_d = tl.load(p_dstep + o, mask=m_t, other=0.0) + b_rate * tl.load(p_a + i_h)
    if SOFTPLUS:
        p_delta += i_b * s_db + i_h * s_dh
        b_raw = tl.load(p_delta + o_t.to(tl.int64) * s_dl, mask=m_t, other=0.0).to(tl.float32) + tl.load(p_bias + i_h)
        b_d *= tl.where(b_raw > 20.0, 1.0, tl.sigmoid(b_raw))
    tl.store(p_ddelta + (i_b * length + o_t) * heads + i_h, b_d.to(p_ddelta.dtype.element_ty), mask=m_t)
    tl.store(p_da + i_bh * chunks + i_c, tl.sum(b_step * b_rate, 0))
    tl.store(p_dbias + i_bh * chunks + i_c, tl.sum(b_d, 0))


INTERPRETED = not isinstance(steps_kernel, triton.runtime.JITFunction)

# --- launchers -----------------------------------------------------------------------------------------------------

CHUNK = {"half": 256, "float32": 64}  # float32 runs on plain multipliers: less to multiply within a chunk
TILES = {  # BLOCK, num_warps, num_stages for N up to 128 and up to 256; rows and columns have the same BLOCK
    "sm_80": {  # and every chip not listed; fits the 99 KiB of shared memory of consumer GPUs
        "states": ((32, 8, 2), (32, 8, 2)),
        "output": ((64, 4, 2), (64, 4, 2)),
        "rows": ((32, 8, 1), (16, 8, 1)),
        "columns": ((32, 8, 1), (16, 8, 1)),
    },
    "sm_90": {
        "states": ((64, 8, 2), (64, 8, 2)),
        "output": ((64, 4, 2), (64, 8, 2)),
        "rows": ((32, 8, 1), (32, 8, 1)),
        "columns": ((32, 8, 1), (32, 8, 1)),
    },
    "sm_100": {
        "states": ((64, 4, 2), (64, 4, 2)),
        "output": ((64, 4, 2), (64, 4, 2)),
        "rows": ((32, 8, 1), (32, 8, 1)),
        "columns": ((32, 8, 1), (32, 8, 1)),
    },
    "float32": {  # everywhere: on plain multipliers, since a tensor core would round to TF32
        "states": ((16, 8, 1), (16, 8, 1)),
        "output": ((16, 8, 1), (16, 8, 1)),
        "rows": ((16, 8, 1), (16, 8, 1)),
        "columns": ((16, 8, 1), (16, 8, 1)),
    },
}
HELD = {"sm_90": (8192, 16384), "sm_100": (8192, 16384)}  # numbers of a state in a program, for N as above; else 8192
PIECE = 1024  # numbers of a state that one program of pass and pass_back carries


def configuration(kernel: str, chip: str, p: int, n: int, dtype: torch.dtype, chunk: int) -> dict[str, int]:
    """The tiles, warps and pipeline stages of a kernel.

    Chosen from what compiles with no spill forward and few backward, as docs/measured/ssd_compile.json shows, not yet
    from timings.

    Args:
        kernel: "steps", "states", "pass", "output", "pass_back", "rows", "columns" or "steps_back".
        chip: a key of TILES, as `chip_of` gives it.
        p: P.
        n: N.
        dtype: of x.
        chunk: CHUNK.
    """
    if kernel in ("pass", "pass_back"):
        return {"CHUNK": chunk, "BLOCK": min(PIECE, _power(p * n)), "num_warps": 4, "num_stages": 1}
    if kernel == "steps":
        return {"CHUNK": chunk, "BLOCK": 16, "num_warps": 4, "num_stages": 1}
    if kernel == "steps_back":
        block = configuration("rows", chip, p, n, dtype, chunk)["BLOCK"]
        return {"CHUNK": chunk, "BLOCK": block, "num_warps": 4, "num_stages": 1}
    line = TILES["float32" if dtype == torch.float32 else chip][kernel]
    block, warps, stages = line[n > 128]
    if INTERPRETED:  # small tiles, so that tests with short sequences have many
        block = 16
    widest = 128 if kernel == "states" else 256
    return {
        "BLOCK_P": _power(p), "BLOCK_N": min(_power(n), widest), "CHUNK": chunk, "BLOCK": min(block, chunk),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def chunk_of(dtype: torch.dtype) -> int:
    """Steps of a chunk, where the caller does not say."""
    if INTERPRETED:
        return 32
    return CHUNK["float32" if dtype == torch.float32 else "half"]


def chip_of(device: torch.device) -> str:
    """The key of TILES for a device."""
    if device.type != "cuda" or torch.version.hip:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def parts_of(chip: str, p: int, n: int, dtype: torch.dtype) -> int:
    """Into how many heads of fewer channels a head is split, so that a program can hold its state: the channels of a
    head share A, Δ, B and C, and are independent otherwise."""
    held = HELD.get("float32" if dtype == torch.float32 else chip, (8192, 8192))[n > 128]
    parts = 1
    while _power(triton.cdiv(p, parts)) * _power(n) > held:
        parts *= 2
    return parts


def apart(v: Tensor | None, axis: int, parts: int) -> Tensor | None:
    """(…, H, P, …) as (…, H · parts, P / parts, …), with zeros where P does not divide; `axis` is that of H."""
    if v is None or parts == 1:
        return v
    if missing := -v.shape[axis + 1] % parts:
        v = torch.cat([v, v.new_zeros(*v.shape[: axis + 1], missing, *v.shape[axis + 2 :])], axis + 1)
    return v.unflatten(axis + 1, (parts, -1)).flatten(axis, axis + 1)


def together(v: Tensor, axis: int, parts: int, p: int) -> Tensor:
    """The inverse of `apart`; P is p."""
    if parts == 1:
        return v
    return v.unflatten(axis, (-1, parts)).flatten(axis + 1, axis + 2).narrow(axis + 1, 0, p).contiguous()


def heads_of_a_program(programs: int, share: int, device: torch.device) -> int:
    """How many heads of a group the programs of dB and dC add up themselves, so that there are two programs for each
    multiprocessor where the heads suffice: each further part costs its own copy of dB and dC in memory."""
    chip = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    splits = min(share, triton.cdiv(2 * chip, max(1, programs)))
    return triton.cdiv(share, splits)


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """x with the numbers of each row side by side, copied only if they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


class Launcher:
    """One call of the operator: its sizes, its inputs as the kernels take them, and the launch of each kernel."""

    def __init__(self, x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk):
        self.width, self.parts = x.shape[3], parts_of(chip_of(x.device), x.shape[3], B.shape[3], x.dtype)
        x, z, D, state = (apart(v, axis, self.parts) for v, axis in ((x, 2), (z, 2), (D, 0), (state, 1)))
        if self.parts > 1:
            delta, A, delta_bias = (
                None if v is None else v.repeat_interleave(self.parts, -1) for v in (delta, A, delta_bias)
            )
        self.batch, self.length, self.heads, self.p = x.shape
        self.groups, self.n = B.shape[2:]
        self.chunk, self.chunks = chunk, triton.cdiv(self.length, chunk)
        self.x, self.B, self.C, self.z = _rows(x), _rows(B), _rows(C), x if z is None else _rows(z)
        self.delta, self.A, self.D, self.softplus = delta, A.contiguous(), A if D is None else D.contiguous(), softplus
        self.bias = self.room(self.heads).zero_() if delta_bias is None else delta_bias.contiguous()
        self.first = self.states(1).zero_() if state is None else state.contiguous()
        self.start = self.A if reset is None else starts(reset)  # without resets it is not read
        self.given = {"SKIP": D is not None, "GATED": z is not None, "RESET": reset is not None}
        self.about = chip_of(x.device), self.p, self.n, x.dtype, chunk

    def room(self, *shape: int) -> Tensor:
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def states(self, chunks: int) -> Tensor:
        """An empty tensor for the states of so many chunks."""
        return self.room(self.batch, self.heads, chunks, self.p, self.n)

    def launch(self, name: str, per_head: int, *args, heads: int = 0, **constants) -> None:
        """Run a kernel, in `per_head` programs for each batch and head (or each group, or the like)."""
        programs = self.batch * (heads or self.heads) * per_head
        with torch.cuda.device_of(self.x):
            globals()[f"{name}_kernel"][(programs,)](*args, **constants, **configuration(name, *self.about))

    def sizes(self) -> tuple[int, int, int]:
        return self.length, self.heads, self.chunks

    def constants(self, *names: str) -> dict[str, int]:
        """The constants of the kernels that multiply, and which arguments were given."""
        share = {"SHARE": self.heads // self.groups, "P": self.p, "N": self.n}
        return share | {name: self.given[name] for name in names}

    def strides(self, *tensors: Tensor) -> list[int]:
        return [s for x in tensors for s in x.stride()[:3]]

    def steps(self) -> None:
        """Each step's length, and the log of the decay up to it in two parts."""
        self.step, self.high, self.low = (self.room(self.batch, self.heads, self.length) for _ in range(3))
        self.launch(
            "steps", self.chunks, self.delta, self.A, self.bias, self.start, self.step, self.high, self.low,
            *self.delta.stride(), *self.sizes(), SOFTPLUS=self.softplus, RESET=self.given["RESET"],
        )  # fmt: skip

    def fades(self) -> tuple[Tensor, ...]:
        return self.step, self.high, self.low, self.start

    def own_states(self, v: Tensor, m: Tensor, backward: bool) -> Tensor:
        """What each chunk adds to the state, or to its gradient."""
        states, tiles = self.states(self.chunks), triton.cdiv(self.n, min(_power(self.n), 128))
        self.launch(
            "states", self.chunks * tiles, v, self.z, m, *self.fades(), states, *self.strides(v, self.z, m),
            *self.sizes(), BACKWARD=backward, **self.constants("GATED", "RESET"),
        )  # fmt: skip
        return states

    def tiles(self, kernel: str) -> int:
        """Tiles of rows from the first step to the last: chunks are whole numbers of them."""
        return triton.cdiv(self.length, configuration(kernel, *self.about)["BLOCK"])

    def pieces(self) -> int:
        """Programs that carry one head's state from chunk to chunk."""
        return triton.cdiv(self.p * self.n, configuration("pass", *self.about)["BLOCK"])

    def pass_on(self) -> tuple[Tensor, Tensor]:
        """The state before each chunk, and the last."""
        states, last = self.own_states(self.x, self.B, False), self.states(1)[:, :, 0]
        self.launch(
            "pass", self.pieces(), states, self.first, self.high, self.low, self.start, last, *self.sizes(),
            RESET=self.given["RESET"], SIZE=self.p * self.n,
        )  # fmt: skip
        return states, last

    def output(self, states: Tensor) -> Tensor:
        y = torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        tiles = self.tiles("output")
        self.launch(
            "output", tiles, self.x, self.B, self.C, self.D, self.z, *self.fades(), states, y,
            *self.strides(self.x, self.B, self.C, self.z), *self.sizes(), tiles,
            **self.constants("SKIP", "GATED", "RESET"),
        )  # fmt: skip
        return y

    def pass_back(self, dy: Tensor, d_last: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the states after each chunk, of the first state, and of the log decay of whole chunks."""
        grads, first = self.own_states(dy, self.C, True), self.states(1)[:, :, 0]
        whole = self.room(self.batch, self.heads, self.chunks, self.pieces())
        self.launch(
            "pass_back", self.pieces(), states, grads, d_last.contiguous(), self.high, self.low, self.start, first,
            whole, *self.sizes(), RESET=self.given["RESET"], SIZE=self.p * self.n,
        )  # fmt: skip
        return grads, first, whole

    def split(self, kernel: str) -> tuple[int, int, int]:
        """Tiles of rows, heads of a program, and into how many parts these split a group."""
        tiles, share = self.tiles(kernel), self.heads // self.groups
        per = heads_of_a_program(self.batch * self.groups * tiles, share, self.x.device)
        return tiles, per, triton.cdiv(share, per)

    def rows(self, dy: Tensor, states: Tensor) -> tuple[Tensor, ...]:
        """dC, dz (where there is z), and the parts of the log decay's gradient that are summed for each output step."""
        tiles, per, splits = self.split("rows")
        dc = self.room(splits, *self.C.shape)
        dz = torch.empty(self.x.shape if self.given["GATED"] else (0,), dtype=self.x.dtype, device=self.x.device)
        rows, own, before = (torch.empty_like(self.step) for _ in range(3))
        over = self.room(self.batch, self.heads, tiles, self.chunk // configuration("rows", *self.about)["BLOCK"])
        self.launch(
            "rows", tiles * splits, self.x, self.B, self.C, self.D, self.z, dy, *self.fades(), states,
            dc, dz, rows, over, own, before, *self.strides(self.x, self.B, self.C, self.z, dy),
            self.batch, *self.sizes(), tiles, splits, heads=self.groups, PER=per,
            **self.constants("SKIP", "GATED", "RESET"),
        )  # fmt: skip
        return dc.sum(0).to(self.C.dtype), dz, rows, over, own, before

    def columns(self, dy: Tensor, grads: Tensor) -> tuple[Tensor, ...]:
        """dB, dx, dD, the gradient of Δ as x's factor, and the parts of the log decay's that are summed by input."""
        tiles, per, splits = self.split("columns")
        db, dx = self.room(splits, *self.B.shape), torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)
        dd = self.room(*((self.batch * tiles, self.heads, self.p) if self.given["SKIP"] else (0,)))
        d_step, columns, after = (torch.empty_like(self.step) for _ in range(3))
        self.launch(
            "columns", tiles * splits, self.x, self.B, self.C, self.D, self.z, dy, *self.fades(), grads,
            db, dx, dd, d_step, columns, after, *self.strides(self.x, self.B, self.C, self.z, dy),
            self.batch, *self.sizes(), tiles, splits, heads=self.groups, PER=per,
            **self.constants("SKIP", "GATED", "RESET"),
        )  # fmt: skip
        return db.sum(0).to(self.B.dtype), dx, dd.sum(0), d_step, columns, after

    def steps_back(self, *received: Tensor) -> tuple[Tensor, ...]:
        """ddelta, dA and dbias."""
        d_delta = torch.empty(
            self.delta.shape, dtype=self.delta.dtype if self.parts == 1 else torch.float32, device=self.delta.device
        )
        da, dbias = (self.room(self.batch, self.heads, self.chunks) for _ in range(2))
        self.launch(
            "steps_back", self.chunks, self.delta, self.A, self.bias, self.step, *received, d_delta, da, dbias,
            *self.delta.stride(), *self.sizes(), self.tiles("rows"), self.pieces(), SOFTPLUS=self.softplus,
            BLOCK_PIECES=triton.next_power_of_2(self.pieces()),
        )  # fmt: skip
        da, dbias = da.sum((0, 2)), dbias.sum((0, 2))
        if self.parts > 1:
            d_delta, da, dbias = (v.unflatten(-1, (-1, self.parts)).sum(-1) for v in (d_delta, da, dbias))
        return d_delta.to(self.delta.dtype), da, dbias


def starts(reset: Tensor) -> Tensor:
    """For each step the first step of its own sequence, -1 where that lies before this call: int32 (B, L)."""
    at = torch.arange(reset.shape[1], device=reset.device, dtype=torch.int32)
    return torch.where(reset, at, -1).cummax(1).values.to(torch.int32)


# --- autograd ------------------------------------------------------------------------------------------------------
# custom_op and not triton_op: the latter traces into the launch, which Triton's interpreter cannot follow, and then
# what runs on a GPU would not be what is tested without one.


@torch.library.custom_op("nondual::ssd", mutates_args=())
def _forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = Launcher(x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk)
    call.steps()
    states, last = call.pass_on()
    return together(call.output(states), 2, call.parts, call.width), together(last, 1, call.parts, call.width)


@_forward.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk):
    last = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), last


@torch.library.custom_op("nondual::ssd_backward", mutates_args=())
def _backward(
    d_y: Tensor, d_last: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the first nine, those of D and z empty where they are not given."""
    call = Launcher(x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk)
    d_y, d_last = _rows(apart(d_y, 2, call.parts)), apart(d_last, 1, call.parts)
    call.steps()
    states, _ = call.pass_on()
    grads, d_first, whole = call.pass_back(d_y, d_last, states)
    d_c, d_z, *crossing = call.rows(d_y, states)
    d_b, d_x, d_d, d_step, columns, after = call.columns(d_y, grads)
    d_delta, d_a, d_bias = call.steps_back(*crossing, columns, after, whole, d_step)
    d_x, d_first = together(d_x, 2, call.parts, call.width), together(d_first, 1, call.parts, call.width)
    d_d = d_a.new_empty(A.shape) if D is None else together(d_d, 0, call.parts, call.width)
    d_z = d_z if z is None else together(d_z, 2, call.parts, call.width)
    return d_x, d_delta, d_a, d_b, d_c, d_d, d_z, d_bias, d_first


@_backward.register_fake
def _(d_y, d_last, x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk):
    made = [x.new_empty(v.shape) for v in (x, delta, A, B, C)]
    made[2] = made[2].float()
    d_d, d_bias = (x.new_empty(v.shape, dtype=torch.float32) for v in (A if D is None else D, A))
    return (*made, d_d, x.new_empty(0 if z is None else z.shape), d_bias, torch.empty_like(d_last))


def _save(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_y, d_last):
    grads = _backward(d_y, d_last, *ctx.saved_tensors, ctx.softplus, ctx.chunk)
    given = (None if v is None else grad for v, grad in zip(ctx.saved_tensors, grads))
    return *given, None, None, None


def _refuse(ctx, *_):
    raise RuntimeError("ssd(impl='triton') has no second derivative; impl='chunked' has one")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)

# --- public --------------------------------------------------------------------------------------------------------


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state by the kernels; the input is taken as `nondual.ops.ssd` has checked it, and is not empty.

    Args:
        x: input (B, L, H, P), float16, bfloat16 or float32, in any layout; P at most 256.
        delta: step lengths (B, L, H), before bias and softplus.
        A: (H,).
        B: (B, L, G, N), N at most 256.
        C: (B, L, G, N).
        D: skip (H,) or (H, P).
        z: gate (B, L, H, P), before its SiLU.
        delta_bias: (H,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, H, P, N); zero where left out.
        reset: (B, L), True where a sequence begins and all that came before is forgotten.
        chunk: steps of a chunk, 16, 32, 64, 128 or 256; `chunk_of` where left out.

    Returns:
        y (B, L, H, P) in x's dtype, and the last state (B, H, P, N) in float32.

    Raises:
        RuntimeError: when differentiated twice.
    """
    A, D, delta_bias, state = (None if v is None else v.float() for v in (A, D, delta_bias, state))
    if D is not None:
        D = (D if D.ndim == 2 else D[:, None]).expand(x.shape[2:])
    return _forward(x, delta, A, B, C, D, z, delta_bias, state, reset, delta_softplus, chunk or chunk_of(x.dtype))
