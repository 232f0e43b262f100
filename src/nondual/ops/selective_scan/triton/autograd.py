"""The kernels as operators of torch with a backward pass, and the engine that calls them.

A custom_op and not a triton_op: torch traces the latter into the launch, which Triton's interpreter cannot follow, and
then what runs on a GPU would not be what is tested without one.
"""

import torch
from torch import Tensor

from nondual.ops.selective_scan.triton.launch import Launcher, empty_gradients, empty_outputs


@torch.library.custom_op("nondual::selective_scan", mutates_args=())
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, state: Tensor | None, reset: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = Launcher(
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        bias=bias,
        softplus=softplus,
        state=state,
        reset=reset,
    )
    return call.forward(save)


@_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, softplus, state, reset, save):
    return empty_outputs(u, A, z, save)


@torch.library.custom_op("nondual::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor | None, d_last: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, softplus: bool, state: Tensor | None,
    reset: Tensor | None, checkpoints: Tensor, ungated: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = Launcher(
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        bias=bias,
        softplus=softplus,
        state=state,
        reset=reset,
    )
    return call.backward(dy, d_last, checkpoints, ungated)  # pyright: ignore[reportReturnType] nine, as inputs


@_backward.register_fake
def _(dy, d_last, u, delta, A, B, C, D, z, bias, softplus, state, reset, checkpoints, ungated):
    return empty_gradients(u, delta, A, B, C, D, z, bias, state)


def _save(ctx, inputs, output):
    *tensors, softplus, state, reset, _ = inputs
    ctx.save_for_backward(*tensors, state, reset, *output[2:])
    ctx.softplus = softplus
    ctx.set_materialize_grads(False)  # the saved outputs get no gradient: do not make zeros of their size


def _differentiate(ctx, dy, d_last, *_):
    *tensors, state, reset, checkpoints, ungated = ctx.saved_tensors
    grads = _backward(dy, d_last, *tensors, ctx.softplus, state, reset, checkpoints, ungated)
    given = [None if x is None else grad for x, grad in zip((*tensors, state), grads)]
    return *given[:8], None, given[8], None, None  # softplus, reset and save have none


def _refuse(ctx, *_):
    raise RuntimeError(
        "selective_scan(impl='triton') has no second derivative; selective_scan(impl='reference') has one"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


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
    """Every output and the last state, by the kernels; the input is as `nondual.ops.selective_scan` has checked it.

    Args:
        u: input (B, L, D), float16, bfloat16 or float32, in any layout.
        delta: step lengths (B, L, D), before bias and softplus.
        A: (D, N), N at most 256.
        B: (B, L, G, N), or (D, N) where it does not depend on time.
        C: likewise.
        D: skip (D,).
        z: gate (B, L, D), before its SiLU.
        delta_bias: (D,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, D, N); zero where left out.
        reset: (B, L), True where a sequence begins and the state before it is replaced by zero.

    Returns:
        y (B, L, D) in u's dtype, and the last state (B, D, N) in float32.

    Raises:
        RuntimeError: when differentiated twice.
    """
    given = [x for x in (u, delta, A, B, C, D, z, delta_bias, state) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    y, last, *_ = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, save)
    return y, last
