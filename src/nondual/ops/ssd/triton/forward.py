"""The forward kernels of state space duality: step lengths, what chunks add to the state, the state, the outputs.

What they hand on, in float32: step, high and low (B, H, L), states (B, K, H, P, N) with K chunks: what programs that
run side by side read of a chunk lies side by side.
"""

import triton
import triton.language as tl

from nondual.ops.ssd.triton.primitives import (
    cast_scaled,
    decay_between,
    dot_add,
    load_dy,
    load_log_decay,
    load_rows,
    load_state,
    log_decay,
    softplus,
    store_rows,
)


@triton.jit(do_not_specialize=["length", "chunks"])
def steps_kernel(
    p_delta, p_a, p_bias, p_start, p_step, p_high, p_low, s_db, s_dl, s_dh, length, heads, chunks,
    SOFTPLUS: tl.constexpr, RESET: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the step lengths of a chunk of a head, and the log of the decay from the chunk's start to each step,
    or from the start of the step's sequence if that is later."""
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    a = tl.load(p_a + i_h).to(tl.float64) * 1.4426950408889634  # log2(e)
    bias = tl.load(p_bias + i_h)
    p_delta += i_b * s_db + i_h * s_dh
    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    m_t = o_t < length
    b_step = tl.load(p_delta + o_t.to(tl.int64) * s_dl, mask=m_t, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        b_step = softplus(b_step)
    b_step = tl.where(m_t, b_step, 0.0)
    tl.store(p_step + i_bh * length + o_t, b_step, mask=m_t)
    if RESET:  # a sum for each step, from its own start: a running sum would carry a NaN across a reset
        b_start = tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)
        b_sum = tl.zeros((CHUNK,), tl.float64)
        for first in tl.range(i_c * CHUNK, i_c * CHUNK + CHUNK, BLOCK):
            o_s = first + tl.arange(0, BLOCK)
            b_step_s = tl.load(p_delta + o_s.to(tl.int64) * s_dl, mask=o_s < length, other=0.0).to(tl.float32) + bias
            if SOFTPLUS:
                b_step_s = softplus(b_step_s)
            b_log_s = log_decay(b_step_s, a)
            m_ts = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None])
            b_sum += tl.sum(tl.where(m_ts, b_log_s[None, :], 0.0), 1)
    else:
        b_sum = tl.cumsum(log_decay(b_step, a), 0)
    b_high = b_sum.to(tl.float32)
    tl.store(p_high + i_bh * length + o_t, b_high, mask=m_t)
    tl.store(p_low + i_bh * length + o_t, (b_sum - b_high.to(tl.float64)).to(tl.float32), mask=m_t)


