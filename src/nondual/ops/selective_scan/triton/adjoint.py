"""The backward pass, first of two levels: q alone, of each span as if no span came after it.

Symbols and equations as in `nondual.ops.selective_scan.triton`.
"""

import triton
import triton.language as tl

from nondual.ops.selective_scan.triton.primitives import LOG2_E, load_steps, place, sigmoid, step_length


@triton.jit
def adjoint_steps(
    b_q, b_A, b_C, b_bias, p_delta, p_C, p_z, p_dy, p_reset, t, o_d, o_n,
    S_DELTA: tl.constexpr, S_C: tl.constexpr, S_Z: tl.constexpr, S_DY: tl.constexpr, SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """(6) and (7) alone, for STEPS steps from the last of them to t; returns what `scan_steps` does, with q for h."""
    b_deltas = load_steps(p_delta, t, S_DELTA, o_d, STEPS)  # (BLOCK_D,) each
    b_dys = load_steps(p_dy, t, S_DY, o_d, STEPS)
    if S_C > 0:
        b_Cs = load_steps(p_C, t, S_C, o_n, STEPS)  # (BLOCK_N,) each
    if p_z is not None:
        b_zs = load_steps(p_z, t, S_Z, o_d, STEPS)
    b_time = tl.zeros(o_d.shape, tl.float32)
    had_reset = False
    for k in tl.static_range(STEPS - 1, -1, -1):
        b_delta, _ = step_length(b_deltas[k] + b_bias, SOFTPLUS)
        b_time += b_delta
        b_g = b_dys[k]
        if p_z is not None:
            b_g = b_g * b_zs[k] * sigmoid(b_zs[k])
        if S_C > 0:
            b_C = b_Cs[k][:, None]
        b_q = tl.exp2(b_delta[None, :] * b_A) * (b_q + b_g[None, :] * b_C)  # (6), (7)
        if p_reset is not None:
            reset = tl.load(p_reset + t + k) != 0
            had_reset = had_reset | reset
            b_q = tl.where(reset, 0.0, b_q)
    return b_q, b_time, had_reset


@triton.jit(do_not_specialize=["length", "span", "spans"])
def adjoint_kernel(
    p_delta, p_A, p_C, p_z, p_bias, p_dy, p_reset, p_end, p_decay, s_deltab, s_zb, s_dyb, length, span, spans,
    S_DELTA: tl.constexpr, S_Z: tl.constexpr, S_DY: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, C_GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: a block of channels through a span of time, from its end to its beginning.

    p_end receives q of the span's first step, as if no span came after this one, and p_decay the decay over the span,
    or -1 where a reset lies within the span. Offsets and hints as in `forward_kernel`.
    """
    WIDTH: tl.constexpr = D // GROUPS
    i_b, i_span, i_g, i_block = place(tl.cdiv(WIDTH, BLOCK_D), spans, GROUPS)
    o_width = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_d = i_g * WIDTH + tl.minimum(o_width, WIDTH - 1)
    o_n = tl.arange(0, BLOCK_N)
    o_h = tl.multiple_of(o_n[:, None] * D + (i_g * WIDTH + o_width)[None, :], [1, 1])
    m_h = (o_n < N)[:, None] & (o_width < WIDTH)[None, :]
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2_E
    b_bias, b_C = 0.0, 0.0
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d)
    if C_GROUPS > 0:
        p_C += i_b * length * (C_GROUPS * BLOCK_N) + i_g // (GROUPS // C_GROUPS) * BLOCK_N
    else:
        b_C = tl.load(p_C + o_h, mask=m_h, other=0.0)
    p_delta += i_b * s_deltab
    p_dy += i_b * s_dyb
    if p_z is not None:
        p_z += i_b * s_zb
    if p_reset is not None:
        p_reset += i_b * length

    first = i_span * span
    last = tl.minimum(first + span, length)
    whole = first + (last - first) // STEPS * STEPS
    b_q = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_time = tl.zeros((BLOCK_D,), tl.float32)
    had_reset = False
    bounds = (first, whole, last)
    for PART in tl.static_range(0, 2):  # from the end: single steps, then groups of STEPS steps
        low, high = bounds[1 - PART], bounds[2 - PART]
        for i in tl.range(low, high, 1 if PART == 0 else STEPS):
            b_q, b_more_time, more_reset = adjoint_steps(
                b_q=b_q,
                b_A=b_A,
                b_C=b_C,
                b_bias=b_bias,
                p_delta=p_delta,
                p_C=p_C,
                p_z=p_z,
                p_dy=p_dy,
                p_reset=p_reset,
                t=low + high - (1 if PART == 0 else STEPS) - i,
                o_d=o_d,
                o_n=o_n,
                S_DELTA=S_DELTA,
                S_C=C_GROUPS * BLOCK_N,
                S_Z=S_Z,
                S_DY=S_DY,
                SOFTPLUS=SOFTPLUS,
                STEPS=1 if PART == 0 else STEPS,
            )
            b_time += b_more_time
            had_reset = had_reset | more_reset
    i_bs = i_b * spans + i_span
    tl.store(p_end + i_bs * (N * D) + o_h, b_q, mask=m_h)
    b_decay = tl.where(had_reset, -1.0, tl.exp2(b_time[None, :] * b_A))
    tl.store(p_decay + i_bs * (N * D) + o_h, b_decay, mask=m_h)
