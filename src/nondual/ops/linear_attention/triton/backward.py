"""The backward kernels of the delta rule.

With u known the delta rule is linear attention (see `forward`), whose gradient by u has two parts: from the outputs of
the chunk, and from the gradient dS of the state after it,

    du_s = Σ_{t >= s} decay(s, t) (q_t · k_s) dy_t + (decay from s to the chunk's end) dSᵀ k_s

The gradient by β (v - d S₀ᵀ k), by which u came to be, is then λ = Tᵀ du, and dv = β λ. What the chunk makes of dS is
the gradient of the state before it:

    dS₀ = (decay of the whole chunk) dS + Σ_t d_t q_t dy_tᵀ - Wᵀ du

Then the other gradients. A key is read in two ways: it writes u, and it asks what the state holds there, as a query
whose output has the gradient -β λ. With Q[t, s] = decay(s, t) ((q_t · k_s) (dy_t · u_s) - β_t (k_t · k_s) (λ_t · u_s))
the gradient of the log decay of step r within its chunk is the sum of Q[t, s] over s < r <= t, summed directly: as the
difference of Q's rows and columns it would be the small difference of large numbers.
"""

import triton
import triton.language as tl

from nondual.ops.linear_attention.triton.primitives import (
    decays_of_chunk,
    decays_within,
    load_tile,
    starts_of_chunk,
    store_tile,
    tile_of,
)
from nondual.ops.ssd.triton.primitives import cast_scaled, sum_products


