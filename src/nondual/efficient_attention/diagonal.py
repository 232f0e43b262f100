"""A diagonal state space model that does not change with time, computed in four ways.

Source: Gu, Gupta, Goel and Ré 2022 (2206.11893), sections 3 and 4. Symbols: B batch, L steps, D channels, M = N/2 kept
states of a channel, each of which stands for a conjugate pair.

    h_t = Ā h_{t-1} + B̄ u_t,   y_t = 2 Re(C · h_t)

    recurrence     L steps of B D M numbers             for decoding
    chunked        a matrix within 64 steps, then the   for training: memory of B L D numbers, and exactly causal
                   state to the next 64
    convolution    y = K * u with K_l = 2 Re(C Ā^l B̄)   the paper's own, by FFT: causal only to rounding, and D M L
                                                        numbers for the powers of Ā
    scan           2 log₂ L rounds of B L D M numbers   the one that still works where Ā changes with time, as in Mamba

A NaN or an infinity in u spoils its own channel from its own step on, whichever of them computes it.

`nondual.efficient_attention.s4d` is the module that learns A, C and the step length, and checks its inputs; nothing is
checked here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.linear_recurrence import linear_recurrence

CHUNK = 64  # steps of a chunk in `chunked`


# --8<-- [start:recurrence]
def recurrence(
    u: Float[Tensor, "b l d"],
    A_bar: Complex[Tensor, "d m"],
    B_bar: Complex[Tensor, "d m"],
    C: Complex[Tensor, "d m"],
    state: Complex[Tensor, "b d m"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d m"]]:
    """Step by step: y_t = 2 Re(C · h_t) with h_t = Ā h_{t-1} + B̄ u_t. Nothing is checked here: `S4D` does that.

    Args:
        u: input (B, L, D), float32 or float64; L may be 0.
        A_bar: (D, M).
        B_bar: (D, M).
        C: (D, M).
        state: the state before the first step (B, D, M); zero where left out.

    Returns:
        y (B, L, D) and the last state (B, D, M), in memory of its own. The same for the other three ways.
    """
    h = _zero_state(u, A_bar) if state is None else state
    outputs = []
    for u_t in u.unbind(1):
        h = A_bar * h + B_bar * u_t[..., None]
        outputs.append(2 * (C * h).real.sum(-1))
    return (torch.stack(outputs, 1), h) if outputs else (torch.zeros_like(u), h.clone())


# --8<-- [end:recurrence]


def chunked(
    u: Float[Tensor, "b l d"],
    A_bar: Complex[Tensor, "d m"],
    B_bar: Complex[Tensor, "d m"],
    C: Complex[Tensor, "d m"],
    state: Complex[Tensor, "b d m"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d m"]]:
    """By chunks of T = 64 steps. No output depends on a later input, not even by rounding.

    1. within a chunk        y_t = Σ_{s ≤ t} K_{t-s} u_s with the kernel K_l = 2 Re(C · Ā^l B̄), by a T x T matrix
    2. a chunk's own state   S = Σ_s Ā^{T-1-s} B̄ u_s
    3. chunk to chunk        h ← Ā^T h + S
    4. from earlier chunks   y_t += 2 Re(C · Ā^{t+1} h)

    Arguments and results as `recurrence`. One compiled program serves all lengths.
    """
    with autocast_off(u.device.type):
        length, (u, spoiled, spoiled_state) = u.shape[1], _finite(u)
        start = _zero_state(u, A_bar) if state is None else state
        # Padding to spare, so that a compiled program need not ask whether there is a rest, or one chunk alone.
        spare = 2 if torch.compiler.is_compiling() else 1
        whole = length // CHUNK * CHUNK  # steps in full chunks
        padding = whole + spare * CHUNK - length
        u = F.pad(u, (0, 0, 0, padding)).unfold(1, CHUNK, CHUNK).mT  # (B, K, T, D)
        V = powers(A_bar, CHUNK + 1)  # (D, M, T+1)
        kernel = 2 * torch.einsum("dm,dmt->dt", C * B_bar, V[..., :-1]).real
        at = torch.arange(CHUNK, device=u.device)
        lag = at[:, None] - at  # (t, s)
        within = kernel[:, lag.clamp(min=0)].masked_fill(lag < 0, 0)  # (D, T, T)

        y = torch.einsum("dts,bksd->bktd", within, u)  # 1. within a chunk
        S = _weighted(V[..., :-1].flip(-1) * B_bar[..., None], u)  # 2. a chunk's own state (B, K, D, M)
        engine = "parallel" if u.is_cuda else "sequential"
        S = torch.cat([start[:, None], S], 1)  # 3. from chunk to chunk (B, K+1, D, M)
        before = linear_recurrence(V[..., -1][None, None], S, impl=engine)[0][:, :-1]  # (B, K, D, M)
        read = torch.view_as_real(2 * (C[..., None] * V[..., 1:]).conj().resolve_conj())  # (D, M, T, 2)
        y = y + torch.einsum("dmtr,bkdmr->bktd", read, torch.view_as_real(before))  # 4. from earlier chunks

        # The last state comes from the first L mod T steps of the chunk after the full ones; the others are padding.
        age = length - whole - 1 - torch.arange(-1, CHUNK, device=u.device)  # of the state before it, of steps
        passed = V[..., age.clamp(min=0)].masked_fill(age < 0, 0)  # (D, M, 1+T)
        last = passed[..., 0] * before[:, -spare] + _weighted(passed[..., 1:] * B_bar[..., None], u[:, -spare])
        y = F.pad(y.flatten(1, 2), (0, 0, 0, -padding))  # not y[:, :length]: torch.export cannot prove that it fits
        return y * spoiled, last * spoiled_state


def _weighted(weights: Complex[Tensor, "d m t"], u: Float[Tensor, "... t d"]) -> Complex[Tensor, "... d m"]:
    """Σ_t weights_t u_t, as a product of real matrices: u has no imaginary part."""
    sums = torch.einsum("dmtr,...td->...dmr", torch.view_as_real(weights), u)
    return torch.view_as_complex(sums.contiguous())


def _finite(u: Float[Tensor, "b l d"]) -> tuple[Tensor, Tensor, Tensor]:
    """u with 0 for NaN and infinities, and what outputs and last state are multiplied by to have NaN where due.

    A sum over all steps multiplies later ones by 0, and 0 times NaN is NaN. So what is not finite stays out of the
    sums, and comes back as a factor: 1 before it, NaN from its step on (B, L, D); for the last state (B, D, 1).
    """
    nothing = u.detach() * 0  # 0, or NaN
    return u.nan_to_num(0.0, 0.0, 0.0), 1 + nothing.cumsum(1), 1 + nothing.sum(1)[..., None]


# --8<-- [start:convolution]
def convolution(
    u: Float[Tensor, "b l d"],
    A_bar: Complex[Tensor, "d m"],
    B_bar: Complex[Tensor, "d m"],
    C: Complex[Tensor, "d m"],
    state: Complex[Tensor, "b d m"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d m"]]:
    """All at once: y = K * u with the kernel K_l = 2 Re(C · Ā^l B̄), by FFT. Arguments and results as `recurrence`.

    Causal only to rounding: an FFT adds up all steps, and rounds at the size of the greatest. A later input of size x
    moves earlier outputs by up to some ε log₂(2L) ‖K‖ x, with ε = 6e-8 in float32 and ‖K‖ = √(Σ K_l²): 1e8 in the last
    step by whole units. `chunked` and `scan` are exactly causal.
    """
    length, (u, spoiled, spoiled_state) = u.shape[1], _finite(u)
    if u.numel() == 0:
        return torch.zeros_like(u), _zero_state(u, A_bar) if state is None else state.clone()
    V = powers(A_bar, length + 1)  # (D, M, L+1)
    K = 2 * torch.einsum("dm,dml->ld", C * B_bar, V[..., :-1]).real
    over = 2 * length  # twice as long, so that the end does not come round to the beginning
    y = torch.fft.irfft(torch.fft.rfft(u, over, dim=1) * torch.fft.rfft(K, over, dim=0), over, dim=1)[:, :length]
    last = torch.einsum("dml,bld->bdm", V[..., :-1].flip(-1), u.to(V)) * B_bar
    if state is not None:  # what is left of the state before
        y = y + 2 * torch.einsum("dm,dml,bdm->bld", C, V[..., 1:], state).real
        last = last + V[..., -1] * state
    return y * spoiled, last * spoiled_state


def powers(x: Complex[Tensor, "d m"], n: int) -> Complex[Tensor, "d m n"]:
    """The Vandermonde matrix 1, x, x², …, x^(n-1), by doubling: the first half times x^(n/2) is the second.

    In complex128, since each squaring doubles the relative error; returned in the dtype of x.
    """
    wide = x.to(torch.complex128)
    V, squared = torch.ones_like(wide)[..., None], wide[..., None]
    while V.shape[-1] < n:
        V, squared = torch.cat([V, V * squared], -1), squared * squared
    return V[..., :n].to(x.dtype)


# --8<-- [end:convolution]


# --8<-- [start:scan]
def scan(
    u: Float[Tensor, "b l d"],
    A_bar: Complex[Tensor, "d m"],
    B_bar: Complex[Tensor, "d m"],
    C: Complex[Tensor, "d m"],
    state: Complex[Tensor, "b d m"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d m"]]:
    """In 2 log₂ L rounds, by the associative scan over all states. Arguments and results as `recurrence`."""
    h, last = linear_recurrence(A_bar[None, None], B_bar * u[..., None], state, impl="parallel")  # (B, L, D, M)
    return 2 * torch.einsum("dm,bldm->bld", C, h).real, last


# --8<-- [end:scan]


def _zero_state(u: Tensor, A_bar: Tensor) -> Tensor:
    """Zeros (B, D, M)."""
    return A_bar.new_zeros(u.shape[0], *A_bar.shape)
