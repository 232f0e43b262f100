"""The forward kernels of the delta rule: a chunk's matrix, the state from chunk to chunk, the outputs.

What is written is the value u_t that step t adds at its key. It is β_t times the difference between the value given
and the value that the decayed state holds at this key,

    u_t = β_t (v_t - exp(g_t) S_{t-1}ᵀ k_t),   S_t = exp(g_t) S_{t-1} + k_t u_tᵀ

so that with u known the delta rule is linear attention. Within a chunk each u depends on those before it:

    (I + a) u = β (v - d S₀ᵀ k),   a[t, s] = β_t (k_t · k_s) decay(s, t) for s < t

with S₀ the state before the chunk and d_t the decay from the chunk's start to t. With T = (I + a)⁻¹, U = T β v and
W = T β d k this is u = U - W S₀ (Yang et al. 2024, 2406.06484, equations 10 and 11; 2412.06464, section 3.3).

What the kernels hand on: T (B, H, N, CHUNK), W (B, H, N, D), u (B, H, N, Dv) and the states before each chunk (B, K, H,
D, Dv), with K chunks.
"""

import triton
import triton.language as tl

from nondual.ops.linear_attention.triton.primitives import (
    decays_of_chunk,
    decays_within,
    inverse,
    load_tile,
    starts_of_chunk,
    store_tile,
    tile_of,
)
from nondual.ops.ssd.triton.primitives import cast_scaled


