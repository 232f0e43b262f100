"""A linear recurrence, h_t = a_t h_{t-1} + b_t: one step after another, or all steps at once in 2 log₂ L rounds.

Source: Blelloch 1990, "Prefix sums and their applications", sections 1.4 and 1.4.1; the scan by odd and even places is
that of Ladner and Fischer 1980. Symbols: B batch, L steps; a, b and h elementwise in whatever follows.

Two engines (`ENGINES` is their table):

- "sequential": a loop over time. L steps, and no more arithmetic than the formula.
- "parallel": an associative scan. About twice the arithmetic, in 2 log₂ L rounds of whole tensors.

"auto" takes "parallel" on a GPU, where a round costs about what a step does. On a CPU it takes it while a step has few
numbers (`FEW` at most, a complex one counted as two), since a call then costs more than its arithmetic; and
"sequential" beyond.

The gradient of a linear recurrence is a linear recurrence that runs backward, so both engines serve both passes, and
neither saves more than a, h and the initial state for it.

To torch a call is one operator, so that a program compiled or exported with it serves every length. What cannot take an
operator (forward-mode derivatives, the transforms of torch.func) gets the engine's own operations instead, at the price
of memory for all that autograd saves. ONNX has no such operator: an exported model does the scan by doubling.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.impl import Engine, Preference, choose, refuses_transforms

FEW = 2**10
"""The most numbers of a step with which "auto" takes "parallel" on a CPU."""


def linear_recurrence(
    a: Inexact[Tensor, "..."],
    b: Inexact[Tensor, "..."],
    state: Inexact[Tensor, "..."] | None = None,
    *,
    impl: Literal["auto", "sequential", "parallel"] = "auto",
) -> tuple[Inexact[Tensor, "..."], Inexact[Tensor, "..."]]:
    """Every state h_t = a_t h_{t-1} + b_t along dimension 1, and the last.

    Splitting a sequence and handing on the state gives the same as the whole. States are computed in float32 or better.

    Args:
        a: factors (B, L, …), real or complex; a dimension of 1 stands for all of b's, time included.
        b: what is added (B, L, …), real or complex; L may be 0.
        state: h_0 (B, …), the state before the first step; zero where left out.
        impl: "auto", "sequential" or "parallel".

    Returns:
        h (B, L, …) in the dtype that a and b promote to, complex where the state is; and the last state (B, …) in
        float32 or better, complex64 or better, in memory of its own. Both are differentiable, any number of times, in
        reverse mode, in forward mode and under the transforms of torch.func.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit; an unknown engine.
    """
    check_tensors({"a": a, "b": b}, {"state": state})
    _check(a, b, state)
    dtype = torch.promote_types(a.dtype, b.dtype)
    start = b.new_zeros(b.shape[:1] + b.shape[2:]) if state is None else state
    dtype = torch.promote_types(dtype, torch.complex64) if start.is_complex() else dtype
    wide = accumulation_dtype(dtype, start.dtype)
    a, b, start = a.to(wide), b.to(wide), start.to(wide)
    engine = choose(impl, ENGINES, Inputs(a, b, start))
    if b.shape[1] == 0:
        return b.to(dtype).clone(), start.clone()
    a = a.expand(-1, b.shape[1], *a.shape[2:])
    if torch.onnx.is_in_onnx_export():
        h = doubling(a, b, start)
    elif refuses_transforms(a, b, start):
        h = engine.run(a, b, start)
    else:
        h = _states(a, b, start, engine is ENGINES["parallel"])
    return h.to(dtype), h[:, -1].clone()  # a copy: a view would change with h, and keep all of it in memory


# --8<-- [start:combine]
def combine(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Two steps h -> a h + b made one: first the first, then the second.

    Associative, and not commutative.

    Args:
        first: (a1, b1).
        second: (a2, b2).

    Returns:
        (a1 a2, a2 b1 + b2), since a2 (a1 h + b1) + b2 = (a1 a2) h + (a2 b1 + b2).
    """
    (a1, b1), (a2, b2) = first, second
    return a1 * a2, a2 * b1 + b2


# --8<-- [end:combine]


def sequential(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """All states, one after another: a (1 or B, L, …), b (B, L, …), state (B, …) -> h (B, L, …)."""
    h, states = state, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1)