@triton.jit(do_not_specialize=["length", "chunks"])
def written_kernel(
    p_q, p_k, p_dy, p_high, p_low, p_start, p_du,
    s_qb, s_ql, s_qh, s_kb, s_kl, s_kh, s_dyb, s_dyl, s_dyh, length, heads, chunks, factor,
    RESET: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a chunk's u, as far as it comes from outputs of the same chunk."""
    even_d: tl.constexpr = D % BLOCK_D == 0
    even_v: tl.constexpr = V % BLOCK_V == 0
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_dy += i_b * s_dyb + i_h * s_dyh
    p_high += i_bh * length
    p_low += i_bh * length
    p_start += i_b * length
    begin = i_c * CHUNK
    o_t = begin + tl.arange(0, CHUNK)
    m_t = o_t < length
    b_scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = load_tile(p_q, o_t, s_ql, m_t, o_d, D, even_d)  # (CHUNK, BLOCK_D)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision="ieee")  # (t, s)
    b_start, _ = starts_of_chunk(p_start, o_t, m_t, length, RESET)
    m_ts = (o_t[None, :] <= o_t[:, None]) & (o_t[None, :] >= b_start[:, None]) & m_t[:, None]
    b_decay = decays_within(p_high, p_low, o_t, m_ts, length)
    b_scores = tl.where(m_ts, b_scores * (b_decay * factor), 0.0)
    for v in tl.range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        b_dy = load_tile(p_dy, o_t, s_dyl, m_t, o_v, V, even_v)  # (CHUNK, BLOCK_V)
        b_cast, scale = cast_scaled(b_scores, b_dy)
        b_du = tl.dot(tl.trans(b_cast), b_dy, input_precision="ieee") * scale
        store_tile(p_du + i_bh * length * V, o_t, V, m_t, o_v, b_du, V, even_v)


@triton.jit(do_not_specialize=["length", "chunks"])
def carry_back_kernel(
    p_q, p_k, p_dy, p_high, p_low, p_start, p_dlast, p_w, p_du, p_grads, p_dinitial,
    s_qb, s_ql, s_qh, s_kb, s_kl, s_kh, s_dyb, s_dyl, s_dyh, length, heads, chunks, factor,
    RESET: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of columns of a head's state (D, BLOCK_V), from the last chunk to the first.

    p_du holds what `written_kernel` wrote and is overwritten by the whole gradient of u; p_grads gets the gradient of
    the state after each chunk.
    """
    even_d: tl.constexpr = D == BLOCK_D
    even_v: tl.constexpr = V % BLOCK_V == 0
    tiles: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_dy += i_b * s_dyb + i_h * s_dyh
    p_high += i_bh * length
    p_low += i_bh * length
    p_start += i_b * length
    p_w += i_bh * length * D
    p_du += i_bh * length * V
    b_ds = load_tile(p_dlast + i_bh * D * V, o_d, V, m_d, o_v, V, even_v)  # (BLOCK_D, BLOCK_V), float32
    for i in tl.range(0, chunks):
        i_c = chunks - 1 - i
        p_grad = p_grads + ((i_b * chunks + i_c) * heads + i_h) * D * V
        store_tile(p_grad, o_d, V, m_d, o_v, b_ds, V, even_v)
        o_t = i_c * CHUNK + tl.arange(0, CHUNK)
        m_t = o_t < length
        b_start, first = starts_of_chunk(p_start, o_t, m_t, length, RESET)
        m_from, m_to = m_t & (b_start < i_c * CHUNK), m_t & (o_t >= first)
        b_from, b_to, whole = decays_of_chunk(p_high, p_low, o_t, length, m_from, m_to)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)  # (CHUNK, BLOCK_D)
        b_cast, scale = cast_scaled(b_ds, b_k)
        b_du = tl.dot(b_k, b_cast, input_precision="ieee") * (b_to * scale)[:, None]  # (CHUNK, BLOCK_V)
        if RESET:  # a decay of 0 times NaN is NaN
            b_du = tl.where(m_to[:, None], b_du, 0.0)
        b_du += load_tile(p_du, o_t, V, m_t, o_v, V, even_v).to(tl.float32)
        store_tile(p_du, o_t, V, m_t, o_v, b_du, V, even_v)
        b_dy = load_tile(p_dy, o_t, s_dyl, m_t, o_v, V, even_v).to(tl.float32) * (b_from * factor)[:, None]
        b_ds = b_ds * whole
        if RESET:
            b_du = tl.where(m_from[:, None], b_du, 0.0)
            b_dy = tl.where(m_from[:, None], b_dy, 0.0)
            b_ds = tl.where(first < i_c * CHUNK, b_ds, 0.0)
        b_q = load_tile(p_q, o_t, s_ql, m_t, o_d, D, even_d)
        b_cast, scale = cast_scaled(b_dy, b_q)
        b_ds += tl.dot(tl.trans(b_q), b_cast, input_precision="ieee") * scale
        b_w = load_tile(p_w, o_t, D, m_t, o_d, D, even_d)
        b_cast, scale = cast_scaled(b_du, b_w)
        b_ds -= tl.dot(tl.trans(b_w), b_cast, input_precision="ieee") * scale
    tl.store(tile_of(p_dinitial + i_bh * D * V, o_d, V, o_v), b_ds, mask=m_d[:, None] & (o_v < V)[None, :])


@triton.jit(do_not_specialize=["length", "chunks"])
def chunk_back_kernel(
    p_q, p_k, p_v, p_dy, p_beta, p_high, p_low, p_start, p_t, p_u, p_du, p_states, p_grads,
    p_dq, p_dk, p_dv, p_dbeta, p_dlog,
    s_qb, s_ql, s_qh, s_kb, s_kl, s_kh, s_vb, s_vl, s_vh, s_dyb, s_dyl, s_dyh, length, heads, chunks, factor,
    RESET: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: every gradient of a chunk of a head but that of the state.

    Results are (B, N, H, ·), those of beta and of the log decay (B, H, N).
    """
    even_d: tl.constexpr = D % BLOCK_D == 0
    even_v: tl.constexpr = V % BLOCK_V == 0
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_dy += i_b * s_dyb + i_h * s_dyh
    p_high += i_bh * length
    p_low += i_bh * length
    p_start += i_b * length
    p_u += i_bh * length * V
    p_du += i_bh * length * V
    p_states += ((i_b * chunks + i_c) * heads + i_h) * D * V
    p_grads += ((i_b * chunks + i_c) * heads + i_h) * D * V
    p_dq += (i_b * length * heads + i_h) * D
    p_dk += (i_b * length * heads + i_h) * D
    p_dv += (i_b * length * heads + i_h) * V
    begin = i_c * CHUNK
    o_t = begin + tl.arange(0, CHUNK)
    m_t = o_t < length
    b_start, first = starts_of_chunk(p_start, o_t, m_t, length, RESET)
    m_from, m_to = m_t & (b_start < begin), m_t & (o_t >= first)
    b_from, b_to, whole = decays_of_chunk(p_high, p_low, o_t, length, m_from, m_to)
    b_beta = tl.load(p_beta + i_bh * length + o_t, mask=m_t, other=0.0)
    b_t = load_tile(p_t + i_bh * length * CHUNK, o_t, CHUNK, m_t, tl.arange(0, CHUNK), CHUNK, True)

    # λ = Tᵀ du and dv; the products of values, (t, s)
    b_read = tl.zeros((CHUNK, CHUNK), tl.float32)  # dy_t · u_s
    b_asked = tl.zeros((CHUNK, CHUNK), tl.float32)  # λ_t · u_s
    b_dbeta = tl.zeros((CHUNK,), tl.float32)  # λ_t · v_t, and then less what the state held
    for v in tl.range(0, V, BLOCK_V):
        o_v = v + tl.arange(0, BLOCK_V)
        b_du = load_tile(p_du, o_t, V, m_t, o_v, V, even_v)  # (CHUNK, BLOCK_V)
        b_lambda = tl.dot(tl.trans(b_t), b_du, input_precision="ieee")
        store_tile(p_dv, o_t, heads * V, m_t, o_v, b_lambda * b_beta[:, None], V, even_v)
        b_v = load_tile(p_v, o_t, s_vl, m_t, o_v, V, even_v).to(tl.float32)
        b_dbeta += sum_products(b_lambda, b_v, m_t[:, None], 1)
        b_u = load_tile(p_u, o_t, V, m_t, o_v, V, even_v)
        b_dy = load_tile(p_dy, o_t, s_dyl, m_t, o_v, V, even_v)
        b_read = tl.dot(b_dy, tl.trans(b_u), b_read, input_precision="ieee")
        b_cast, scale = cast_scaled(b_lambda, b_u)
        b_asked += tl.dot(b_cast, tl.trans(b_u), input_precision="ieee") * scale

    # the products of keys, (t, s)
    b_scores = tl.zeros((CHUNK, CHUNK), tl.float32)  # q_t · k_s
    b_alike = tl.zeros((CHUNK, CHUNK), tl.float32)  # k_t · k_s
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        b_q = load_tile(p_q, o_t, s_ql, m_t, o_d, D, even_d)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)
        b_scores = tl.dot(b_q, tl.trans(b_k), b_scores, input_precision="ieee")
        b_alike = tl.dot(b_k, tl.trans(b_k), b_alike, input_precision="ieee")

    # the weights with which dy and -β λ reach keys and queries, and what they say of the decays within the chunk
    m_ts = (o_t[None, :] <= o_t[:, None]) & (o_t[None, :] >= b_start[:, None]) & m_t[:, None]
    m_earlier = m_ts & (o_t[None, :] < o_t[:, None])
    b_decay = decays_within(p_high, p_low, o_t, m_ts, length)
    b_read = tl.where(m_ts, b_read * (b_decay * factor), 0.0)
    b_asked = tl.where(m_earlier, b_asked * b_decay, 0.0)
    b_held = tl.where(m_earlier, b_asked * b_alike, 0.0)
    b_dbeta -= tl.sum(b_held, 1)
    b_q_ts = tl.where(m_earlier, b_scores * b_read, 0.0) - b_held * b_beta[:, None]
    b_crossing = tl.where(o_t[None, :] <= o_t[:, None], tl.cumsum(b_q_ts, 1) - b_q_ts, 0.0)
    b_dlog = tl.sum(b_crossing, 0)
    b_asked = b_asked * b_beta[:, None]

    # by way of the states
    b_from_state = tl.zeros((CHUNK,), tl.float32)
    b_into_state = tl.zeros((CHUNK,), tl.float32)
    through = 0.0
    for d in tl.range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_q = load_tile(p_q, o_t, s_ql, m_t, o_d, D, even_d)  # (CHUNK, BLOCK_D)
        b_k = load_tile(p_k, o_t, s_kl, m_t, o_d, D, even_d)
        b_dq = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        b_dasked = tl.zeros((CHUNK, BLOCK_D), tl.float32)  # of the key as a query, but for Tᵀ, -β and the decay
        b_dk = tl.zeros((CHUNK, BLOCK_D), tl.float32)
        for v in tl.range(0, V, BLOCK_V):
            o_v = v + tl.arange(0, BLOCK_V)
            b_state = load_tile(p_states, o_d, V, m_d, o_v, V, even_v).to(tl.float32)  # (BLOCK_D, BLOCK_V)
            b_ds = load_tile(p_grads, o_d, V, m_d, o_v, V, even_v).to(tl.float32)
            through += tl.sum(
                b_state * b_ds
            )  # over both axes at once: one after the other, the compiler for sm_100 fails
            b_state, s_state = cast_scaled(b_state, b_k)
            b_ds, s_ds = cast_scaled(b_ds, b_k)
            b_du = load_tile(p_du, o_t, V, m_t, o_v, V, even_v)  # (CHUNK, BLOCK_V)
            b_dasked += tl.dot(b_du, tl.trans(b_state), input_precision="ieee") * s_state
            b_dy = load_tile(p_dy, o_t, s_dyl, m_t, o_v, V, even_v)
            b_dq += tl.dot(b_dy, tl.trans(b_state), input_precision="ieee") * s_state
            b_u = load_tile(p_u, o_t, V, m_t, o_v, V, even_v)
            b_dk += tl.dot(b_u, tl.trans(b_ds), input_precision="ieee") * s_ds
        b_dq = b_dq * (b_from * factor)[:, None]
        b_dasked, scale = cast_scaled(b_dasked, b_k)
        b_dasked = tl.dot(tl.trans(b_t), b_dasked, input_precision="ieee") * (b_from * scale)[:, None]
        b_dk = b_dk * b_to[:, None]
        if RESET:  # a decay of 0 times NaN is NaN
            b_dq = tl.where(m_from[:, None], b_dq, 0.0)
            b_dasked = tl.where(m_from[:, None], b_dasked, 0.0)
            b_dk = tl.where(m_to[:, None], b_dk, 0.0)
        b_asks = sum_products(b_dasked, b_k.to(tl.float32), m_t[:, None], 1)
        b_dbeta -= b_asks
        b_from_state += sum_products(b_dq, b_q.to(tl.float32), m_t[:, None], 1) - b_asks * b_beta
        b_into_state += sum_products(b_dk, b_k.to(tl.float32), m_t[:, None], 1)
        b_cast, scale = cast_scaled(b_read, b_k)
        b_dq += tl.dot(b_cast, b_k, input_precision="ieee") * scale
        b_dk += tl.dot(tl.trans(b_cast), b_q, input_precision="ieee") * scale
        b_cast, scale = cast_scaled(b_asked, b_k)
        b_dk -= b_dasked * b_beta[:, None]
        b_dk -= tl.dot(b_cast, b_k, input_precision="ieee") * scale
        b_dk -= tl.dot(tl.trans(b_cast), b_k, input_precision="ieee") * scale
        store_tile(p_dq, o_t, heads * D, m_t, o_d, b_dq, D, even_d)
        store_tile(p_dk, o_t, heads * D, m_t, o_d, b_dk, D, even_d)

    tl.store(p_dbeta + i_bh * length + o_t, b_dbeta, mask=m_t)
    through = through * whole
    if RESET:
        through = tl.where(first < begin, through, 0.0)
    b_dlog += tl.cumsum(b_from_state, 0, reverse=True) + (tl.cumsum(b_into_state, 0) - b_into_state) + through
    tl.store(p_dlog + i_bh * length + o_t, b_dlog, mask=m_t)
