"""The named steps that several kernels share. Symbols as in `nondual.ops.selective_scan.triton`."""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))


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
    """Steps t, t + 1, …, t + STEPS - 1 as a tuple of blocks, all loaded before any is used.

    At an EDGE, the end of a span, steps from `last` on are not read, and are 0.
    """
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
    """Store step t + k; at an EDGE only if it lies before `last`."""
    if EDGE:
        tl.store(p + t * S + k * S + o, b_step.to(p.dtype.element_ty), mask=(o >= 0) & (t + k < last))
    else:
        tl.store(p + t * S + k * S + o, b_step.to(p.dtype.element_ty))


@triton.jit
def place(blocks, spans, GROUPS: tl.constexpr):
    """This program's part of the work: its sequence of the batch, span, group and block of the group's channels."""
    i = tl.program_id(0)
    i_block = i % blocks
    i_g = i // blocks % GROUPS
    i_span = i // (blocks * GROUPS) % spans
    i_b = i // (blocks * GROUPS * spans)
    return i_b.to(tl.int64), i_span.to(tl.int64), i_g, i_block


@triton.jit
def checkpoint(p, b_h, i_b, t, length, o_h, m_h, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Where a chunk begins, save the state for the backward pass; without p there is none."""
    if p is not None:
        if t % CHUNK == 0:
            tl.store(p + (i_b * tl.cdiv(length, CHUNK) + t // CHUNK) * SIZE + o_h, b_h, mask=m_h)


INTERPRETED = not isinstance(step_length, triton.runtime.JITFunction)
