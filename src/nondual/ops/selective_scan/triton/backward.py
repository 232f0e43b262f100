"""The backward kernel: every gradient, chunk by chunk from the last, with the states computed again from checkpoints.

Symbols and equations as in `nondual.ops.selective_scan.triton`.
"""

import triton
import triton.language as tl

from nondual.ops.selective_scan.triton.backward_steps import backward_steps, recompute_states
from nondual.ops.selective_scan.triton.primitives import LOG2_E, place


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

    p_end holds the q of the step after the span, p_start receives the q of its first step. p_dB and p_dC receive sums
    over the program's channels; p_dA, p_dD, p_dbias, and p_dB and p_dC where B and C do not depend on time, sums over
    its steps. p_scratch holds a chunk's states, one of every STEPS.
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
    # Two orders of the tile in memory: (D, N), and that of the scratch memory, in which each thread has N_LO numbers
    # side by side.
    o_h = (i_g * WIDTH + o_lane) * N + o_tile
    o_scratch = ((o_lo * N_HI + o_tile // N_LO) * D_HI + o_hi) * N_LO + o_tile % N_LO
    if N_LO == 4:
        # These hints, which are true, make the compiler choose the same layout for both, that of the tile: it gives a
        # thread neighbours along the axis that has the longest contiguous run.
        o_h = tl.max_contiguous(o_h, [1, 2, 2, 4])
        o_scratch = tl.max_contiguous(o_scratch, [1, 2, 2, 4])
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
        b_h = tl.load(p_checkpoint + i_chunk * (N * D) + o_h, mask=m_h, other=0.0)
        parts = tl.cdiv(end - begin, STEPS)
        for i in tl.range(0, parts - 1):
            tl.store(p_scratch + i * SIZE + o_scratch, b_h)
            b_h = recompute_states(
                b_h=b_h,
                b_A=b_A,
                b_B=b_B,
                b_bias=b_bias,
                p_u=p_u,
                p_delta=p_delta,
                p_B=p_B,
                p_reset=p_reset,
                t=begin + i * STEPS,
                o_d=o_d,
                o_n=o_n,
                S_U=S_U,
                S_DELTA=S_DELTA,
                S_B=B_GROUPS * BLOCK_N,
                D_LO=D_LO,
                D_HI=D_HI,
                SOFTPLUS=SOFTPLUS,
                STEPS=STEPS,
            )
        whole = (end - begin) // STEPS
        if whole < parts:
            b_q, b_dA, b_dB, b_dC, b_dD, b_dbias = backward_steps(
                b_h=b_h,
                b_q=b_q,
                b_dA=b_dA,
                b_dB=b_dB,
                b_dC=b_dC,
                b_dD=b_dD,
                b_dbias=b_dbias,
                b_A=b_A,
                b_B=b_B,
                b_C=b_C,
                b_D=b_D,
                b_bias=b_bias,
                p_u=p_u,
                p_delta=p_delta,
                p_B=p_B,
                p_C=p_C,
                p_D=p_D,
                p_z=p_z,
                p_dy=p_dy,
                p_ungated=p_ungated,
                p_reset=p_reset,
                p_du=p_du,
                p_ddelta=p_ddelta,
                p_dz=p_dz,
                p_dB=p_dB,
                p_dC=p_dC,
                t=begin + whole * STEPS,
                last=last,
                o_d=o_d,
                m_d=m_d,
                o_n=o_n,
                S_U=S_U,
                S_DELTA=S_DELTA,
                S_B=B_GROUPS * BLOCK_N,
                S_C=C_GROUPS * BLOCK_N,
                S_Z=S_Z,
                S_DY=S_DY,
                S_DB=S_DB,
                D=D,
                D_LO=D_LO,
                D_HI=D_HI,
                SOFTPLUS=SOFTPLUS,
                STEPS=STEPS,
                EDGE=True,
            )
        else:
            tl.store(p_scratch + (parts - 1) * SIZE + o_scratch, b_h)
        tl.debug_barrier()  # a thread reads from scratch what others wrote
        for i in tl.range(0, whole):
            i_part = whole - 1 - i
            b_h = tl.load(p_scratch + i_part * SIZE + o_scratch)
            b_q, b_dA, b_dB, b_dC, b_dD, b_dbias = backward_steps(
                b_h=b_h,
                b_q=b_q,
                b_dA=b_dA,
                b_dB=b_dB,
                b_dC=b_dC,
                b_dD=b_dD,
                b_dbias=b_dbias,
                b_A=b_A,
                b_B=b_B,
                b_C=b_C,
                b_D=b_D,
                b_bias=b_bias,
                p_u=p_u,
                p_delta=p_delta,
                p_B=p_B,
                p_C=p_C,
                p_D=p_D,
                p_z=p_z,
                p_dy=p_dy,
                p_ungated=p_ungated,
                p_reset=p_reset,
                p_du=p_du,
                p_ddelta=p_ddelta,
                p_dz=p_dz,
                p_dB=p_dB,
                p_dC=p_dC,
                t=begin + i_part * STEPS,
                last=last,
                o_d=o_d,
                m_d=m_d,
                o_n=o_n,
                S_U=S_U,
                S_DELTA=S_DELTA,
                S_B=B_GROUPS * BLOCK_N,
                S_C=C_GROUPS * BLOCK_N,
                S_Z=S_Z,
                S_DY=S_DY,
                S_DB=S_DB,
                D=D,
                D_LO=D_LO,
                D_HI=D_HI,
                SOFTPLUS=SOFTPLUS,
                STEPS=STEPS,
                EDGE=False,
            )
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
