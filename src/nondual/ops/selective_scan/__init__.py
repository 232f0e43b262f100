"""The selective scan: a linear recurrence whose steps are decided by what passes through it.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,   y_t = C_t h_t + D u_t,   then y_t · silu(z_t)

Source: Gu and Dao 2023 (2312.00752), equations 1 to 4 and Algorithm 2. The arguments are those of the mamba-ssm
package, with time before channels: (B, L, D) where that has (B, D, L). Symbols: B batch, L steps, D channels, N states
of a channel, G groups of channels that share B and C.

Three engines:

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
from nondual.ops.impl import KERNEL_DTYPES, NO_TRITON, choose, kernels_refuse, refuses_transforms
from nondual.ops.selective_scan import reference
from nondual.ops.selective_scan.matrix import selective_scan_matrix as selective_scan_matrix
from nondual.ops.selective_scan.reference import Discretization

CPU_DTYPES = (*KERNEL_DTYPES, torch.float64)
Engine = Literal["auto", "reference", "cpu", "triton"]
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
    impl: Engine = "auto",
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d n"]]:
    """The outputs of every step and the state after the last, which the next call may go on from.

        Δ = softplus(delta + delta_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t,   y_t = (C_t · h_t + D u_t) silu(z_t)

    Splitting a sequence and handing on the state gives the same as the whole. States and sums are kept in float32 (in
    float64 for float64) whatever u is. Under autocast u, delta, z and time-varying B and C are cast to its dtype.

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
        reset: True at the first step of each of several sequences packed along L: there all that came before is
            forgotten, a NaN included, and an initial state as well.
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
    given = (u, delta, A, B, C, D, z, delta_bias, state, reset)
    engines = {"reference": reference.selective_scan, "cpu": _cpu, "triton": _triton}
    engine = choose(impl, engines, auto=_auto(u, A, discretization, given))
    if (refused := REFUSES.get(impl)) and (why := refused(u, A, discretization, given)):
        raise why
    if u.numel() == 0:  # nothing to launch
        engine = reference.selective_scan
    return engine(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, discretization)


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
    impl: Engine = "auto",
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


# --- engines, and what they refuse -----------------------------------------------------------------------------------


def _auto(u: Tensor, A: Tensor, discretization: Discretization, given: tuple[Tensor | None, ...] = ()) -> str:
    """The engine that "auto" means: the rule at the top of this file."""
    if u.device.type == "cuda" and _refuses_triton(u, A, discretization, given) is None:
        return "triton"
    if u.device.type == "cpu" and _refuses_cpu(u, A, discretization, given) is None:
        return "cpu"
    return "reference"


def _refuses_cpu(u: Tensor, A: Tensor, discretization: str, given: tuple[Tensor | None, ...]) -> Exception | None:
    """What "cpu" raises for these arguments, or None where it can compute them."""
    if discretization != "zoh-euler":
        return ValueError(_NO_ZOH.format("cpu", discretization))
    if u.device.type not in ("cpu", "meta"):
        return ValueError(f"u must be on the CPU for impl='cpu', got {u.device}; impl='auto' chooses")
    if u.dtype not in CPU_DTYPES:
        return ValueError(
            f"u must be float16, bfloat16, float32 or float64 for impl='cpu', got {u.dtype}; impl='reference' takes any"
        )
    if why := refuses_transforms(*given):
        return RuntimeError(f"selective_scan(impl='cpu') {why}; impl='reference' and impl='auto' can do it")
    return None


def _refuses_triton(u: Tensor, A: Tensor, discretization: str, given: tuple[Tensor | None, ...]) -> Exception | None:
    """What "triton" raises for these arguments, or None where it can compute them."""
    if discretization != "zoh-euler":
        return ValueError(_NO_ZOH.format("triton", discretization))
    if u.dtype not in KERNEL_DTYPES:
        return ValueError(
            f"u must be float16, bfloat16 or float32 for impl='triton', got {u.dtype}; impl='reference' takes any"
        )
    try:
        from nondual.ops.selective_scan import triton
    except ImportError as error:
        return RuntimeError(f"{NO_TRITON} ({error})")
    if A.shape[1] > triton.MOST_STATES:
        return ValueError(
            f"A must have at most {triton.MOST_STATES} states for impl='triton', got N = {A.shape[1]}; "
            "impl='reference' takes any"
        )
    if why := kernels_refuse("u", u, triton.INTERPRETED):
        return ValueError(why)
    if why := refuses_transforms(*given):
        return RuntimeError(f"selective_scan(impl='triton') {why}; impl='reference' and impl='auto' can do it")
    return None


_NO_ZOH = "discretization must be 'zoh-euler' for impl='{}', got '{}'; impl='reference' has both"
REFUSES = {"cpu": _refuses_cpu, "triton": _refuses_triton}


def _cpu(*arguments):
    from nondual.ops.selective_scan import cpu

    return cpu.selective_scan(*arguments[:-1])


def _triton(*arguments):
    from nondual.ops.selective_scan import triton

    return triton.selective_scan(*arguments[:-1])


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
