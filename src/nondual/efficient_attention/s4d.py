"""S4D: a state space model with a complex diagonal, and four ways to compute what it gives.

Source: Gu, Gupta, Goel and Ré 2022 (2206.11893), sections 3 and 4. Symbols: B batch, L steps, D channels, N states of a
channel, of which M = N/2 are kept.

    h_t = Ā h_{t-1} + B̄ u_t,   y_t = 2 Re(C · h_t) + D u_t,   Ā and B̄ from exp(log Δ), A and B = 1

A is -exp(log_A_real) + i A_imag, so that its real part stays negative. States come in conjugate pairs: of each the half
with the positive imaginary part is kept, and twice the real part stands for both.

    recurrence     L steps of B D M numbers             for decoding
    chunked        a matrix within 64 steps, then the   for training, and the default: memory of B L D numbers, and
                   state to the next 64                 exactly causal
    convolution    y = K * u with K_l = 2 Re(C Ā^l B̄)   the paper's own, by FFT: causal only to rounding, and D M L
                                                        numbers for the powers of Ā
    scan           2 log₂ L rounds of B L D M numbers   the one that still works where Ā changes with time, as in Mamba

A NaN or an infinity in u spoils its own channel from its own step on, whichever of them computes it.

Where we differ from the paper: B is fixed at 1, since only C · B counts, and D starts at 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from nondual.efficient_attention.hippo import legs
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.discretize import discretize
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.linear_recurrence import linear_recurrence

RULES = ("zoh", "bilinear")
CHUNK = 64  # steps of a chunk in `chunked`


# --8<-- [start:initializations]
def s4d_legs(n_states: int) -> Complex[Tensor, " m"]:
    """The eigenvalues of HiPPO-LegS's normal part: A + P Pᵀ with P_n = √(n + 1/2), which is -1/2 and a skew matrix.

    What P Pᵀ did is not lost: with half of LegS's B the normal part answers a frequency ω as LegS does, divided by
    1 + Π, where |Π| = ω / √(N² + ω²). Slow inputs are answered alike as N grows; an impulse never is.

    Args:
        n_states: N, even.

    Returns:
        The N/2 with positive imaginary part, the smallest first; complex128. So for the other two.

    Raises:
        ValueError: an N that is not even and positive. So for the other two.
    """
    A, B = legs(_even(n_states))
    normal = A + B * B.T / 2
    skew = normal + torch.eye(n_states).to(A) / 2
    omega = torch.linalg.eigvalsh(-1j * skew)  # Hermitian: its eigenvalues are real, in pairs ±ω, in ascending order
    return torch.complex(torch.full_like(omega, -0.5), omega)[n_states // 2 :]


def s4d_inv(n_states: int) -> Complex[Tensor, " m"]:
    """-1/2 + i N/π (N/(2n + 1) - 1), near S4D-LegS: a wide range of speeds in one formula."""
    n = torch.arange(_even(n_states) // 2, dtype=torch.float64).flip(0)
    return torch.complex(torch.full_like(n, -0.5), n_states / math.pi * (n_states / (2 * n + 1) - 1))


def s4d_lin(n_states: int) -> Complex[Tensor, " m"]:
    """-1/2 + i π n: damped sines of whole and half turns in a unit of time, a decaying Fourier series."""
    n = torch.arange(_even(n_states) // 2, dtype=torch.float64)
    return torch.complex(torch.full_like(n, -0.5), math.pi * n)


# --8<-- [end:initializations]


def _even(n_states: int) -> int:
    if n_states < 2 or n_states % 2:
        raise ValueError(f"n_states must be even and 2 or more, for conjugate pairs, got {n_states}")
    return n_states


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


class S4D(nn.Module):
    """A mixer x -> x over time, each channel by a state space model of its own.

        layer = S4D(512, 64)               # trained by `chunked`
        S4D(512, 64, op=convolution)       # the same, another way
        y, state = layer.step(u_t, state)  # the same, decoded

    Parameters: log_dt (D,), log_A_real (D, N/2), A_imag (D, N/2), C (D, N/2, 2), its real and imaginary part, D (D,).

    Args:
        d_model: D, the channels.
        n_states: N, even.
        init: gives A (N/2,) from N, the same for each channel: `s4d_legs`, `s4d_inv`, `s4d_lin`, or another.
        rule: how A becomes Ā: "zoh" or "bilinear".
        dt_min: Δ is drawn between dt_min and dt_max, evenly in its logarithm.
        dt_max: as dt_min.
        op: what computes it: `chunked`, `convolution`, `scan` or `recurrence`, or another function like these.

    Raises:
        ValueError: no channels, an odd N, an unknown rule, an A that does not decay, or not 0 < dt_min <= dt_max.
    """

    rule: Literal["zoh", "bilinear"]
    op: Callable[..., tuple[Tensor, Tensor]]
    log_dt: nn.Parameter
    log_A_real: nn.Parameter
    A_imag: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_states: int = 64,
        *,
        init: Callable[[int], Tensor] = s4d_legs,
        rule: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        op: Callable[..., tuple[Tensor, Tensor]] = chunked,
    ):
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be 1 or more, got {d_model}")
        if rule not in RULES:
            raise ValueError(f"rule must be one of {list(RULES)}, got {rule!r}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min and dt_max must be positive and in order, got {dt_min} and {dt_max}")
        A = init(_even(n_states))
        if tuple(A.shape) != (n_states // 2,) or not (A.is_meta or (A.real < 0).all()):
            raise ValueError(f"init must give {n_states // 2} values with negative real part, got {A}")
        dtype = torch.get_default_dtype()
        A = A.expand(d_model, -1)
        self.rule, self.op = rule, op
        self.log_dt = nn.Parameter(math.log(dt_min) + torch.rand(d_model) * math.log(dt_max / dt_min))
        self.log_A_real = nn.Parameter((-A.real).log().to(dtype))
        self.A_imag = nn.Parameter(A.imag.to(dtype, copy=True))
        self.C = nn.Parameter(torch.randn(d_model, n_states // 2, 2) * 0.5**0.5)  # complex normal, of variance 1
        self.D = nn.Parameter(torch.ones(d_model))

    @overload
    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        cache: "S4DCache | None" = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self, u: Tensor, state: Tensor | None = None, *, cache: "S4DCache | None" = None, return_state: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, u: Tensor, state: Tensor | None = None, *, cache: "S4DCache | None" = None, return_state: bool
    ) -> Tensor | tuple[Tensor, Tensor]: ...
    def forward(
        self,
        u: Float[Tensor, "b l d"],
        state: Complex[Tensor, "b d m"] | None = None,
        *,
        cache: "S4DCache | None" = None,
        return_state: bool = False,
    ) -> Float[Tensor, "b l d"] | tuple[Float[Tensor, "b l d"], Complex[Tensor, "b d m"]]:
        """u (B, L, D) -> y (B, L, D), and the state after the last step if asked for.

        Args:
            u: any floating dtype; computed in float32 or better, and returned in its own.
            state: what an earlier call or step returned; zeros where left out.
            cache: holds that state in place of the caller, as every mixer's does; it is brought up to date, unless
                this call raises.
            return_state: also return the state (B, D, N/2), complex.

        Returns:
            y (B, L, D), or (y, state).

        Raises:
            ValueError: u or state of another shape or kind, or a state together with a cache.
            TypeError: u or state that is not a Tensor, or cache that is not an S4DCache.
        """
        if cache is not None:
            if not isinstance(cache, S4DCache):
                raise TypeError(f"cache must be an S4DCache, from this module's new_cache, got {type(cache).__name__}")
            if state is not None:
                raise ValueError("state must be left out where there is a cache, which holds it")
            state = cache.state
        self._check(u, state)
        wide = accumulation_dtype(u.dtype, self.D.dtype)
        A_bar, B_bar, C = self.discretized(wide)
        state = None if state is None else state.to(A_bar)
        with autocast_off(u.device.type):  # float32 or better, whatever op multiplies
            y, state = self.op(u.to(wide), A_bar, B_bar, C, state)
        y = (y + self.D.to(wide) * u).to(u.dtype)
        if cache is not None:
            cache.state = state
        return (y, state) if return_state else y

    def new_cache(self, batch: int, max_len: int | None = None) -> "S4DCache":
        """A cache of zeros for a batch of B sequences, of any length: max_len is not needed."""
        wide = accumulation_dtype(self.D.dtype)
        channels, half = self.A_imag.shape
        return S4DCache(torch.zeros(batch, channels, half, dtype=wide.to_complex(), device=self.D.device))

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            u: Tensor,
            state: Tensor | None = None,
            *,
            cache: "S4DCache | None" = None,
            return_state: Literal[False] = False,
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            u: Tensor,
            state: Tensor | None = None,
            *,
            cache: "S4DCache | None" = None,
            return_state: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, u: Tensor, state: Tensor | None = None, *, cache: "S4DCache | None" = None, return_state: bool
        ) -> Tensor | tuple[Tensor, Tensor]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def step(
        self, u: Float[Tensor, "b d"], state: Complex[Tensor, "b d m"] | None = None
    ) -> tuple[Float[Tensor, "b d"], Complex[Tensor, "b d m"]]:
        """One step of decoding: time and memory do not depend on how many came before.

        Args:
            u: (B, D).
            state: what the step or the call before returned; zeros where left out.

        Returns:
            y (B, D) and the new state (B, D, N/2).

        Raises:
            ValueError, TypeError: as `forward`.
        """
        check_tensors({"u": u}, {"state": state})
        if u.ndim != 2:
            raise ValueError(f"u must be (B, D) for one step, got {tuple(u.shape)}; forward takes whole sequences")
        self._check(u[:, None], state)
        wide = accumulation_dtype(u.dtype, self.D.dtype)
        A_bar, B_bar, C = self.discretized(wide)
        y, state = recurrence(u[:, None].to(wide), A_bar, B_bar, C, None if state is None else state.to(A_bar))
        return (y[:, 0] + self.D.to(wide) * u).to(u.dtype), state

    def discretized(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Ā, B̄ and C (D, N/2), complex, of the real dtype's precision."""
        log_dt, log_A_real, A_imag, C = (x.to(dtype) for x in (self.log_dt, self.log_A_real, self.A_imag, self.C))
        A = torch.complex(-log_A_real.exp(), A_imag)
        A_bar, B_bar = discretize(log_dt.exp()[:, None], A, torch.ones_like(A), self.rule)
        return A_bar, B_bar, torch.view_as_complex(C)

    def _check(self, u: Tensor, state: Tensor | None) -> None:
        check_tensors({"u": u}, {"state": state})
        channels, half = self.A_imag.shape
        if u.ndim != 3 or u.shape[2] != channels or not u.is_floating_point():
            raise ValueError(f"u must be floating point (B, L, D) with D = {channels}, got {u.dtype} {tuple(u.shape)}")
        want = (u.shape[0], channels, half)
        if state is not None and (tuple(state.shape) != want or not state.is_complex()):
            raise ValueError(f"state must be complex (B, D, N/2) = {want}, got {state.dtype} {tuple(state.shape)}")


@dataclass(eq=False)
class S4DCache:
    """The state after what an S4D layer has read: as much after one step as after a million.

    Attributes:
        state: (B, D, N/2), complex; replaced by every call, never written into.
    """

    state: Tensor

    def reset(self) -> None:
        """Zero state."""
        self.state = torch.zeros_like(self.state)
