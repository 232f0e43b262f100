"""The selective scan: a linear recurrence whose steps are decided by what passes through it.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,   y_t = C_t h_t + D u_t,   then y_t · silu(z_t)

Source: Gu and Dao 2023 (2312.00752), equations 1 to 4 and Algorithm 2. The arguments are those of the mamba-ssm
package, with time before channels: (B, L, D) where that has (B, D, L). Symbols: B batch, L steps, D channels, N states
of a channel, G groups of channels that share B and C.

Three engines (`ENGINES` is their table):

- "reference": step by step in plain torch. Any floating dtype, both discretisations, differentiable twice.
- "cpu": a compiled loop over time, forward and backward, in memory linear in L; where there is no C compiler the same
  in plain torch, slower. On CPU tensors, in float16, bfloat16, float32 and float64.
- "triton": our kernels, in float16, bfloat16 and float32, for up to 256 states. On CUDA tensors; on CPU tensors only in
  Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported), slowly, and not in bfloat16.

"auto" takes "triton" for CUDA tensors that it can hold, where triton is installed, "cpu" for CPU tensors, and
"reference" for all others: exact zero-order hold, float64 on a GPU, nothing to do. It also takes "reference" for
forward-mode derivatives and under the transforms of torch.func, which the other two refuse: they are operators of
torch with a backward pass and nothing else.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.autocast import as_autocast_does
from nondual.ops.checks import check_kinds, check_shapes, check_tensors
from nondual.ops.discretize import Discretization
from nondual.ops.impl import (
    KERNEL_DTYPES,
    Engine,
    Limit,
    Preference,
    choose,
    needs_triton,
    refuses_transforms,
    runs_kernels,
    takes_dtypes,
)
from nondual.ops.selective_scan import reference
from nondual.ops.selective_scan.inputs import Inputs
from nondual.ops.selective_scan.matrix import selective_scan_matrix as selective_scan_matrix

MOST_STATES = 256  # that the kernels take
Impl = Literal["auto", "reference", "cpu", "triton"]
DISCRETIZATIONS = get_args(Discretization)


def selective_scan(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b l d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b d n"] | None = None,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
    discretization: Discretization = "zoh-euler",
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """The outputs of every step and the state after the last, which the next call may go on from.

        Δ = softplus(delta + delta_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,   y_t = (C_t · h_t + D u_t) silu(z_t)

    A sequence may be split: with the first part's last state as the second part's `state` the results are the same.
    States and sums are kept in float32 (in float64 for float64) whatever u is. Under autocast u, delta, z and
    time-varying B and C are cast to its dtype.

    Args:
        u: input (B, L, D), any floating dtype that the engine knows, in any layout; L may be 0.
        delta: step lengths (B, L, D), of u's dtype; bias and softplus are applied to it if given.
        A: the diagonal of each channel's transition (D, N), real, of any floating dtype; negative where the state is to
            decay.
        B: how the input enters: (B, L, N), shared by all channels; (B, L, G, N), shared by D/G neighbours; or (D, N),
            the same at every step. The first two in u's dtype.
        C: how the state is read, in the same shapes.
        D: skip (D,).
        z: gate (B, L, D), in u's dtype, before its SiLU.
        delta_bias: (D,).
        delta_softplus: take the softplus of delta (+ delta_bias).
        state: the state before the first step (B, D, N); zero where left out.
        reset: True at the first step of each of several sequences packed along L. There the state, whether the initial
            one or a NaN, is replaced by zero.
        discretization: "zoh-euler" (Δ B for the input, as the released Mamba) or "zoh", equation 4 of the paper to the
            letter ((exp(Δ A) - 1) / A · B); "reference" alone has the second.
        impl: "auto", "reference", "cpu" or "triton".

    Returns:
        y (B, L, D) in u's dtype, and the last state (B, D, N) in float32 (float64 for float64), in memory of its own.
        Both are differentiable with respect to every floating argument.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit, or that the engine asked for does not hold; an unknown
            engine or discretisation.
        RuntimeError: "triton" or "cpu" asked for where it cannot be had, for a forward-mode derivative, or under a
            transform of torch.func. A second derivative through either.
    """
    return run(checked(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, discretization), impl)


def checked(
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
    discretization: Discretization = "zoh-euler",
) -> Inputs:
    """Refuse arguments that do not fit together; the others in the form that the engines take.

    The arguments are those of `selective_scan`.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit; an unknown discretisation.
    """
    check_tensors(
        {"u": u, "delta": delta, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "delta_bias": delta_bias, "state": state, "reset": reset},
    )
    u, delta, z = as_autocast_does(u, delta, z)
    B, C = (as_autocast_does(x)[0] if x.ndim != 2 else x for x in (B, C))
    _check(u, delta, A, B, C, D, z, delta_bias, state, reset)
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization must be one of {list(DISCRETIZATIONS)}, got {discretization!r}")
    B, C = (x.unsqueeze(2) if x.ndim == 3 else x for x in (B, C))  # (B, L, G, N) from here on, or (D, N)
    return Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, discretization)


def run(given: Inputs, impl: Impl) -> tuple[Tensor, Tensor]:
    """The outputs and the last state, of inputs that fit together: what the door returns.

    Args:
        given: from `checked`.
        impl: as in `selective_scan`.

    Raises:
        ValueError: as `selective_scan`.
        RuntimeError: likewise.
    """
    engine = choose(impl, ENGINES, given)
    if given.u.numel() == 0:  # nothing to launch
        engine = ENGINES["reference"]
    return engine.run(given)


def selective_scan_step(
    u: Float[Tensor, "b d"],
    delta: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b d n"] | None = None,
    *,
    discretization: Discretization = "zoh-euler",
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """One step of `selective_scan`, for decoding: time and memory do not depend on how many steps came before.

    Args:
        u: input (B, D).
        delta: step length (B, D).
        A: (D, N).
        B: (B, N), or (B, G, N); a constant (D, N) is given as `B.expand(batch, D, N)`, one group for each channel.
        C: likewise.
        D: skip (D,).
        z: gate (B, D).
        delta_bias: (D,).
        delta_softplus: take the softplus of delta (+ delta_bias).
        state: (B, D, N); zero where left out.
        discretization: as in `selective_scan`.
        impl: as in `selective_scan`.

    Returns:
        y (B, D) and the new state (B, D, N).

    Raises:
        ValueError, RuntimeError: as `selective_scan`.
    """
    check_tensors({"u": u, "delta": delta, "A": A, "B": B, "C": C}, {"z": z})
    if u.ndim != 2 or B.ndim not in (2, 3) or C.ndim not in (2, 3):
        raise ValueError(
            "u must be (B, D), and B and C (B, N) or (B, G, N), for one step, "
            f"got {tuple(u.shape)}, {tuple(B.shape)}, {tuple(C.shape)}; selective_scan takes whole sequences"
        )
    y, state = selective_scan(
        u.unsqueeze(1),
        delta.unsqueeze(1),
        A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        D,
        None if z is None else z.unsqueeze(1),
        delta_bias,
        delta_softplus,
        state,
        discretization=discretization,
        impl=impl,
    )
    return y.squeeze(1), state


def _check(u, delta, A, B, C, D, z, delta_bias, state, reset) -> None:
    """Refuse what does not fit together: what was expected, what was got."""
    if u.ndim != 3:
        raise ValueError(f"u must be 3-dimensional (B, L, D), got {tuple(u.shape)}")
    batch, length, channels = u.shape
    if A.ndim != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise ValueError(f"A must be (D, N) with D = {channels} as in u and N of 1 or more, got {tuple(A.shape)}")
    states = A.shape[1]
    check_shapes(
        {
            "delta": (delta, (batch, length, channels), "(B, L, D)"),
            "z": (z, (batch, length, channels), "(B, L, D)"),
            "D": (D, (channels,), "(D,)"),
            "delta_bias": (delta_bias, (channels,), "(D,)"),
            "state": (state, (batch, channels, states), "(B, D, N)"),
            "reset": (reset, (batch, length), "(B, L)"),
        }
    )
    for name, x in (("B", B), ("C", C)):
        fits = {
            2: (channels, states),
            3: (batch, length, states),
            4: (batch, length, x.shape[2] if x.ndim == 4 else 0, states),
        }
        if tuple(x.shape) != fits.get(x.ndim):
            raise ValueError(
                f"{name} must be (B, L, N) = {fits[3]}, (B, L, G, N) or (D, N) = {fits[2]}, got {tuple(x.shape)}"
            )
        if x.ndim == 4 and (x.shape[2] == 0 or channels % x.shape[2]):
            raise ValueError(f"the G of {name} must divide D = {channels}, got {x.shape[2]}; {tuple(x.shape)}")
    parts = {"B": B, "C": C}
    timed = {"u": u, "delta": delta, "z": z} | {name: x for name, x in parts.items() if x.ndim != 2}
    check_kinds(timed, {"A": A, **parts, "D": D, "delta_bias": delta_bias, "state": state}, reset)


# --- engines, and what they refuse -----------------------------------------------------------------------------------


def _reference(given: Inputs) -> tuple[Tensor, Tensor]:
    return reference.selective_scan(*given)


def _cpu(given: Inputs) -> tuple[Tensor, Tensor]:
    from nondual.ops.selective_scan import cpu

    return cpu.selective_scan(**given.arguments())


def _kernels():
    from nondual.ops.selective_scan import triton

    return triton


def _triton(given: Inputs) -> tuple[Tensor, Tensor]:
    return _kernels().selective_scan(**given.arguments())


def _on_the_cpu(given: Inputs) -> str | None:
    if given.u.device.type not in ("cpu", "meta"):
        return f"u must be on the CPU for impl='cpu', got {given.u.device}; impl='auto' chooses"
    return None


def _too_many_states(given: Inputs) -> str | None:
    states = given.A.shape[1]
    if states > MOST_STATES:
        return (
            f"A must have at most {MOST_STATES} states for impl='triton', got N = {states}; impl='reference' takes any"
        )
    return None


def _zoh_euler_alone(impl: str) -> Limit:
    def refuses(given: Inputs) -> str | None:
        rule = given.discretization
        if rule == "zoh-euler":
            return None
        return f"discretization must be 'zoh-euler' for impl={impl!r}, got {rule!r}; impl='reference' has both"

    return Limit("zoh-euler", refuses)


def _no_transforms(impl: str) -> Limit:
    def refuses(given: Inputs) -> str | None:
        if why := refuses_transforms(*given.tensors()):
            return f"selective_scan(impl={impl!r}) {why}; impl='reference' and impl='auto' can do it"
        return None

    return Limit("no forward-mode derivative, no transform of torch.func", refuses, RuntimeError)


ENGINES = {
    "triton": Engine(
        _triton,
        "our kernels",
        limits=(
            _zoh_euler_alone("triton"),
            takes_dtypes("triton", "u", "reference", *KERNEL_DTYPES),
            needs_triton(_kernels),
            Limit(f"up to {MOST_STATES} states", _too_many_states),
            runs_kernels("u", _kernels),
            _no_transforms("triton"),
        ),
        auto=Preference("on a GPU", lambda given: given.u.device.type == "cuda"),
    ),
    "cpu": Engine(
        _cpu,
        "a compiled loop over time; without a C compiler the same in plain torch, slower",
        limits=(
            _zoh_euler_alone("cpu"),
            Limit("a CPU", _on_the_cpu),
            takes_dtypes("cpu", "u", "reference", *KERNEL_DTYPES, torch.float64),
            _no_transforms("cpu"),
        ),
        auto=Preference("on a CPU", lambda given: given.u.device.type == "cpu"),
    ),
    "reference": Engine(_reference, "step by step in plain torch, differentiable any number of times"),
}
