"""The selective scan as Triton kernels, forward and backward, in one level over time or in two, without atomics.

Source: Gu and Dao 2023 (2312.00752), section 3.3 (the state stays on the chip; the backward computes it again); two
levels over time: Blelloch 1990, section 1.4. Symbols: B batch, L steps, D channels, N states of a channel, G groups of
channels that share B and C, WIDTH = D / G. In the kernels i_ is a program's index, o_ are offsets, m_ masks, p_
pointers, s_ and S_ strides and b_ blocks on the chip; ◦' is the gradient of ◦, g_t that of y_t before its gate.

    (1) Δ_t = softplus(delta_t + bias)     (2) a_t = exp(Δ_t A)     (3) h_t = a_t h_{t-1} + Δ_t u_t B_t
    (4) s_t = Σ_n C_t h_t + D u_t          (5) y_t = s_t silu(z_t)

The backward. h_t reaches the loss by s_t and by h_{t+1}, and the last state by itself too: where a_{t+1} h'_{t+1} would
come from beyond the last step, it is the gradient of the last state. So, from the last step to the first,

    (6) h'_t = g_t C_t + a_{t+1} h'_{t+1}        (7) q_t = a_t h'_t, the part that goes on to step t - 1
    (8) C'_t = Σ_d g_t h_t                       (9) B'_t = Σ_d Δ_t u_t h'_t            over the channels of a group
    (10) A' = Σ_t Δ_t q_t h_{t-1}                (11) u'_t = D g_t + Δ_t Σ_n B_t h'_t
    (12) Δ'_t = Σ_n A q_t h_{t-1} + u_t Σ_n B_t h'_t,   delta'_t = Δ'_t softplus'      (13) z'_t = y'_t s_t silu'(z_t)

and q of the first step is the gradient of the initial state. At a reset h_{t-1} and q_t are 0. The forward pass saves
the state every CHUNK steps. The backward pass goes through these chunks from the last to the first: it computes a
chunk's states again, writes one of every STEPS to scratch memory, then goes through these from the last, with the
states of STEPS steps in registers.

Two levels, where the channels are too few to fill the chip (`spans_of`): time is cut into spans, and all are scanned at
once from zero; the states before each span then follow from h = decay · h + (the span's end from zero), a recurrence
like (3); and all spans are scanned again from these. The backward pass does the same with q, from the end.

The kernels hold A times log2(e), so that (2) is the chip's own exp2. Time strides are compile-time constants: the
steps of a group are then one address and its fixed offsets. Sums run in float32, in one order, each by one program, and
torch adds up the programs' parts: the same input gives the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

# --- kernels: named steps ------------------------------------------------------------------------------------------


# --8<-- [start:step_length]
@triton.jit
def step_length(b_x, SOFTPLUS: tl.constexpr):
    """Δ (1), and by how much it grows with delta.

    softplus(x) = max(x, 0) + log(1 + w) with w = exp(-|x|), and log(1 + w) = 2 atanh(w / (2 + w)) by its series, whose
    next term is below 2e-8 of it: small steps keep all their places, which 1 + w would round away.
    """
    if SOFTPLUS:
        b_w = tl.exp2(-tl.abs(b_x) * LOG2_E)
        b_r = b_w / (2 + b_w)
        b_q = b_r * b_r
        b_sum = 1 / 3 + b_q * (1 / 5 + b_q * (1 / 7 + b_q * (1 / 9 + b_q * (1 / 11 + b_q * (1 / 13)))))
        b_delta = tl.maximum(b_x, 0.0) + 2 * b_r * (1 + b_q * b_sum)
        b_inverse = 1 / (1 + b_w)
        return b_delta, tl.where(b_x >= 0, b_inverse, b_w * b_inverse)
    else:
        return b_x, tl.full(b_x.shape, 1.0, tl.float32)


# --8<-- [end:step_length]


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)), which overflows to 0 and not to NaN."""
    return 1 / (1 + tl.exp2(-b_x * LOG2_E))


@triton.jit
def load_steps(p, t, S: tl.constexpr, o, STEPS: tl.constexpr, last=0, EDGE: tl.constexpr = False):
    """Steps t, t + 1, …, t + STEPS - 1 as a tuple of blocks, all loaded before any is used; at an EDGE, 0 from the
    step `last` on."""
    b_steps = ()
    for k in tl.static_range(STEPS):
        if EDGE:
            b_step = tl.load(p + t * S + k * S + o, mask=(o >= 0) & (t + k < last), other=0.0)
        else:
            b_step = tl.load(p + t * S + k * S + o)
        b_steps += (b_step.to(tl.float32),)
    return b_steps


@triton.jit
def store_step(p, t, k: tl.constexpr, S: tl.constexpr, o, b_step, last, EDGE: tl.constexpr):
    """Step t + k; at an EDGE not from the step `last` on."""
    if EDGE:
        tl.store(p + t * S + k * S + o, b_step.to(p.dtype.element_ty), mask=(o >= 0) & (t + k < last))
    else:
        tl.store(p + t * S + k * S + o, b_step.to(p.dtype.element_ty))


@triton.jit
def place(blocks, spans, GROUPS: tl.constexpr):
    """What this program does: its batch, span, group and block of the group's channels."""
    i = tl.program_id(0)
    i_block = i % blocks
    i_g = i // blocks % GROUPS
    i_span = i // (blocks * GROUPS) % spans
    i_b = i // (blocks * GROUPS * spans)
    return i_b.to(tl.int64), i_span.to(tl.int64), i_g, i_block