@triton.jit(do_not_specialize=["length", "chunks"])
def states_kernel(
    p_v, p_z, p_m, p_step, p_high, p_low, p_start, p_states,
    s_vb, s_vl, s_vh, s_zb, s_zl, s_zh, s_mb, s_ml, s_mg, length, heads, chunks,
    BACKWARD: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: what a chunk of a head adds to the state, or to the state's gradient, (BLOCK_P, BLOCK_N) of it.

    Forward, v is x and m is B: Σ_s (decay from s to the chunk's end) Δ_s x_s B_sᵀ. Backward, v is dy and m is C, and
    the sum is a part of the gradient of the state before the chunk: Σ_t (decay from the chunk's start to t) dy_t C_tᵀ.
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
        b_high, b_low = load_log_decay(p_high, p_low, o_t, m_t)
        if BACKWARD:
            b_v = load_dy(p_v, p_z, o_t, s_vl, s_zl, m_t, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            if RESET:
                m_t = m_t & (tl.load(p_start + i_b * length + o_t, mask=m_t, other=0) < i_c * CHUNK)
            b_w = tl.exp2(tl.where(m_t, b_high + b_low, float("-inf")))
        else:
            b_v = load_rows(p_v, o_t, s_vl, m_t, P, BLOCK_P).to(tl.float32)
            if RESET:
                m_t = m_t & (o_t >= tl.load(p_start + i_b * length + end - 1))
            b_w = decay_between(high_end, low_end, b_high, b_low, m_t)
            b_w = b_w * tl.load(p_step + i_bh * length + o_t, mask=m_t, other=0.0)
        b_v = b_v * b_w[:, None]
        if RESET:  # again, since a decay of 0 times NaN is NaN
            b_v = tl.where(m_t[:, None], b_v, 0.0)
        m_m = m_t[:, None] & (o_n < N)[None, :]
        b_m = tl.load(p_m + o_t.to(tl.int64)[:, None] * s_ml + o_n[None, :], mask=m_m, other=0.0)  # (BLOCK, BLOCK_N)
        b_v, scale = cast_scaled(b_v, b_m)
        b_acc += tl.dot(tl.trans(b_m), b_v, input_precision="ieee") * scale
    o_p = tl.arange(0, BLOCK_P)
    p_tile = p_states + ((i_b * chunks + i_c) * heads + i_h) * P * N + o_p[:, None] * N + o_n[None, :]
    tl.store(p_tile, tl.trans(b_acc), mask=(o_p < P)[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def pass_kernel(
    p_states, p_initial, p_high, p_low, p_start, p_last, length, heads, chunks,
    RESET: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a piece of a head's state, carried from the first chunk to the last.

    p_states holds what each chunk adds to the state, and is overwritten by the state before the chunk.
    """
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    b_h = tl.load(p_initial + i_bh * SIZE + o, mask=m, other=0.0)
    for i_c in tl.range(0, chunks):
        p_chunk = p_states + ((i_b * chunks + i_c) * heads + i_h) * SIZE + o
        b_added = tl.load(p_chunk, mask=m, other=0.0)
        tl.store(p_chunk, b_h, mask=m)
        end = tl.minimum(i_c * CHUNK + CHUNK, length) - 1
        decay = tl.exp2(tl.load(p_high + i_bh * length + end) + tl.load(p_low + i_bh * length + end))
        b_h = b_h * decay
        if RESET:
            b_h = tl.where(tl.load(p_start + i_b * length + end) < i_c * CHUNK, b_h, 0.0)
        b_h += b_added
    tl.store(p_last + i_bh * SIZE + o, b_h, mask=m)


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
    b_high_t, b_low_t = load_log_decay(p_high, p_low, o_t, m_t)  # (BLOCK,)
    b_start = o_t * 0 - 1
    if RESET:
        b_start = tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)

    # the state before the chunk
    o_p = tl.arange(0, BLOCK_P)
    p_states += ((i_b * chunks + i_c) * heads + i_h) * P * N
    b_h = load_state(p_states, P, N, BLOCK_P, BLOCK_N)  # (BLOCK_P, BLOCK_N)
    b_h, scale = cast_scaled(b_h, b_c)
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
        b_high_s, b_low_s = load_log_decay(p_high, p_low, o_s, m_s)
        m_ts = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None]) & m_t[:, None]
        b_w = b_w * decay_between(b_high_t[:, None], b_low_t[:, None], b_high_s[None, :], b_low_s[None, :], m_ts)
        b_w = tl.where(m_ts, b_w * tl.load(p_step + o_s, mask=m_s, other=0.0)[None, :], 0.0)
        b_x = load_rows(p_x, o_s, s_xl, m_s, P, BLOCK_P)  # (BLOCK, BLOCK_P)
        b_y = dot_add(b_w, b_x, b_y)

    if SKIP:
        b_d = tl.load(p_d + i_h * P + o_p, mask=o_p < P, other=0.0)  # (BLOCK_P,)
        b_y += load_rows(p_x, o_t, s_xl, m_t, P, BLOCK_P).to(tl.float32) * b_d[None, :]
    if GATED:
        b_z = load_rows(p_z, o_t, s_zl, m_t, P, BLOCK_P).to(tl.float32)
        b_y = b_y * b_z * tl.sigmoid(b_z)
    store_rows(p_y + (i_b * length * heads + i_h) * P, o_t, heads * P, m_t, b_y, P, BLOCK_P)
