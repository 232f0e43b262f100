"""State space duality: the scan of Mamba-2, which is a recurrence in L steps and a masked attention in L² at once.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,   y_t = h_t C_t + D x_t,   then y_t · silu(z_t)

Source: Dao and Gu 2024 (2405.21060), sections 3, 6 and Listing 1. It is the selective scan with one A for all channels
and states of a head, which turns it into products of matrices. Symbols: B batch, L steps, H heads, P channels of a
head, N states, G groups of heads that share B and C.

Three engines (`ENGINES` is their table, with their limits):

- "reference": step by step in plain torch. Any floating dtype, differentiable any number of times and in forward mode.
- "chunked": by chunks, in plain torch: attention within a chunk, a recurrence between chunks; time and memory linear in
  L. Any floating dtype, differentiable any number of times and in forward mode.
- "triton": our kernels. On CUDA tensors; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 set before
  triton is imported), and slowly.

"auto" takes "triton" for CUDA tensors unless a limit of it is in the way, and "chunked" for all others.
"""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.autocast import as_autocast_does
from nondual.ops.checks import check_chunk, check_kinds, check_shapes, check_tensors
from nondual.ops.impl import (
    KERNEL_DTYPES,
    Engine,
    Limit,
    Preference,
    choose,
    needs_triton,
    refuses_transforms,
    runs_kernels,
    takes_chunks,
    takes_dtypes,
)
from nondual.ops.ssd import chunked, reference
from nondual.ops.ssd.inputs import Inputs
from nondual.ops.ssd.matrix import ssd_matrix as ssd_matrix

WIDEST, MOST_STATES = 256, 256  # the widest head and the most states that the kernels take
Impl = Literal["auto", "reference", "chunked", "triton"]
KERNEL_CHUNKS = (16, 32, 64, 128, 256)


def ssd(
    x: Float[Tensor, "b l h p"],
    delta: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, "..."] | None = None,
    z: Float[Tensor, "b l h p"] | None = None,
    delta_bias: Float[Tensor, " h"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b h p n"] | None = None,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
    chunk: int | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "b l h p"], Float[Tensor, "b h p n"]]:
    """The outputs of every step and the state after the last, which the next call may go on from.

        Δ = softplus(delta + delta_bias)
        h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ,   y_t = (h_t C_t + D x_t) silu(z_t)

    Splitting a sequence and handing on the state gives the same as the whole. States and sums are kept in float32 (in
    float64 for float64) whatever x is. Under autocast x, delta, z, B and C are cast to its dtype.

    Args:
        x: input (B, L, H, P), any floating dtype that the engine knows, in any layout; L may be 0.
        delta: step lengths (B, L, H), of x's dtype; bias and softplus are applied to it if given.
        A: one rate for each head (H,), real, of any floating dtype; negative where the state is to decay.
            Above 0 the state grows. "reference" and "chunked" are right as long as the result is finite; "triton" gives
            NaN where the growth within one chunk, exp(A Σ Δ), exceeds float32, whatever the inputs there are.
        B: how the input enters: (B, L, N), shared by all heads, or (B, L, G, N), shared by H/G neighbours; in
            x's dtype.
        C: how the state is read, in the same shape as B.
        D: skip (H,), or (H, P).
        z: gate (B, L, H, P), in x's dtype, before its SiLU.
        delta_bias: (H,).
        delta_softplus: take the softplus of delta (+ delta_bias).
        state: the state before the first step (B, H, P, N); zero where left out.
        reset: True at the first step of each of several sequences packed along L: there all that came before is
            forgotten, a NaN included, and an initial state as well. In the gradients of "chunked" a NaN in z or in the
            incoming gradient can still reach any step of its own chunk. For "triton" a NaN or inf in x can reach any
            output of its channel within its chunk, and its gradients promise nothing where there is NaN or inf.
        chunk: steps of a chunk for "chunked", 1 or more, and "triton", one of 16, 32, 64, 128 and 256; the engine's own
            where left out. The result does not depend on it but for rounding.
        impl: "auto", "reference", "chunked" or "triton".

    Returns:
        y (B, L, H, P) in x's dtype, and the last state (B, H, P, N) in float32 (float64 for float64), in memory of its
        own. Both are differentiable with respect to every floating argument.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit, or that the engine asked for does not hold; an unknown
            engine; a chunk below 1.
        RuntimeError: "triton" asked for where triton is missing, for a forward-mode derivative, or under a transform of
            torch.func. A second derivative through it.
    """
    return run(checked(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk), impl)


def checked(
    x: Tensor,
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
    chunk: int | None = None,
) -> Inputs:
    """Refuse arguments that do not fit together; the others in the form that the engines take.

    The arguments are those of `ssd`.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit; a chunk below 1.
    """
    check_tensors(
        {"x": x, "delta": delta, "A": A, "B": B, "C": C},
        {"D": D, "z": z, "delta_bias": delta_bias, "state": state, "reset": reset},
    )
    x, delta, B, C, z = as_autocast_does(x, delta, B, C, z)
    _check(x, delta, A, B, C, D, z, delta_bias, state, reset, chunk)
    B, C = (v.unsqueeze(2) if v.ndim == 3 else v for v in (B, C))  # (B, L, G, N) from here on
    return Inputs(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk)


def run(given: Inputs, impl: Impl) -> tuple[Tensor, Tensor]:
    """The outputs and the last state, of inputs that fit together: what the door returns.

    Args:
        given: from `checked`.
        impl: as in `ssd`.

    Raises:
        ValueError: as `ssd`.
        RuntimeError: likewise.
    """
    engine = choose(impl, ENGINES, given)
    if given.x.numel() == 0:  # nothing to launch
        engine = ENGINES["reference"]
    return engine.run(given)