@triton.jit
def checkpoint(p, b_h, i_b, t, length, o_h, m_h, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Save the state where a chunk begins, if there will be a backward pass (p is given)."""
    if p is not None:
        if t % CHUNK == 0:
            tl.store(p + (i_b * tl.cdiv(length, CHUNK) + t // CHUNK) * SIZE + o_h, b_h, mask=m_h)


# --- kernels: forward ----------------------------------------------------------------------------------------------


@triton.jit
def scan_steps(
    b_h, b_A, b_B, b_C, b_D, b_bias, p_u, p_delta, p_B, p_C, p_D, p_z, p_reset, p_y, p_ungated, t, o_d, m_d, o_n,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_Z: tl.constexpr, S_B: tl.constexpr, S_C: tl.constexpr,
    D: tl.constexpr, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps of (1) to (5), from time t: the new states, the time that has passed, and whether all was forgotten.

    Without p_y only the states are computed. Where S_B or S_C is 0, b_B or b_C serves every step.
    """
    b_us = load_steps(p_u, t, S_U, o_d, STEPS)  # (BLOCK_D,) each
    b_deltas = load_steps(p_delta, t, S_DELTA, o_d, STEPS)
    if S_B > 0:
        b_Bs = load_steps(p_B, t, S_B, o_n, STEPS)  # (BLOCK_N,) each
    if p_y is not None and S_C > 0:
        b_Cs = load_steps(p_C, t, S_C, o_n, STEPS)
    if p_z is not None:
        b_zs = load_steps(p_z, t, S_Z, o_d, STEPS)
    if p_reset is not None:
        resets = load_steps(p_reset, t, 1, 0, STEPS)
    b_passed = tl.zeros(o_d.shape, tl.float32)
    forgot = False
    # --8<-- [start:scan_steps]
    for k in tl.static_range(STEPS):
        b_delta, _ = step_length(b_deltas[k] + b_bias, SOFTPLUS)  # (1)
        b_passed += b_delta
        if p_reset is not None:
            forgot = forgot | (resets[k] != 0)
            b_h = tl.where(resets[k] != 0, 0.0, b_h)
        if S_B > 0:
            b_B = b_Bs[k][:, None]
        b_a = tl.exp2(b_delta[None, :] * b_A)  # (2)  (BLOCK_N, BLOCK_D)
        b_h = b_a * b_h + (b_delta * b_us[k])[None, :] * b_B  # (3)
        if p_y is not None:
            if S_C > 0:
                b_C = b_Cs[k][:, None]
            b_s = tl.sum(b_h * b_C, 0)  # (4)
            if p_D is not None:
                b_s += b_D * b_us[k]
            if p_ungated is not None:
                tl.store(p_ungated + t * D + k * D + o_d, b_s.to(p_ungated.dtype.element_ty), mask=m_d)
            if p_z is not None:
                b_s = b_s * b_zs[k] * sigmoid(b_zs[k])  # (5)
            tl.store(p_y + t * D + k * D + o_d, b_s.to(p_y.dtype.element_ty), mask=m_d)
    # --8<-- [end:scan_steps]
    return b_h, b_passed, forgot


@triton.jit(do_not_specialize=["length", "span", "spans"])
def forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_start, p_reset, p_y, p_ungated, p_checkpoint, p_end, p_decay,
    s_ub, s_deltab, s_zb, length, span, spans,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_Z: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, B_GROUPS: tl.constexpr, C_GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: a block of channels through a span of time, each channel's states in the registers of one thread.

    Without p_y it is the first of two levels: p_end receives the span's last state, from zero, and p_decay the decay
    over the span, or -1 where a reset lies within it.
    """
    WIDTH: tl.constexpr = D // GROUPS
    i_b, i_span, i_g, i_block = place(tl.cdiv(WIDTH, BLOCK_D), spans, GROUPS)
    o_width = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_width < WIDTH
    o_d = i_g * WIDTH + tl.minimum(o_width, WIDTH - 1)  # lanes past the end repeat the last channel, and store nothing
    o_n = tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D): neighbouring threads have neighbouring channels. The hint promises no alignment: otherwise
    # a thread would be given four channels, with fewer states of each, and the sum over N would cross threads.
    o_h = tl.multiple_of(o_n[:, None] * D + (i_g * WIDTH + o_width)[None, :], [1, 1])
    m_h = (o_n < N)[:, None] & m_d[None, :]
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2_E
    b_h = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    i_bs = i_b * spans + i_span
    if p_start is not None:
        b_h = tl.load(p_start + i_bs * (N * D) + o_h, mask=m_h, other=0.0)
    b_D, b_bias, b_B, b_C = 0.0, 0.0, 0.0, 0.0
    if p_D is not None:
        b_D = tl.load(p_D + o_d)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d)
    if B_GROUPS > 0:
        p_B += i_b * length * (B_GROUPS * BLOCK_N) + i_g // (GROUPS // B_GROUPS) * BLOCK_N
    else:
        b_B = tl.load(p_B + o_h, mask=m_h, other=0.0)
    if p_C is not None:
        if C_GROUPS > 0:
            p_C += i_b * length * (C_GROUPS * BLOCK_N) + i_g // (GROUPS // C_GROUPS) * BLOCK_N
        else:
            b_C = tl.load(p_C + o_h, mask=m_h, other=0.0)
    p_u += i_b * s_ub
    p_delta += i_b * s_deltab
    if p_z is not None:
        p_z += i_b * s_zb
    if p_reset is not None:
        p_reset += i_b * length
    if p_y is not None:
        p_y += i_b * length * D
    if p_ungated is not None:
        p_ungated += i_b * length * D

    first = i_span * span
    last = tl.minimum(first + span, length)
    whole = first + (last - first) // STEPS * STEPS
    b_passed = tl.zeros((BLOCK_D,), tl.float32)
    forgot = False
    for t in tl.range(first, whole, STEPS):
        checkpoint(p_checkpoint, b_h, i_b, t, length, o_h, m_h, N * D, CHUNK)
        b_h, b_more, m_more = scan_steps(
            b_h, b_A, b_B, b_C, b_D, b_bias, p_u, p_delta, p_B, p_C, p_D, p_z, p_reset, p_y, p_ungated, t,
            o_d, m_d, o_n, S_U, S_DELTA, S_Z, B_GROUPS * BLOCK_N, C_GROUPS * BLOCK_N, D, SOFTPLUS, STEPS,
        )  # fmt: skip
        if p_decay is not None:
            b_passed += b_more
            forgot = forgot | m_more
    for t in tl.range(whole, last):
        checkpoint(p_checkpoint, b_h, i_b, t, length, o_h, m_h, N * D, CHUNK)
        b_h, b_more, m_more = scan_steps(
            b_h, b_A, b_B, b_C, b_D, b_bias, p_u, p_delta, p_B, p_C, p_D, p_z, p_reset, p_y, p_ungated, t,
            o_d, m_d, o_n, S_U, S_DELTA, S_Z, B_GROUPS * BLOCK_N, C_GROUPS * BLOCK_N, D, SOFTPLUS, 1,
        )  # fmt: skip
        if p_decay is not None:
            b_passed += b_more
            forgot = forgot | m_more
    tl.store(p_end + i_bs * (N * D) + o_h, b_h, mask=m_h)
    if p_decay is not None:
        b_decay = tl.where(forgot, -1.0, tl.exp2(b_passed[None, :] * b_A))
        tl.store(p_decay + i_bs * (N * D) + o_h, b_decay, mask=m_h)


# --8<-- [start:pass_kernel]
@triton.jit(do_not_specialize=["size", "spans"])
def pass_kernel(p_start, p_local, p_decay, p_initial, size, spans, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Between two levels: the state before each span, h = decay · h + local, from the first or, in REVERSE, the last.

    One program: BLOCK numbers of the states (B, spans, N, D) of one batch, of `size` each.
    """
    blocks = tl.cdiv(size, BLOCK)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_h = tl.zeros((BLOCK,), tl.float32)
    if p_initial is not None:
        b_h = tl.load(p_initial + i_b * size + o, mask=m, other=0.0)
    for i in tl.range(0, spans):
        i_span = spans - 1 - i if REVERSE else i
        o_span = (i_b * spans + i_span) * size + o
        tl.store(p_start + o_span, b_h, mask=m)
        b_decay = tl.load(p_decay + o_span, mask=m, other=0.0)
        b_local = tl.load(p_local + o_span, mask=m, other=0.0)
        b_h = tl.where(b_decay < 0, 0.0, b_decay * b_h) + b_local  # below 0: a reset within, and nothing passes


# --8<-- [end:pass_kernel]


# --- kernels: backward ---------------------------------------------------------------------------------------------


@triton.jit
def adjoint_steps(
    b_q, b_A, b_C, b_bias, p_delta, p_C, p_z, p_dy, p_reset, t, o_d, o_n,
    S_DELTA: tl.constexpr, S_C: tl.constexpr, S_Z: tl.constexpr, S_DY: tl.constexpr, SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """(6) and (7) alone, for STEPS steps from the last of them to t; time passed and resets as in `scan_steps`."""
    b_deltas = load_steps(p_delta, t, S_DELTA, o_d, STEPS)  # (BLOCK_D,) each
    b_dys = load_steps(p_dy, t, S_DY, o_d, STEPS)
    if S_C > 0:
        b_Cs = load_steps(p_C, t, S_C, o_n, STEPS)  # (BLOCK_N,) each
    if p_z is not None:
        b_zs = load_steps(p_z, t, S_Z, o_d, STEPS)
    b_passed = tl.zeros(o_d.shape, tl.float32)
    forgot = False
    for k in tl.static_range(STEPS - 1, -1, -1):
        b_delta, _ = step_length(b_deltas[k] + b_bias, SOFTPLUS)
        b_passed += b_delta
        b_g = b_dys[k]
        if p_z is not None:
            b_g = b_g * b_zs[k] * sigmoid(b_zs[k])
        if S_C > 0:
            b_C = b_Cs[k][:, None]
        b_q = tl.exp2(b_delta[None, :] * b_A) * (b_q + b_g[None, :] * b_C)  # (6), (7)
        if p_reset is not None:
            reset = tl.load(p_reset + t + k) != 0
            forgot = forgot | reset
            b_q = tl.where(reset, 0.0, b_q)
    return b_q, b_passed, forgot


@triton.jit(do_not_specialize=["length", "span", "spans"])
def adjoint_kernel(
    p_delta, p_A, p_C, p_z, p_bias, p_dy, p_reset, p_end, p_decay, s_deltab, s_zb, s_dyb, length, span, spans,
    S_DELTA: tl.constexpr, S_Z: tl.constexpr, S_DY: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, C_GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The first of two levels, backward: q of each span as if no span came after it, and the decay over the span."""
    WIDTH: tl.constexpr = D // GROUPS
    i_b, i_span, i_g, i_block = place(tl.cdiv(WIDTH, BLOCK_D), spans, GROUPS)
    o_width = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    o_d = i_g * WIDTH + tl.minimum(o_width, WIDTH - 1)
    o_n = tl.arange(0, BLOCK_N)
    o_h = tl.multiple_of(o_n[:, None] * D + (i_g * WIDTH + o_width)[None, :], [1, 1])  # as in the forward
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
    b_passed = tl.zeros((BLOCK_D,), tl.float32)
    forgot = False
    for i in tl.range(whole, last):
        b_q, b_more, m_more = adjoint_steps(
            b_q, b_A, b_C, b_bias, p_delta, p_C, p_z, p_dy, p_reset, whole + last - 1 - i, o_d, o_n,
            S_DELTA, C_GROUPS * BLOCK_N, S_Z, S_DY, SOFTPLUS, 1,
        )  # fmt: skip
        b_passed += b_more
        forgot = forgot | m_more
    for i in tl.range(first, whole, STEPS):
        b_q, b_more, m_more = adjoint_steps(
            b_q, b_A, b_C, b_bias, p_delta, p_C, p_z, p_dy, p_reset, first + whole - STEPS - i, o_d, o_n,
            S_DELTA, C_GROUPS * BLOCK_N, S_Z, S_DY, SOFTPLUS, STEPS,
        )  # fmt: skip
        b_passed += b_more
        forgot = forgot | m_more
    i_bs = i_b * spans + i_span
    tl.store(p_end + i_bs * (N * D) + o_h, b_q, mask=m_h)
    b_decay = tl.where(forgot, -1.0, tl.exp2(b_passed[None, :] * b_A))
    tl.store(p_decay + i_bs * (N * D) + o_h, b_decay, mask=m_h)


# --8<-- [start:tile]
# The backward's tile is (D_LO, N_HI, D_HI, N_LO): channel d_lo * D_HI + d_hi, state n_hi * N_LO + n_lo. The threads of
# a warp lie along N_HI and D_HI, and each holds D_LO x N_LO numbers: sums over channels and sums over states both begin
# in a thread's own registers, and end with an exchange among 8 threads, or 4.


@triton.jit
def spread(b_x, D_LO: tl.constexpr, D_HI: tl.constexpr):
    """One number for each channel (BLOCK_D,), shaped (D_LO, 1, D_HI, 1) to broadcast over the tile."""
    return tl.reshape(b_x, [D_LO, D_HI])[:, None, :, None]


@triton.jit
def over_states(b_x):
    """Σ_n of a tile: (BLOCK_D,)."""
    return tl.reshape(tl.sum(tl.sum(b_x, 3), 1), [b_x.shape[0] * b_x.shape[2]])


@triton.jit
def over_channels(b_x):
    """Σ_d of a tile: (N_HI, N_LO)."""
    return tl.sum(tl.sum(b_x, 0), 1)


# --8<-- [end:tile]


@triton.jit
def states_again(
    b_h, b_A, b_B, b_bias, p_u, p_delta, p_B, p_reset, t, o_d, o_n,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_B: tl.constexpr, D_LO: tl.constexpr, D_HI: tl.constexpr,
    SOFTPLUS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """(1) to (3) again, for STEPS steps from time t."""
    b_us = load_steps(p_u, t, S_U, o_d, STEPS)  # (BLOCK_D,) each
    b_deltas = load_steps(p_delta, t, S_DELTA, o_d, STEPS)
    if S_B > 0:
        b_Bs = load_steps(p_B, t, S_B, o_n, STEPS)  # (N_HI, N_LO) each
    for k in tl.static_range(STEPS):
        b_delta, _ = step_length(b_deltas[k] + b_bias, SOFTPLUS)
        if p_reset is not None:
            b_h = tl.where(tl.load(p_reset + t + k) != 0, 0.0, b_h)
        if S_B > 0:
            b_B = b_Bs[k][None, :, None, :]
        b_a = tl.exp2(spread(b_delta, D_LO, D_HI) * b_A)
        b_h = b_a * b_h + spread(b_delta * b_us[k], D_LO, D_HI) * b_B
    return b_h


@triton.jit
def backward_steps(
    b_h, b_q, b_dA, b_dB, b_dC, b_dD, b_dbias, b_A, b_B, b_C, b_D, b_bias,
    p_u, p_delta, p_B, p_C, p_D, p_z, p_dy, p_ungated, p_reset, p_du, p_ddelta, p_dz, p_dB, p_dC,
    t, last, o_d, m_d, o_n,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_B: tl.constexpr, S_C: tl.constexpr, S_Z: tl.constexpr,
    S_DY: tl.constexpr, S_DB: tl.constexpr, D: tl.constexpr, D_LO: tl.constexpr, D_HI: tl.constexpr,
    SOFTPLUS: tl.constexpr, STEPS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """From b_h, the states before step t, STEPS steps forward, then (6) to (13) backward.

    At an EDGE steps from `last` on do nothing: Δ and g are 0 there, and q passes unchanged.
    """
    b_us = load_steps(p_u, t, S_U, o_d, STEPS, last, EDGE)  # (BLOCK_D,) each
    b_xs = load_steps(p_delta, t, S_DELTA, o_d, STEPS, last, EDGE)
    b_dys = load_steps(p_dy, t, S_DY, o_d, STEPS, last, EDGE)
    if S_B > 0:
        b_Bs = load_steps(p_B, t, S_B, o_n, STEPS, last, EDGE)  # (N_HI, N_LO) each
    if p_z is not None:
        b_zs = load_steps(p_z, t, S_Z, o_d, STEPS, last, EDGE)
        b_ss = load_steps(p_ungated, t, D, o_d, STEPS, last, EDGE)

    b_hs, b_as, b_deltas, b_slopes, resets = (b_h,), (), (), (), ()
    for k in tl.static_range(STEPS):
        b_delta, b_slope = step_length(b_xs[k] + b_bias, SOFTPLUS)
        if EDGE:
            b_delta = tl.where(t + k < last, b_delta, 0.0)
        if p_reset is not None:
            reset = tl.load(p_reset + t + k, mask=t + k < last, other=0) != 0
            resets += (reset,)
            b_h = tl.where(reset, 0.0, b_h)
        if S_B > 0:
            b_B = b_Bs[k][None, :, None, :]
        b_a = tl.exp2(spread(b_delta, D_LO, D_HI) * b_A)
        b_h = b_a * b_h + spread(b_delta * b_us[k], D_LO, D_HI) * b_B
        b_hs += (b_h,)
        b_as += (b_a,)
        b_deltas += (b_delta,)
        b_slopes += (b_slope,)

    for k in tl.static_range(STEPS - 1, -1, -1):
        m_t = m_d & (t + k < last) if EDGE else m_d
        b_u, b_delta = b_us[k], b_deltas[k]
        b_g = tl.where(m_d, b_dys[k], 0.0)
        if p_z is not None:
            b_sigmoid = sigmoid(b_zs[k])
            b_dz = b_g * b_ss[k] * b_sigmoid * (1 + b_zs[k] * (1 - b_sigmoid))  # (13)
            tl.store(p_dz + t * D + k * D + o_d, b_dz.to(p_dz.dtype.element_ty), mask=m_t)
            b_g = b_g * b_zs[k] * b_sigmoid
        b_gs = spread(b_g, D_LO, D_HI)
        if S_B > 0:  # loaded again: keeping it from above costs registers
            b_B = load_steps(p_B, t + k, S_B, o_n, 1, last, EDGE)[0][None, :, None, :]
        if S_C > 0:
            b_C = load_steps(p_C, t + k, S_C, o_n, 1, last, EDGE)[0][None, :, None, :]
        # --8<-- [start:backward_steps]
        b_dh = b_q + b_gs * b_C  # (6)  the tile
        b_dC_t = b_hs[k + 1] * b_gs  # (8), before its sum
        b_dB_t = b_dh * spread(b_delta * b_u, D_LO, D_HI)  # (9), before its sum
        b_h = b_hs[k]
        b_q = b_as[k] * b_dh  # (7)
        if p_reset is not None:
            b_h = tl.where(resets[k], 0.0, b_h)
            b_q = tl.where(resets[k], 0.0, b_q)
        b_qh = b_q * b_h
        b_dA += b_qh * spread(b_delta, D_LO, D_HI)  # (10)
        b_Bh = over_states(b_dh * b_B)
        b_du = b_delta * b_Bh  # (11)
        if p_D is not None:
            b_du += b_D * b_g
            b_dD += b_g * b_u
        b_ddelta = (over_states(b_qh * b_A) * LN_2 + b_u * b_Bh) * b_slopes[k]  # (12)
        # --8<-- [end:backward_steps]
        tl.store(p_du + t * D + k * D + o_d, b_du.to(p_du.dtype.element_ty), mask=m_t)
        tl.store(p_ddelta + t * D + k * D + o_d, b_ddelta.to(p_ddelta.dtype.element_ty), mask=m_t)
        b_dbias += tl.where(t + k < last, b_ddelta, 0.0) if EDGE else b_ddelta
        if S_B > 0:
            store_step(p_dB, t, k, S_DB, o_n, over_channels(b_dB_t), last, EDGE)
        else:
            b_dB += b_dB_t
        if S_C > 0:
            store_step(p_dC, t, k, S_DB, o_n, over_channels(b_dC_t), last, EDGE)
        else:
            b_dC += b_dC_t
    return b_q, b_dA, b_dB, b_dC, b_dD, b_dbias


@triton.jit(do_not_specialize=["length", "span", "spans"])
def backward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_dy, p_ungated, p_checkpoint, p_reset, p_end, p_scratch,
    p_du, p_ddelta, p_dA, p_dB, p_dC, p_dD, p_dz, p_dbias, p_start, s_ub, s_deltab, s_zb, s_dyb, length, span, spans,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_Z: tl.constexpr, S_DY: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, B_GROUPS: tl.constexpr, C_GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    D_LO: tl.constexpr, N_HI: tl.constexpr, D_HI: tl.constexpr, N_LO: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: a block of channels through a span of time, from its last chunk to its first.

    p_end is the q of the step after the span, p_start receives the q of its first step. dB and dC
    are sums over the program's channels; dA, dD, dbias, and B and C that are the same at every step, over its time.
    """
    BLOCK_D: tl.constexpr = D_LO * D_HI
    BLOCK_N: tl.constexpr = N_HI * N_LO
    WIDTH: tl.constexpr = D // GROUPS
    BLOCKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i_b, i_span, i_g, i_block = place(BLOCKS, spans, GROUPS)
    i_bs = i_b * spans + i_span
    o_width = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_width < WIDTH
    o_d = i_g * WIDTH + tl.minimum(o_width, WIDTH - 1)
    o_n = tl.arange(0, N_HI)[:, None] * N_LO + tl.arange(0, N_LO)[None, :]  # (N_HI, N_LO)
    o_lo, o_hi = tl.arange(0, D_LO)[:, None, None, None], tl.arange(0, D_HI)[None, None, :, None]
    o_tile = o_n[None, :, None, :]
    o_lane = i_block * BLOCK_D + o_lo * D_HI + o_hi
    # Three orders of the tile in memory: (D, N); the threads' own, in which each has N_LO numbers side by side; and the
    # forward kernel's (N, D), in which it has none side by side.
    o_h = (i_g * WIDTH + o_lane) * N + o_tile
    o_own = ((o_lo * N_HI + o_tile // N_LO) * D_HI + o_hi) * N_LO + o_tile % N_LO
    o_forward = tl.multiple_of(o_tile * D + i_g * WIDTH + o_lane, [1, 1, 1, 1])
    if N_LO == 4:
        # The compiler gives threads neighbours along the axis with most of them, and orders the others by theirs: these
        # hints leave it one layout for all three, that of the tile. They only steer the layout: the 4 is true of o_h
        # and o_own; it is not of o_forward, which has no hint about alignment and so is never loaded as a vector.
        o_h = tl.max_contiguous(o_h, [1, 2, 2, 4])
        o_own = tl.max_contiguous(o_own, [1, 2, 2, 4])
        o_forward = tl.max_contiguous(o_forward, [1, 2, 2, 4])
    m_h = (o_tile < N) & (o_lane < WIDTH)
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2_E
    b_q = tl.zeros((D_LO, N_HI, D_HI, N_LO), tl.float32)
    b_dA, b_dB, b_dC = b_q, b_q, b_q
    if p_end is not None:
        b_q = tl.load(p_end + i_bs * (N * D) + o_h, mask=m_h, other=0.0)
    b_dD = tl.zeros((BLOCK_D,), tl.float32)
    b_dbias = b_dD
    b_D, b_bias, b_B, b_C = 0.0, 0.0, 0.0, 0.0
    if p_D is not None:
        b_D = tl.load(p_D + o_d)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d)
    S_DB: tl.constexpr = GROUPS * BLOCKS * BLOCK_N
    o_part = i_b * length * S_DB + (i_g * BLOCKS + i_block) * BLOCK_N
    if B_GROUPS > 0:
        p_B += i_b * length * (B_GROUPS * BLOCK_N) + i_g // (GROUPS // B_GROUPS) * BLOCK_N
        p_dB += o_part
    else:
        b_B = tl.load(p_B + o_h, mask=m_h, other=0.0)
    if C_GROUPS > 0:
        p_C += i_b * length * (C_GROUPS * BLOCK_N) + i_g // (GROUPS // C_GROUPS) * BLOCK_N
        p_dC += o_part
    else:
        b_C = tl.load(p_C + o_h, mask=m_h, other=0.0)
    p_u += i_b * s_ub
    p_delta += i_b * s_deltab
    p_dy += i_b * s_dyb
    p_du += i_b * length * D
    p_ddelta += i_b * length * D
    if p_z is not None:
        p_z += i_b * s_zb
        p_ungated += i_b * length * D
        p_dz += i_b * length * D
    if p_reset is not None:
        p_reset += i_b * length
    SIZE: tl.constexpr = BLOCK_N * BLOCK_D
    p_scratch += tl.program_id(0).to(tl.int64) * (SIZE * (CHUNK // STEPS))

    first = i_span * span
    last = tl.minimum(first + span, length)
    chunks = tl.cdiv(last - first, CHUNK)
    for j in tl.range(0, chunks):
        begin = first + (chunks - 1 - j) * CHUNK
        end = tl.minimum(begin + CHUNK, last)
        i_chunk = i_b * tl.cdiv(length, CHUNK) + begin // CHUNK
        b_h = tl.load(p_checkpoint + i_chunk * (N * D) + o_forward, mask=m_h, other=0.0)
        parts = tl.cdiv(end - begin, STEPS)
        for i in tl.range(0, parts - 1):
            tl.store(p_scratch + i * SIZE + o_own, b_h)
            b_h = states_again(
                b_h, b_A, b_B, b_bias, p_u, p_delta, p_B, p_reset, begin + i * STEPS, o_d, o_n,
                S_U, S_DELTA, B_GROUPS * BLOCK_N, D_LO, D_HI, SOFTPLUS, STEPS,
            )  # fmt: skip
        whole = (end - begin) // STEPS
        if whole < parts:
            b_q, b_dA, b_dB, b_dC, b_dD, b_dbias = backward_steps(
                b_h, b_q, b_dA, b_dB, b_dC, b_dD, b_dbias, b_A, b_B, b_C, b_D, b_bias, p_u, p_delta, p_B, p_C, p_D,
                p_z, p_dy, p_ungated, p_reset, p_du, p_ddelta, p_dz, p_dB, p_dC,
                begin + whole * STEPS, last, o_d, m_d, o_n,
                S_U, S_DELTA, B_GROUPS * BLOCK_N, C_GROUPS * BLOCK_N, S_Z, S_DY, S_DB, D, D_LO, D_HI, SOFTPLUS, STEPS,
                True,
            )  # fmt: skip
        else:
            tl.store(p_scratch + (parts - 1) * SIZE + o_own, b_h)
        tl.debug_barrier()  # a thread reads from scratch what others wrote
        for i in tl.range(0, whole):
            i_part = whole - 1 - i
            b_h = tl.load(p_scratch + i_part * SIZE + o_own)
            b_q, b_dA, b_dB, b_dC, b_dD, b_dbias = backward_steps(
                b_h, b_q, b_dA, b_dB, b_dC, b_dD, b_dbias, b_A, b_B, b_C, b_D, b_bias, p_u, p_delta, p_B, p_C, p_D,
                p_z, p_dy, p_ungated, p_reset, p_du, p_ddelta, p_dz, p_dB, p_dC,
                begin + i_part * STEPS, last, o_d, m_d, o_n,
                S_U, S_DELTA, B_GROUPS * BLOCK_N, C_GROUPS * BLOCK_N, S_Z, S_DY, S_DB, D, D_LO, D_HI, SOFTPLUS, STEPS,
                False,
            )  # fmt: skip
        tl.debug_barrier()  # all have read it before any writes the next chunk there
    tl.store(p_start + i_bs * (N * D) + o_h, b_q, mask=m_h)
    tl.store(p_dA + i_bs * (N * D) + o_h, b_dA, mask=m_h)
    if B_GROUPS == 0:
        tl.store(p_dB + i_bs * (N * D) + o_h, b_dB, mask=m_h)
    if C_GROUPS == 0:
        tl.store(p_dC + i_bs * (N * D) + o_h, b_dC, mask=m_h)
    if p_dD is not None:
        tl.store(p_dD + i_bs * D + o_d, b_dD, mask=m_d)
    if p_dbias is not None:
        tl.store(p_dbias + i_bs * D + o_d, b_dbias, mask=m_d)


INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)

# --- launchers -----------------------------------------------------------------------------------------------------


TILES = {  # of the backward, by N up to a power of two: D_LO, N_HI, D_HI, N_LO, STEPS, num_warps
    1: (4, 1, 32, 1, 2, 1),
    2: (4, 1, 32, 2, 2, 1),
    4: (4, 1, 32, 4, 2, 1),
    8: (4, 2, 16, 4, 2, 1),
    16: (4, 4, 8, 4, 4, 1),
    32: (8, 8, 4, 4, 2, 1),
    64: (4, 16, 8, 4, 2, 4),
    128: (4, 32, 8, 4, 2, 8),
    256: (2, 64, 8, 4, 2, 8),
}
MOST_STATES = max(TILES)


def configuration(kernel: str, states: int, resets: bool = False) -> dict[str, int]:
    """The blocks, warps and unrolling of a kernel.

    Chosen from what compiles in few instructions and, forward, without a spill, as
    docs/measured/selective_scan_compile.json shows, not yet from timings. Forward, up to 64 states lie in one thread;
    128 are shared by two, and 256 by four.

    Args:
        kernel: "forward", "adjoint" or "backward".
        states: N.
        resets: whether there are any, which cost registers.
    """
    block_n = 1 << (states - 1).bit_length()
    if kernel == "backward":
        config = dict(zip(("D_LO", "N_HI", "D_HI", "N_LO", "STEPS", "num_warps"), TILES[block_n]))
    else:
        warps = 1 if block_n <= 16 else 2 if block_n <= 64 else 4
        config = {"BLOCK_D": min(32 * warps, 8192 // block_n), "BLOCK_N": block_n}
        config |= {"STEPS": 8 if block_n == 16 and not resets else 4, "num_warps": warps}
    if INTERPRETED:  # few steps at a time, so that tests with short sequences have many groups, and a rest
        config["STEPS"] = 2
    return config | {"num_stages": 1}


CHUNK = 8 if INTERPRETED else 64  # steps from one saved state to the next: N/64 float32 numbers for each number of u
FULL = 64  # channels for each multiprocessor, above which one level fills the chip


def spans_of(u: Tensor) -> int:
    """Into how many spans time is cut; 1 where one level is enough.

    The rule: two levels take over where there are fewer channels, B · D, than 64 for each multiprocessor (8,448 on an
    H100), since a thread holds a channel. Time is then cut until there are twice as many, into spans of at least two
    chunks; a sequence shorter than two such spans stays whole. Scanning twice adds 6 instructions for an element to the
    forward's 9 and 7 to the backward's 32, for threads that were idle.
    """
    batch, length, channels = u.shape
    chip = torch.cuda.get_device_properties(u.device).multi_processor_count if u.is_cuda else 8
    if batch * channels >= FULL * chip:
        return 1
    return max(1, min(triton.cdiv(2 * FULL * chip, batch * channels), length // (2 * CHUNK)))


class Plan:
    """One call's sizes, and its tensors as the kernels take them.

    u, delta, z and dy keep their layout if their channels lie side by side, or are copied. B and C, which every channel
    of a group reads, become (B, L, G, BLOCK_N) in float32 once, padded by zeros. What belongs to channels and states, A
    and the states themselves, lies (…, D, N) for the backward kernel, in which a thread has neighbouring states, and is
    `turned` to (…, N, D) for the others, in which neighbouring threads have neighbouring channels.
    """

    def __init__(self, u, delta, A, B, C, D, z, bias, softplus, reset):
        self.batch, self.length, self.channels = u.shape
        self.states = A.shape[1]
        self.u, self.delta, self.z = _rows(u), _rows(delta), _rows(z)
        self.A, self.D, self.bias = _wide(A), _wide(D), _wide(bias)
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)
        block = 1 << (self.states - 1).bit_length()
        self.B, self.C = (_wide(x) if x.ndim == 2 else _padded(x, block) for x in (B, C))
        self.b_groups, self.c_groups = (0 if x.ndim == 2 else x.shape[2] for x in (B, C))
        self.groups = math.lcm(max(1, self.b_groups), max(1, self.c_groups))
        self.softplus = softplus
        self.span = triton.cdiv(triton.cdiv(self.length, CHUNK), spans_of(u)) * CHUNK
        self.spans = triton.cdiv(self.length, self.span)
        self.device = u.device

    def room(self, *shape: int) -> Tensor:
        """An empty float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def per_span(self, turned: bool = True) -> Tensor:
        """An empty tensor of one number for each state and span: (B, spans, N, D), or (B, spans, D, N)."""
        last = (self.states, self.channels) if turned else (self.channels, self.states)
        return self.room(self.batch, self.spans, *last)

    def programs(self, width: int) -> int:
        """How many programs there are, each with a block of at most so many channels of one group."""
        blocks = triton.cdiv(self.channels // self.groups, width)
        return self.batch * self.spans * self.groups * blocks

    def sizes(self) -> dict[str, int | bool]:
        """The constants that every kernel is compiled for."""
        return {"D": self.channels, "N": self.states, "GROUPS": self.groups, "SOFTPLUS": self.softplus}

    def pass_on(self, local: Tensor, decay: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
        """The state before each span; in reverse, the q after it."""
        start, size, block = self.per_span(), self.states * self.channels, 256
        pass_kernel[(self.batch * triton.cdiv(size, block),)](
            start, local, decay, initial, size, self.spans, REVERSE=reverse, BLOCK=block, num_warps=4
        )
        return start


def _rows(x: Tensor | None) -> Tensor | None:
    """x with the channels of each step side by side, copied only if they are not."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _padded(x: Tensor, width: int) -> Tensor:
    """(B, L, G, N) in float32, contiguous, with zeros for the states up to a power of two."""
    return torch.nn.functional.pad(x.float(), (0, width - x.shape[-1])).contiguous()


def launch_forward(
    u, delta, A, B, C, D, z, bias, softplus, state, reset, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last state, and to `keep` for the backward the states at each chunk's start and the outputs not gated."""
    y, last, checkpoint, ungated = _outputs(u, A, z, keep)
    plan = Plan(u, delta, A, B, C, D, z, bias, softplus, reset)
    config = configuration("forward", plan.states, reset is not None)
    strides = plan.u.stride(0), plan.delta.stride(0), 0 if z is None else plan.z.stride(0)
    fixed = {"S_U": plan.u.stride(1), "S_DELTA": plan.delta.stride(1), "S_Z": 0 if z is None else plan.z.stride(1)}
    fixed |= plan.sizes() | {"B_GROUPS": plan.b_groups, "C_GROUPS": plan.c_groups, "CHUNK": CHUNK} | config
    grid, times = (plan.programs(config["BLOCK_D"]),), (plan.length, plan.span, plan.spans)
    start, end, A = None if state is None else _wide(state.mT), plan.per_span(), _wide(A.mT)
    B, C = (_wide(x.mT) if x.ndim == 2 else known for x, known in ((B, plan.B), (C, plan.C)))
    with torch.cuda.device_of(u):
        if plan.spans > 1:
            decay = plan.per_span()
            forward_kernel[grid](
                plan.u, plan.delta, A, B, None, None, None, plan.bias, None, plan.reset, None, None, None,
                end, decay, *strides, *times, **fixed,
            )  # fmt: skip
            start = plan.pass_on(end, decay, start, False)
        forward_kernel[grid](
            plan.u, plan.delta, A, B, C, plan.D, plan.z, plan.bias, start, plan.reset, y,
            ungated if keep and z is not None else None, checkpoint if keep else None, end, None,
            *strides, *times, **fixed,
        )  # fmt: skip
    return y, last.copy_(end[:, -1].mT), checkpoint, ungated


def _outputs(u: Tensor, A: Tensor, z: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for y, the last state, and what is saved for the backward pass: of size 0 without one.

    Outputs before the gate may be too large for float16 though y is not: they are then saved in float32.
    """
    batch, length, channels = u.shape
    states = A.shape[1]
    chunks = triton.cdiv(length, CHUNK) if keep else 0
    new = {"dtype": torch.float32, "device": u.device}
    gated = (batch, length, channels) if keep and z is not None else (0,)
    return (
        torch.empty(u.shape, dtype=u.dtype, device=u.device),
        torch.empty(batch, channels, states, **new),
        torch.empty(batch, chunks, states, channels, **new),
        torch.empty(gated, dtype=torch.float32 if u.dtype == torch.float16 else u.dtype, device=u.device),
    )


def launch_backward(
    dy, d_last, u, delta, A, B, C, D, z, bias, softplus, state, reset, checkpoint, ungated
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of u, delta, A, B, C, D, z, bias and the initial state, empty for those that were not given."""
    grads = _gradients(u, delta, A, B, C, D, z, bias, state)
    plan = Plan(u, delta, A, B, C, D, z, bias, softplus, reset)
    dy = _rows(u.new_zeros(()).expand(u.shape) if dy is None else dy)
    config = configuration("backward", plan.states)
    width, block_n = config["D_LO"] * config["D_HI"], config["N_HI"] * config["N_LO"]
    blocks = triton.cdiv(plan.channels // plan.groups, width)
    parts = (plan.batch, plan.length, plan.groups, blocks, block_n)
    dA, q = plan.per_span(turned=False), plan.per_span(turned=False)
    dB, dC = (plan.per_span(turned=False) if x.ndim == 2 else plan.room(*parts) for x in (B, C))
    dD, dbias = (None if x is None else plan.room(plan.batch, plan.spans, plan.channels) for x in (D, bias))
    scratch = plan.room(plan.programs(width) * (CHUNK // config["STEPS"]) * width * block_n)
    times, end = (plan.length, plan.span, plan.spans), _wide(d_last)
    s_zb, s_z = (0, 0) if z is None else plan.z.stride()[:2]
    fixed = {"S_DELTA": plan.delta.stride(1), "S_Z": s_z, "S_DY": dy.stride(1), "C_GROUPS": plan.c_groups}
    fixed |= plan.sizes()
    with torch.cuda.device_of(u):
        if plan.spans > 1:
            local, decay = plan.per_span(), plan.per_span()
            narrow = configuration("adjoint", plan.states)
            adjoint_kernel[(plan.programs(narrow["BLOCK_D"]),)](
                plan.delta, _wide(A.mT), _wide(C.mT) if C.ndim == 2 else plan.C, plan.z, plan.bias, dy, plan.reset,
                local, decay, plan.delta.stride(0), s_zb, dy.stride(0), *times, **fixed, **narrow,
            )  # fmt: skip
            end = plan.pass_on(local, decay, None if end is None else end.mT.contiguous(), True).mT.contiguous()
        backward_kernel[(plan.programs(width),)](
            plan.u, plan.delta, plan.A, plan.B, plan.C, plan.D, plan.z, plan.bias, dy,
            None if z is None else ungated, checkpoint, plan.reset, end, scratch,
            grads[0], grads[1], dA, dB, dC, dD, None if z is None else grads[6], dbias, q,
            plan.u.stride(0), plan.delta.stride(0), s_zb, dy.stride(0), *times,
            S_U=plan.u.stride(1), B_GROUPS=plan.b_groups, CHUNK=CHUNK, **fixed, **config,
        )  # fmt: skip
    grads[2].copy_(dA.sum((0, 1)))
    for grad, x, part in ((grads[3], B, dB), (grads[4], C, dC)):
        if x.ndim == 2:
            grad.copy_(part.sum((0, 1)))
        else:  # over the blocks of a group, which C may divide into smaller ones than B does, or B than C
            grad.copy_(part.view(*parts[:2], x.shape[2], -1, block_n).sum(3)[..., : plan.states])
    for grad, part in ((grads[5], dD), (grads[7], dbias)):
        if part is not None:
            grad.copy_(part.sum((0, 1)))
    if state is not None:
        grads[8].copy_(q[:, 0])
    return grads


def _gradients(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """An empty gradient for each; of size 0 for what was not given."""
    like = next(x for x in inputs if x is not None)
    return tuple(
        torch.empty(0 if x is None else x.shape, dtype=(like if x is None else x).dtype, device=like.device)
        for x in inputs
    )


# --- autograd ------------------------------------------------------------------------------------------------------
# custom_op and not triton_op: the latter traces into the launch, which Triton's interpreter cannot follow, and then
# what runs on a GPU would not be what is tested without one.


@torch.library.custom_op("nondual::selective_scan", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, state: Tensor | None, reset: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_forward(u, delta, A, B, C, D, z, bias, softplus, state, reset, keep)


@_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, state, reset, keep):
    return _outputs(u, A, z, keep)


@torch.library.custom_op("nondual::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor | None, d_last: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, softplus: bool, state: Tensor | None,
    reset: Tensor | None, checkpoint: Tensor, ungated: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_backward(
        dy, d_last, u, delta, A, B, C, D, z, bias, softplus, state, reset, checkpoint, ungated
    )  # fmt: skip


@_backward.register_fake
def _(dy, d_last, u, delta, A, B, C, D, z, bias, softplus, state, reset, checkpoint, ungated):
    return _gradients(u, delta, A, B, C, D, z, bias, state)


def _save(ctx, inputs, output):
    *tensors, softplus, state, reset, _ = inputs
    ctx.save_for_backward(*tensors, state, reset, *output[2:])
    ctx.softplus = softplus
    ctx.set_materialize_grads(False)  # the saved states and outputs get no gradient: do not make zeros of their size


def _differentiate(ctx, dy, d_last, *_):
    *tensors, state, reset, checkpoint, ungated = ctx.saved_tensors
    grads = _backward(dy, d_last, *tensors, ctx.softplus, state, reset, checkpoint, ungated)
    given = [None if x is None else grad for x, grad in zip((*tensors, state), grads)]
    return *given[:8], None, given[8], None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        "selective_scan(impl='triton') has no second derivative; selective_scan(impl='reference') has one"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)

# --- public --------------------------------------------------------------------------------------------------------


def selective_scan(
    u: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Every output and the last state, by the kernels; the input is as `nondual.ops.selective_scan` has checked it.

    Args:
        u: input (B, L, D), float16, bfloat16 or float32, in any layout.
        delta: step lengths (B, L, D), before bias and softplus.
        A: (D, N), N at most 256.
        B: (B, L, G, N), or (D, N) where it does not depend on time.
        C: likewise.
        D: skip (D,).
        z: gate (B, L, D), before its SiLU.
        delta_bias: (D,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, D, N); zero where left out.
        reset: (B, L), True where a sequence begins and all that came before is forgotten.

    Returns:
        y (B, L, D) in u's dtype, and the last state (B, D, N) in float32.

    Raises:
        RuntimeError: when differentiated twice.
    """
    given = [x for x in (u, delta, A, B, C, D, z, delta_bias, state) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, keep)[:2]
