"""Both ways as one operator of torch with a backward pass, and the engine that calls it."""

import torch
from torch import Tensor

from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.impl import refuses_transforms
from nondual.ops.selective_scan.cpu import in_torch, loop
from nondual.ops.selective_scan.cpu.memory import copy, shapes, wide
from nondual.ops.selective_scan.inputs import Inputs


@torch.library.custom_op("nondual::selective_scan_cpu", mutates_args=(), device_types="cpu")
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = _widened(u, delta, A, B, C, D, z, bias, state, reset, softplus)
    compiled = loop.library(given.u.dtype)
    with torch.autocast("cpu", enabled=False):
        y, last, checkpoints = loop.forward(compiled, given) if compiled else in_torch.forward(given)
    return y if y.dtype == u.dtype else copy(y, u.dtype), last, checkpoints


@_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, state, reset, softplus):
    y, last, checkpoints = shapes(u, A)
    dtype = accumulation_dtype(u.dtype)
    return u.new_empty(y), u.new_empty(last, dtype=dtype), u.new_empty(checkpoints, dtype=dtype)


@torch.library.custom_op("nondual::selective_scan_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = _widened(u, delta, A, B, C, D, z, bias, state, reset, softplus)
    incoming = wide(u, dy, dlast, checkpoints)
    compiled = loop.library(given.u.dtype)
    with torch.autocast("cpu", enabled=False):
        grads = loop.backward(compiled, *incoming, given) if compiled else in_torch.backward(*incoming, given)
    return tuple(  # pyright: ignore[reportReturnType] nine, as there are nine inputs
        u.new_empty(0) if x is None or grad is None else grad if grad.dtype == x.dtype else copy(grad, x.dtype)
        for grad, x in zip(grads, (u, delta, A, B, C, D, z, bias, state))
    )


@_backward.register_fake
def _(dy, dlast, checkpoints, u, delta, A, B, C, D, z, bias, state, reset, softplus):
    return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (u, delta, A, B, C, D, z, bias, state))


def _widened(u, delta, A, B, C, D, z, bias, state, reset, softplus) -> Inputs:
    """The inputs in float32, or in float64 where u is."""
    u_, delta, A, B, C, D, z, bias, state, reset = wide(u, u, delta, A, B, C, D, z, bias, state, reset)
    return Inputs(u_, delta, A, B, C, D, z, bias, softplus, state, reset, "zoh-euler")


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # an output that the loss does not depend on gets None, not a tensor of zeros
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, dy, dlast, _):
    *inputs, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = inputs[0].new_zeros(()).expand(inputs[0].shape)
    grads = _backward(dy, dlast, checkpoints, *inputs, ctx.softplus)
    return *(None if x is None else grad for grad, x in zip(grads, inputs)), None, None  # none for reset, softplus


def _refuse(ctx, *_):
    raise RuntimeError("selective_scan(impl='cpu') has no second derivative; impl='reference' has one")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """
    Raises:
        RuntimeError: the tensors are under forward-mode differentiation or a transform of torch.func.
    """
    if refused := refuses_transforms(*tensors):
        raise RuntimeError(f"selective_scan(impl='cpu') {refused}; impl='reference' or 'auto' can do it")


def _guard(operator) -> None:
    """Have an operator refuse those transforms even where it is called by its own name, torch.ops.nondual.….

    Where no gradient is asked for, torch would not call the operator's autograd formula, and would drop a tangent
    without an error.
    """
    try:
        from torch._library.autograd import make_autograd_impl
    except ImportError:  # torch has no public way to this; the check in `selective_scan` below stays
        return
    follow = make_autograd_impl(operator._opoverload, operator)

    def guarded(keyset, *inputs):
        _refuse_transforms(*(x for x in inputs if isinstance(x, Tensor)))
        return follow(keyset, *inputs)

    _library.impl(operator._opoverload._opname, guarded, "AutogradCPU", with_keyset=True)


_library = torch.library.Library("nondual", "FRAGMENT")
_guard(_forward)
_guard(_backward)


def selective_scan(
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
) -> tuple[Tensor, Tensor]:
    """Every output and the last state; the input is taken as `nondual.ops.selective_scan` has checked it.

    Args:
        u: input (B, L, D), of one element or more, in float16, bfloat16, float32 or float64.
        delta: step lengths (B, L, D), before bias and softplus.
        A: (D, N).
        B: (B, L, G, N), or (D, N) where it does not depend on time.
        C: likewise.
        D: skip (D,).
        z: gate (B, L, D), before its SiLU.
        delta_bias: (D,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, D, N); zero where left out.
        reset: (B, L), True where a sequence begins and the state before it is replaced by zero.

    Returns:
        y (B, L, D) in u's dtype, and the last state (B, D, N) in float32 (float64 for float64).

    Raises:
        RuntimeError: a second derivative, a forward-mode derivative, or a transform of torch.func.
        MemoryError: no memory for what a thread works in.
    """
    _refuse_transforms(u, delta, A, B, C, D, z, delta_bias, state, reset)
    y, last, _ = _forward(u, delta, A, B, C, D, z, delta_bias, state, reset, delta_softplus)
    return y, last
