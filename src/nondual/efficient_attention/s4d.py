"""S4D: a state space model with a complex diagonal, as a mixer of positions.

Source: Gu, Gupta, Goel and Ré 2022 (2206.11893), sections 3 and 4. Symbols: B batch, L steps, D channels, N states of a
channel, of which M = N/2 are kept.

    h_t = Ā h_{t-1} + B̄ u_t,   y_t = 2 Re(C · h_t) + D u_t,   Ā and B̄ from exp(log Δ), A and B = 1

A is -exp(log_A_real) + i A_imag, so that its real part stays negative. States come in conjugate pairs: of each the half
with the positive imaginary part is kept, and twice the real part stands for both.

The recurrence is computed in one of the four ways of `nondual.efficient_attention.diagonal`: `chunked`, the default,
`recurrence`, `convolution` or `scan`.

Where we differ from the paper: B is fixed at 1, since only C · B counts, and D starts at 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from nondual.efficient_attention.diagonal import chunked as chunked
from nondual.efficient_attention.diagonal import convolution as convolution
from nondual.efficient_attention.diagonal import recurrence as recurrence
from nondual.efficient_attention.diagonal import scan as scan
from nondual.efficient_attention.hippo import legs
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.discretize import discretize
from nondual.ops.dtypes import accumulation_dtype

RULES = ("zoh", "bilinear")


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

    def select(self, rows: Int[Tensor, " r"]) -> "S4DCache":
        """A cache of its own for these rows of the batch, in this order; a row may be taken more than once."""
        return S4DCache(self.state[rows])