def parallel(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """All states by an associative scan, from the arguments of `sequential`; the state goes in with the first b."""
    first = a[:, :1] * state[:, None] + b[:, :1]
    return associative_scan((a, torch.cat([first, b[:, 1:]], 1)))[1]


# --8<-- [start:scan]
def associative_scan(steps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the first t steps make together, for every t: `combine` over all that came before.

    Join each even step with the odd one after it, and scan the pairs, which are half as many: what they give is right
    at every odd place. An even place needs one more `combine`, with the place before it.

    Args:
        steps: (a, b), time in dimension 1.

    Returns:
        (the products of a, the states from zero), of the same lengths.
    """
    length = steps[1].shape[1]
    if length < 2:
        return steps
    even, odd = _at(steps, slice(0, None, 2)), _at(steps, slice(1, None, 2))
    at_odd = associative_scan(combine(_at(even, slice(length // 2)), odd))
    at_even = combine(_at(at_odd, slice((length - 1) // 2)), _at(even, slice(1, None)))
    a, b = (_interleave(torch.cat([x[:, :1], y], 1), z) for x, y, z in zip(even, at_even, at_odd))
    return a, b


# --8<-- [end:scan]


def _at(steps: tuple[Tensor, Tensor], places: slice) -> tuple[Tensor, Tensor]:
    """The steps at these places."""
    a, b = steps
    return a[:, places], b[:, places]


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """x_0 of the even places, x_1 of the odd ones, and so on; there may be one more even place."""
    length = odd.shape[1]
    joined = torch.stack([even[:, :length], odd], 2).flatten(1, 2)
    return joined if even.shape[1] == length else torch.cat([joined, even[:, length:]], 1)


class Inputs(NamedTuple):
    """What an engine takes, all of one dtype."""

    a: Tensor
    b: Tensor
    state: Tensor


def _rounds_are_cheap(given: Inputs) -> bool:
    """Asked by "auto" alone, so that a program compiled for a named engine serves every size."""
    return given.b.device.type == "cuda" or given.state.numel() * (1 + given.state.is_complex()) <= FEW


ENGINES = {
    "parallel": Engine(
        parallel,
        "an associative scan, in 2 log₂ L rounds",
        auto=Preference(f"on a GPU; on a CPU where a step has at most {FEW:,} numbers", _rounds_are_cheap),
    ),
    "sequential": Engine(sequential, "a loop over time"),
}


def doubling(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    """All states, from the arguments of `sequential`, by a number of rounds that does not depend on L: for ONNX, whose
    graph has no recursion. After round k each step has joined the 2^k steps that end with it.

    Source: Hillis and Steele 1986, "Data parallel algorithms". For lengths up to 2^ROUNDS.
    """
    b = torch.cat([a[:, :1] * state[:, None] + b[:, :1], b[:, 1:]], 1)
    step = torch.arange(b.shape[1], device=b.device)
    for k in range(ROUNDS):
        earlier, joins = (step - 2**k).clamp(min=0), (step >= 2**k).view(-1, *[1] * (b.ndim - 2))
        a, b = torch.where(joins, a * a[:, earlier], a), torch.where(joins, a * b[:, earlier] + b, b)
    return b


ROUNDS = 20  # of `doubling`: lengths up to a million

# --- as an operator of torch -----------------------------------------------------------------------------------------


@torch.library.custom_op("nondual::linear_recurrence", mutates_args=())
def _states(a: Tensor, b: Tensor, state: Tensor, in_parallel: bool) -> Tensor:
    return (parallel if in_parallel else sequential)(a, b, state).contiguous()


@_states.register_fake
def _(a, b, state, in_parallel):
    return b.new_empty(b.shape)


def _save(ctx, inputs, output):
    a, _, state, ctx.in_parallel = inputs
    ctx.save_for_backward(a, output, state)


def _differentiate(ctx, d_h):
    """g_t = ∂h_t + ā_{t+1} g_{t+1}, the gradient of b_t: the same recurrence from the other end."""
    a, h, state = ctx.saved_tensors
    later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1).conj()  # ā_{t+1}, and nothing after the last
    g = _states(later.flip(1), d_h.flip(1), torch.zeros_like(state), ctx.in_parallel).flip(1)
    before = torch.cat([state[:, None], h[:, :-1]], 1)  # h_{t-1}
    d_a = (g * before.conj()).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
    d_state = (a[:, 0].conj() * g[:, 0]).sum_to_size(state.shape) if ctx.needs_input_grad[2] else None
    return d_a, g, d_state, None


_states.register_autograd(_differentiate, setup_context=_save)


def _check(a: Tensor, b: Tensor, state: Tensor | None) -> None:
    """Refuse what does not fit together."""
    for name, x in (("a", a), ("b", b), ("state", state)):
        if x is not None and not (x.is_floating_point() or x.is_complex()):
            raise ValueError(f"{name} must be floating point or complex, got {x.dtype}")
        if x is not None and x.device != b.device:
            raise ValueError(f"{name} must be on the device of b, {b.device}, got {x.device}")
    if b.ndim < 2:
        raise ValueError(f"b must be (B, L, …), got {tuple(b.shape)}")
    if a.ndim != b.ndim or any(have not in (1, want) for have, want in zip(a.shape, b.shape)):
        raise ValueError(f"a must have the shape of b, {tuple(b.shape)}, or 1 in its place, got {tuple(a.shape)}")
    want = (b.shape[0], *b.shape[2:])
    if state is not None and tuple(state.shape) != want:
        raise ValueError(f"state must be (B, …) = {want}, b without its time, got {tuple(state.shape)}")
