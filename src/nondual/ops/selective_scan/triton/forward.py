"""The forward kernels: the scan itself, and what carries the state from span to span where time is cut into spans.

Symbols and equations as in `nondual.ops.selective_scan.triton`.
"""

import triton
import triton.language as tl

from nondual.ops.selective_scan.triton.primitives import LOG2_E, checkpoint, load_steps, place, sigmoid, step_length


@triton.jit
def load_group(
    p_u, p_delta, p_B, p_C, p_z, p_reset, t, last, o_d, o_n,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_Z: tl.constexpr, S_B: tl.constexpr, S_C: tl.constexpr,
    STEPS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """What STEPS steps read from time t on: u, delta, B, C, z and resets, each a tuple, () for what is not read.

    B and C are not read where S_B or S_C is 0. At an EDGE, steps from `last` on are 0.
    """
    b_us = load_steps(p_u, t, S_U, o_d, STEPS, last, EDGE)  # (BLOCK_D,) each
    b_deltas = load_steps(p_delta, t, S_DELTA, o_d, STEPS, last, EDGE)
    b_Bs, b_Cs, b_zs, resets = (), (), (), ()
    if S_B > 0:
        b_Bs = load_steps(p_B, t, S_B, o_n, STEPS, last, EDGE)  # (N_HI, N_LO) each
    if S_C > 0:
        b_Cs = load_steps(p_C, t, S_C, o_n, STEPS, last, EDGE)
    if p_z is not None:
        b_zs = load_steps(p_z, t, S_Z, o_d, STEPS, last, EDGE)
    if p_reset is not None:
        resets = load_steps(p_reset, t, 1, 0, STEPS, last, EDGE)
    return b_us, b_deltas, b_Bs, b_Cs, b_zs, resets


@triton.jit
def scan_steps(
    b_h, group, b_A, b_B, b_C, b_D, b_bias, p_D, p_z, p_reset, p_y, p_ungated, t, o_d, m_d,
    S_B: tl.constexpr, S_C: tl.constexpr, D: tl.constexpr, SOFTPLUS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """STEPS steps of (1) to (5), from time t, on what `load_group` has read.

    Without p_y only the states are computed. Where S_B or S_C is 0, b_B or b_C serves every step.

    Returns:
        The new states, the sum of Δ over these steps, and whether there is a reset among them.
    """
    b_us, b_deltas, b_Bs, b_Cs, b_zs, resets = group
    b_time = tl.zeros(o_d.shape, tl.float32)
    had_reset = False
    # --8<-- [start:scan_steps]
    for k in tl.static_range(STEPS):
        b_delta, _ = step_length(b_deltas[k] + b_bias, SOFTPLUS)  # (1)
        b_time += b_delta
        if p_reset is not None:
            had_reset = had_reset | (resets[k] != 0)
            b_h = tl.where(resets[k] != 0, 0.0, b_h)
        if S_B > 0:
            b_B = b_Bs[k][:, None, :]
        b_a = tl.exp2(b_delta[None, :, None] * b_A)  # (2)  (N_HI, BLOCK_D, N_LO)
        b_h = b_a * b_h + (b_delta * b_us[k])[None, :, None] * b_B  # (3)
        if p_y is not None:
            if S_C > 0:
                b_C = b_Cs[k][:, None, :]
            b_s = tl.sum(tl.sum(b_h * b_C, 2), 0)  # (4)
            if p_D is not None:
                b_s += b_D * b_us[k]
            if p_ungated is not None:
                b_ungated = b_s.to(p_ungated.dtype.element_ty)
                tl.store(p_ungated + t * D + k * D + o_d, b_ungated, mask=m_d)
            if p_z is not None:
                b_s = b_s * b_zs[k] * sigmoid(b_zs[k])  # (5)
            tl.store(p_y + t * D + k * D + o_d, b_s.to(p_y.dtype.element_ty), mask=m_d)
    # --8<-- [end:scan_steps]
    return b_h, b_time, had_reset


@triton.jit(do_not_specialize=["length", "span", "spans"])
def forward_kernel(
    p_u, p_delta, p_A, p_B, p_C, p_D, p_z, p_bias, p_start, p_reset, p_y, p_ungated, p_checkpoint, p_end, p_decay,
    s_ub, s_deltab, s_zb, length, span, spans,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_Z: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    GROUPS: tl.constexpr, B_GROUPS: tl.constexpr, C_GROUPS: tl.constexpr, SOFTPLUS: tl.constexpr,
    N_HI: tl.constexpr, BLOCK_D: tl.constexpr, N_LO: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program: a block of channels through a span of time, each channel's states shared by 32 / BLOCK_D threads.

    p_end receives the span's last state. With p_decay this is the first of two levels: it begins with a state of zero,
    has no p_y, and stores the decay over the span, or -1 where a reset lies within the span.
    """
    WIDTH: tl.constexpr = D // GROUPS
    i_b, i_span, i_g, i_block = place(tl.cdiv(WIDTH, BLOCK_D), spans, GROUPS)
    o_width = i_block * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_width < WIDTH
    o_d = i_g * WIDTH + tl.minimum(o_width, WIDTH - 1)  # lanes past the end load the last channel, and store nothing
    BLOCK_N: tl.constexpr = N_HI * N_LO
    o_n = tl.arange(0, N_HI)[:, None] * N_LO + tl.arange(0, N_LO)[None, :]  # (N_HI, N_LO)
    o_h = (i_g * WIDTH + o_width)[None, :, None] * N + o_n[:, None, :]  # (N_HI, BLOCK_D, N_LO)
    if N_LO == 4:  # this hint, which is true, makes the compiler give a thread four neighbouring states
        o_h = tl.max_contiguous(o_h, [1, 2, 4])
    m_h = (o_n < N)[:, None, :] & m_d[None, :, None]
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * LOG2_E
    b_h = tl.zeros((N_HI, BLOCK_D, N_LO), tl.float32)
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
    b_time = tl.zeros((BLOCK_D,), tl.float32)
    had_reset = False
    bounds = (first, whole, last)
    for PART in tl.static_range(0, 2):  # groups of STEPS steps, then the steps that are left over, one at a time
        group = load_group(
            p_u=p_u,
            p_delta=p_delta,
            p_B=p_B,
            p_C=p_C,
            p_z=p_z,
            p_reset=p_reset,
            t=bounds[PART],
            last=last,
            o_d=o_d,
            o_n=o_n,
            S_U=S_U,
            S_DELTA=S_DELTA,
            S_Z=S_Z,
            S_B=B_GROUPS * BLOCK_N,
            S_C=C_GROUPS * BLOCK_N if p_y is not None else 0,
            STEPS=STEPS if PART == 0 else 1,
            EDGE=True,
        )
        for t in tl.range(bounds[PART], bounds[PART + 1], STEPS if PART == 0 else 1):
            checkpoint(
                p=p_checkpoint,
                b_h=b_h,
                i_b=i_b,
                t=t,
                length=length,
                o_h=o_h,
                m_h=m_h,
                SIZE=N * D,
                CHUNK=CHUNK,
            )
            # The next group is loaded before this one is used: a step that loads what it uses waits for memory.
            coming = load_group(
                p_u=p_u,
                p_delta=p_delta,
                p_B=p_B,
                p_C=p_C,
                p_z=p_z,
                p_reset=p_reset,
                t=tl.minimum(t + (STEPS if PART == 0 else 1), bounds[PART + 1] - (STEPS if PART == 0 else 1)),
                last=last,
                o_d=o_d,
                o_n=o_n,
                S_U=S_U,
                S_DELTA=S_DELTA,
                S_Z=S_Z,
                S_B=B_GROUPS * BLOCK_N,
                S_C=C_GROUPS * BLOCK_N if p_y is not None else 0,
                STEPS=STEPS if PART == 0 else 1,
                EDGE=False,
            )
            b_h, b_more_time, more_reset = scan_steps(
                b_h=b_h,
                group=group,
                b_A=b_A,
                b_B=b_B,
                b_C=b_C,
                b_D=b_D,
                b_bias=b_bias,
                p_D=p_D,
                p_z=p_z,
                p_reset=p_reset,
                p_y=p_y,
                p_ungated=p_ungated,
                t=t,
                o_d=o_d,
                m_d=m_d,
                S_B=B_GROUPS * BLOCK_N,
                S_C=C_GROUPS * BLOCK_N,
                D=D,
                SOFTPLUS=SOFTPLUS,
                STEPS=STEPS if PART == 0 else 1,
            )
            group = coming
            if p_decay is not None:
                b_time += b_more_time
                had_reset = had_reset | more_reset
    tl.store(p_end + i_bs * (N * D) + o_h, b_h, mask=m_h)
    if p_decay is not None:
        b_decay = tl.where(had_reset, -1.0, tl.exp2(b_time[None, :, None] * b_A))
        tl.store(p_decay + i_bs * (N * D) + o_h, b_decay, mask=m_h)


@triton.jit(do_not_specialize=["size", "spans"])
def pass_kernel(p_start, p_local, p_decay, p_initial, size, spans, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Between two levels: the state before each span, by h = decay · h + local from the first span on.

    In REVERSE it is q after each span, from the last span back. One program: BLOCK of the `size` = N · D numbers of the
    state of one sequence of the batch, through all spans. p_start, p_local and p_decay are (B, spans, size), and have
    channels and states in one order, whichever it is.
    """
    # --8<-- [start:pass_kernel]
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
        # a decay below 0 marks a reset within the span
        b_h = tl.where(b_decay < 0, 0.0, b_decay * b_h) + b_local
    # --8<-- [end:pass_kernel]