def ssd_step(
    x: Float[Tensor, "b h p"],
    delta: Float[Tensor, "b h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, "..."] | None = None,
    z: Float[Tensor, "b h p"] | None = None,
    delta_bias: Float[Tensor, " h"] | None = None,
    delta_softplus: bool = False,
    state: Float[Tensor, "b h p n"] | None = None,
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One step of `ssd`, for decoding: time and memory do not depend on how many steps came before.

    In plain torch on every device: one step is the recurrence itself, and has no chunk to cut.

    Args:
        x: input (B, H, P).
        delta: step length (B, H).
        A: (H,).
        B: (B, N), or (B, G, N).
        C: likewise.
        D: skip (H,) or (H, P).
        z: gate (B, H, P).
        delta_bias: (H,).
        delta_softplus: take the softplus of delta (+ delta_bias).
        state: (B, H, P, N); zero where left out.

    Returns:
        y (B, H, P) and the new state (B, H, P, N).

    Raises:
        ValueError: as `ssd`.
    """
    check_tensors({"x": x, "delta": delta, "A": A, "B": B, "C": C}, {"z": z})
    if x.ndim != 3 or delta.ndim != 2 or B.ndim not in (2, 3) or C.ndim not in (2, 3):
        raise ValueError(
            "x must be (B, H, P), delta (B, H), and B and C (B, N) or (B, G, N), for one step, got "
            f"{', '.join(str(tuple(v.shape)) for v in (x, delta, B, C))}; ssd takes whole sequences"
        )
    x, delta, B, C = (v.unsqueeze(1) for v in (x, delta, B, C))
    z = None if z is None else z.unsqueeze(1)
    y, state = ssd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, impl="reference")
    return y.squeeze(1), state


def _check(x, delta, A, B, C, D, z, delta_bias, state, reset, chunk) -> None:
    """Refuse what does not fit together: what was expected, what was got."""
    if x.ndim != 4:
        raise ValueError(f"x must be 4-dimensional (B, L, H, P), got {tuple(x.shape)}")
    batch, length, heads, width = x.shape
    for name, v in (("B", B), ("C", C)):
        if v.ndim not in (3, 4) or tuple(v.shape[:2]) != (batch, length) or v.shape[-1] == 0:
            raise ValueError(
                f"{name} must be (B, L, N) or (B, L, G, N) with (B, L) = {(batch, length)} as in x and N of 1 or more, "
                f"got {tuple(v.shape)}"
            )
    if C.shape != B.shape:
        raise ValueError(f"C must have the shape of B, {tuple(B.shape)}, got {tuple(C.shape)}")
    if B.ndim == 4 and (B.shape[2] == 0 or heads % B.shape[2]):
        raise ValueError(f"the G of B and C must divide H = {heads}, got {B.shape[2]}; {tuple(B.shape)}")
    check_shapes(
        {
            "delta": (delta, (batch, length, heads), "(B, L, H)"),
            "A": (A, (heads,), "(H,)"),
            "z": (z, (batch, length, heads, width), "(B, L, H, P)"),
            "delta_bias": (delta_bias, (heads,), "(H,)"),
            "state": (state, (batch, heads, width, B.shape[-1]), "(B, H, P, N)"),
            "reset": (reset, (batch, length), "(B, L)"),
        }
    )
    if D is not None and tuple(D.shape) not in ((heads,), (heads, width)):
        raise ValueError(f"D must be (H,) = {(heads,)} or (H, P) = {(heads, width)}, got {tuple(D.shape)}")
    check_chunk(chunk)
    timed = {"x": x, "delta": delta, "B": B, "C": C, "z": z}
    check_kinds(timed, {"A": A, "D": D, "delta_bias": delta_bias, "state": state}, reset)


# --- engines, and what they refuse -----------------------------------------------------------------------------------


def _kernels():
    from nondual.ops.ssd import triton

    return triton


def _triton(given: Inputs) -> tuple[Tensor, Tensor]:
    return _kernels().ssd(*given)


def _too_wide(given: Inputs) -> str | None:
    width, states = given.x.shape[3], given.B.shape[3]
    if width > WIDEST or states > MOST_STATES:
        return (
            f"P must be at most {WIDEST} and N at most {MOST_STATES} for impl='triton', got {width} and {states}; "
            "impl='chunked' takes any"
        )
    return None


def _transformed(given: Inputs) -> str | None:
    if why := refuses_transforms(*given.tensors()):
        return f"ssd(impl='triton') {why}; impl='chunked' and impl='auto' can do it"
    return None


ENGINES = {
    "triton": Engine(
        _triton,
        "our kernels",
        limits=(
            takes_dtypes("triton", "x", "chunked", *KERNEL_DTYPES),
            Limit(f"P up to {WIDEST}, N up to {MOST_STATES}", _too_wide),
            takes_chunks("triton", "chunked", *KERNEL_CHUNKS),
            needs_triton(_kernels),
            runs_kernels("x", _kernels),
            Limit("no forward-mode derivative, no transform of torch.func", _transformed, RuntimeError),
        ),
        auto=Preference("on a GPU", lambda given: given.x.device.type == "cuda"),
    ),
    "chunked": Engine(chunked.ssd, "by chunks in plain torch, in time and memory linear in L"),
    "reference": Engine(
        reference.ssd, "step by step in plain torch", auto=Preference("never; `ssd_step` uses it", lambda _: False)
    ),
}
