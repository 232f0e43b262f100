"""What the backward kernel does in a few steps of time: the states computed again, and all gradients.

Symbols and equations as in `nondual.ops.selective_scan.triton`.
"""

import triton
import triton.language as tl

from nondual.ops.selective_scan.triton.primitives import LN_2, load_steps, sigmoid, step_length, store_step

# --8<-- [start:tile]
# The backward kernel's tile is (D_LO, N_HI, D_HI, N_LO): channel d_lo * D_HI + d_hi,
# state n_hi * N_LO + n_lo. The threads of a warp lie along N_HI and D_HI, and each
# holds D_LO x N_LO numbers. So sums over channels and sums over states both begin in a
# thread's own registers, and end with an exchange among 8 threads, or 4.


@triton.jit
def spread(b_x, D_LO: tl.constexpr, D_HI: tl.constexpr):
    """One number a channel (BLOCK_D,), as (D_LO, 1, D_HI, 1), for the whole tile."""
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
def recompute_states(
    b_h, b_A, b_B, b_bias, p_u, p_delta, p_B, p_reset, t, o_d, o_n,
    S_U: tl.constexpr, S_DELTA: tl.constexpr, S_B: tl.constexpr, D_LO: tl.constexpr, D_HI: tl.constexpr,
    SOFTPLUS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The states after STEPS steps of (1) to (3) from time t."""
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

    Returns:
        q of step t, and dA, dB, dC, dD and dbias with the parts of these steps added.
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
        if S_B > 0:  # loaded again: keeping it from the first loop costs registers
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