@triton.jit(do_not_specialize=["length", "chunks"])
def solve_kernel(
    p_k, p_v, p_beta, p_high, p_low, p_start, p_t, p_w, p_u,
    s_kb, s_kl, s_kh, s_vb, s_vl, s_vh, length, heads, chunks,
    RESET: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: T, W and U of a chunk of a head."""
    even_d: tl.constexpr = D % BLOCK_D == 0
    even_v: tl.constexpr = V % BLOCK_V == 0
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_high += i_bh * length
    p_low += i_bh * length
    p_start += i_b * length
    begin = i_c * CHUNK
    o_t = begin + tl.arange(0, CHUNK)
    m_t = o_t < length
    b_start, first = starts_of_chunk(p_start, o_t, m_t, length, RESET)
    m_from = m_t & (b_start < begin)
    b_from, _, _ = decays_of_chunk(p_high, p_low, o_t, length, m_from, m_t & (o_t >= first))
    b_beta = tl.load(p_beta + i_bh * length + o_t, mask=m_t, other=0.0)

    # the matrix a, and the inverse of I + a
    b_a = tl.zeros((CHUNK, CHUNK), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        b_k = load_tile(p_k, o_t, s_kl, m_t, d + tl.arange(0, BLOCK_D), D, even_d)  # (CHUNK, BLOCK_D)
        b_a = tl.dot(b_k, tl.trans(b_k), b_a, input_precision="ieee")
    m_ts = (o_t[None, :] < o_t[:, None]) & (o_t[None, :] >= b_start[:, None]) & m_t[:, None]
    b_decay = decays_within(p_high, p_low, o_t, m_ts, length)
    b_a = tl.where(m_ts, b_a * b_decay * b_beta[:, None], 0.0)
    b_t = inverse(b_a, CHUNK, PRECISION)
    o_s = tl.arange(0, CHUNK)
    store_tile(p_t + i_bh * length * CHUNK, o_t, CHUNK, m_t, o_s, b_t, CHUNK, True)

    # W = T β d k and U = T β v
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)
        b_left, scale = cast_scaled(b_t * (b_beta * b_from)[None, :], b_k)
        b_w = tl.dot(b_left, b_k, input_precision="ieee") * scale  # (CHUNK, BLOCK_D)
        store_tile(p_w + i_bh * length * D, o_t, D, m_t, o_d, b_w, D, even_d)
    for v in tl.range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        b_v = load_tile(p_v, o_t, s_vl, m_t, o_v, V, even_v)
        b_left, scale = cast_scaled(b_t * b_beta[None, :], b_v)
        b_u = tl.dot(b_left, b_v, input_precision="ieee") * scale  # (CHUNK, BLOCK_V)
        store_tile(p_u + i_bh * length * V, o_t, V, m_t, o_v, b_u, V, even_v)


@triton.jit(do_not_specialize=["length", "chunks"])
def carry_kernel(
    p_k, p_high, p_low, p_start, p_initial, p_w, p_u, p_states, p_last,
    s_kb, s_kl, s_kh, length, heads, chunks,
    RESET: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: columns of a head's state (D, BLOCK_V), from the first chunk to the last.

    p_u holds U and is overwritten by u; p_states gets the state before each chunk.
    """
    even_d: tl.constexpr = D == BLOCK_D
    even_v: tl.constexpr = V % BLOCK_V == 0
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_k += i_b * s_kb + i_h * s_kh
    p_high += i_bh * length
    p_low += i_bh * length
    p_start += i_b * length
    p_w += i_bh * length * D
    p_u += i_bh * length * V
    b_state = load_tile(p_initial + i_bh * D * V, o_d, V, m_d, o_v, V, even_v)  # (BLOCK_D, BLOCK_V), float32
    for i_c in tl.range(0, chunks):
        p_state = p_states + ((i_b * chunks + i_c) * heads + i_h) * D * V
        store_tile(p_state, o_d, V, m_d, o_v, b_state, V, even_v)
        o_t = i_c * CHUNK + tl.arange(0, CHUNK)
        m_t = o_t < length
        b_start, first = starts_of_chunk(p_start, o_t, m_t, length, RESET)
        m_from, m_to = m_t & (b_start < i_c * CHUNK), m_t & (o_t >= first)
        _, b_to, whole = decays_of_chunk(p_high, p_low, o_t, length, m_from, m_to)
        b_w = load_tile(p_w, o_t, D, m_from, o_d, D, even_d)  # (CHUNK, BLOCK_D)
        b_cast, scale = cast_scaled(b_state, b_w)
        b_held = tl.dot(b_w, b_cast, input_precision="ieee") * scale  # (CHUNK, BLOCK_V)
        if RESET:  # a decay of 0 times NaN is NaN
            b_held = tl.where(m_from[:, None], b_held, 0.0)
        b_u = load_tile(p_u, o_t, V, m_t, o_v, V, even_v).to(tl.float32) - b_held
        store_tile(p_u, o_t, V, m_t, o_v, b_u, V, even_v)
        b_u = b_u * b_to[:, None]
        b_state = b_state * whole
        if RESET:
            b_u = tl.where(m_to[:, None], b_u, 0.0)
            b_state = tl.where(first < i_c * CHUNK, b_state, 0.0)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)
        b_cast, scale = cast_scaled(b_u, b_k)
        b_state += tl.dot(tl.trans(b_k), b_cast, input_precision="ieee") * scale
    tl.store(tile_of(p_last + i_bh * D * V, o_d, V, o_v), b_state, mask=m_d[:, None] & (o_v < V)[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def read_kernel(
    p_q, p_k, p_high, p_low, p_start, p_u, p_states, p_y,
    s_qb, s_ql, s_qh, s_kb, s_kl, s_kh, length, heads, chunks, factor,
    RESET: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_V columns of the outputs of a chunk of a head."""
    even_d: tl.constexpr = D % BLOCK_D == 0
    even_v: tl.constexpr = V % BLOCK_V == 0
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    o_v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    i_c = tl.program_id(0) // tiles % chunks
    i_bh = (tl.program_id(0) // tiles // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_high += i_bh * length
    p_low += i_bh * length
    p_start += i_b * length
    p_states += ((i_b * chunks + i_c) * heads + i_h) * D * V
    begin = i_c * CHUNK
    o_t = begin + tl.arange(0, CHUNK)
    m_t = o_t < length
    b_y = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    b_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = load_tile(p_q, o_t, s_ql, m_t, o_d, D, even_d)  # (CHUNK, BLOCK_D)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision="ieee")  # (t, s)
        b_state = load_tile(p_states, o_d, V, o_d < D, o_v, V, even_v).to(tl.float32)  # (BLOCK_D, BLOCK_V)
        b_state, scale = cast_scaled(b_state, b_q)
        b_y += tl.dot(b_q, b_state, input_precision="ieee") * scale
    b_start, first = starts_of_chunk(p_start, o_t, m_t, length, RESET)
    m_from = m_t & (b_start < begin)
    b_from, _, _ = decays_of_chunk(p_high, p_low, o_t, length, m_from, m_t & (o_t >= first))
    b_y = b_y * b_from[:, None]
    if RESET:  # a decay of 0 times NaN is NaN
        b_y = tl.where(m_from[:, None], b_y, 0.0)
    m_ts = (o_t[None, :] <= o_t[:, None]) & (o_t[None, :] >= b_start[:, None]) & m_t[:, None]
    b_decay = decays_within(p_high, p_low, o_t, m_ts, length)
    b_scores = tl.where(m_ts, b_scores * b_decay, 0.0)
    b_u = load_tile(p_u + i_bh * length * V, o_t, V, m_t, o_v, V, even_v)
    b_scores, scale = cast_scaled(b_scores, b_u)
    b_y += tl.dot(b_scores, b_u, input_precision="ieee") * scale
    store_tile(p_y + (i_b * length * heads + i_h) * V, o_t, heads * V, m_t, o_v, b_y * factor, V, even_v)
