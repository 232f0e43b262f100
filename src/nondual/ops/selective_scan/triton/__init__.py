"""The selective scan as Triton kernels, forward and backward, in one level over time or in two, without atomics.

Source: Gu and Dao 2023 (2312.00752), section 3.3 (the state stays on the chip; the backward computes it again); two
levels over time: Blelloch 1990, section 1.4. Symbols: B batch, L steps, D channels, N states of a channel, G groups of
channels that share B and C, WIDTH = D / G. In the kernels i_ is a program's index, o_ are offsets, m_ masks, p_
pointers, s_ and S_ strides and b_ blocks on the chip; ◦' is the gradient of ◦, g_t that of y_t before its gate.

    (1) Δ_t = softplus(delta_t + bias)     (2) a_t = exp(Δ_t A)     (3) h_t = a_t h_{t-1} + Δ_t u_t B_t
    (4) s_t = Σ_n C_t h_t + D u_t          (5) y_t = s_t silu(z_t)

The backward. The loss depends on h_t through s_t and through h_{t+1}; on the last state also directly, and there the
gradient of the last state stands for a_{t+1} h'_{t+1}. So, from the last step to the first,

    (6) h'_t = g_t C_t + a_{t+1} h'_{t+1}        (7) q_t = a_t h'_t, the gradient of h_{t-1} through h_t
    (8) C'_t = Σ_d g_t h_t                       (9) B'_t = Σ_d Δ_t u_t h'_t            over the channels of a group
    (10) A' = Σ_t Δ_t q_t h_{t-1}                (11) u'_t = D g_t + Δ_t Σ_n B_t h'_t
    (12) Δ'_t = Σ_n A q_t h_{t-1} + u_t Σ_n B_t h'_t,   delta'_t = Δ'_t softplus'      (13) z'_t = y'_t s_t silu'(z_t)

and q of the first step is the gradient of the initial state. At a reset h_{t-1} and q_t are 0. The forward pass saves
a checkpoint, the state, every CHUNK steps. The backward pass goes through these chunks from the last to the first: it
computes a chunk's states again, writes one of every STEPS to scratch memory, then goes through these from the last,
with the states of STEPS steps in registers.

Two levels, where the channels are too few to fill the chip (`spans_of`): time is cut into spans, and all are scanned at
once from zero; the states before each span then follow from h = decay · h + (the span's end from zero), a recurrence
like (3); and all spans are scanned again from these. The backward pass does the same with q, from the end.

The kernels hold A times log2(e), so that (2) is the chip's own exp2. Time strides are compile-time constants: the
steps of a group are then one address and its fixed offsets. Sums run in float32, in one order, each by one program, and
torch adds up the programs' parts: the same input gives the same bits.

The way of a call: autograd.py -> launch.py, with block sizes and spans from tiles.py -> the kernels in forward.py,
adjoint.py (the backward's first level) and backward.py (its steps in backward_steps.py), on the steps of primitives.py.
"""

from nondual.ops.selective_scan.triton.adjoint import adjoint_kernel as adjoint_kernel
from nondual.ops.selective_scan.triton.autograd import selective_scan as selective_scan
from nondual.ops.selective_scan.triton.backward import backward_kernel as backward_kernel
from nondual.ops.selective_scan.triton.forward import forward_kernel as forward_kernel
from nondual.ops.selective_scan.triton.forward import pass_kernel as pass_kernel
from nondual.ops.selective_scan.triton.primitives import INTERPRETED as INTERPRETED
from nondual.ops.selective_scan.triton.tiles import CHUNK as CHUNK
from nondual.ops.selective_scan.triton.tiles import TILES as TILES
from nondual.ops.selective_scan.triton.tiles import configuration as configuration
from nondual.ops.selective_scan.triton.tiles import spans_of as spans_of
