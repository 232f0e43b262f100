"""The kernels of state space duality as an operator of torch with a backward pass, and the engine that calls it.

A custom_op and not a triton_op: torch traces the latter into the launch, which Triton's interpreter cannot follow, and
then what runs on a GPU would not be what is tested without one.
"""

import torch
from torch import Tensor

from nondual.ops.ssd.triton.launch import Launcher
from nondual.ops.ssd.triton.tiles import chunk_of


@torch.library.custom_op("nondual::ssd", mutates_args=())
def _forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return Launcher(x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk).forward()


@_forward.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk):
    last = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
    return x.new_empty(x.shape), last


@torch.library.custom_op("nondual::ssd_backward", mutates_args=())
def _backward(
    d_y: Tensor, d_last: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, state: Tensor | None, reset: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the nine floating inputs, in their order; those of D and z mean nothing where these are None."""
    call = Launcher(x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk)
    return call.backward(d_y, d_last)


@_backward.register_fake
def _(d_y, d_last, x, delta, A, B, C, D, z, delta_bias, state, reset, softplus, chunk):
    made = [x.new_empty(v.shape) for v in (x, delta, A, B, C)]
    made[2] = made[2].float()
    d_d, d_bias = (x.new_empty(v.shape, dtype=torch.float32) for v in (A if D is None else D, A))
    return (*made, d_d, x.new_empty(0 if z is None else z.shape), d_bias, torch.empty_like(d_last))


def _save(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, d_y, d_last):
    grads = _backward(d_y, d_last, *ctx.saved_tensors, ctx.softplus, ctx.chunk)
    given = (None if v is None else grad for v, grad in zip(ctx.saved_tensors, grads))
    return *given, None, None, None  # reset, softplus and chunk have none


def _refuse(ctx, *_):
    raise RuntimeError("ssd(impl='triton') has no second derivative; impl='chunked' has one")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def ssd(
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
) -> tuple[Tensor, Tensor]:
    """Outputs and last state by the kernels; the input is taken as `nondual.ops.ssd` has checked it, and is not empty.

    Args:
        x: input (B, L, H, P), float16, bfloat16 or float32, in any layout; P at most 256.
        delta: step lengths (B, L, H), before bias and softplus.
        A: (H,).
        B: (B, L, G, N), N at most 256.
        C: (B, L, G, N).
        D: skip (H,) or (H, P).
        z: gate (B, L, H, P), before its SiLU.
        delta_bias: (H,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, H, P, N); zero where left out.
        reset: (B, L), True where a sequence begins and all that came before is forgotten.
        chunk: steps of a chunk, 16, 32, 64, 128 or 256; `chunk_of` where left out.

    Returns:
        y (B, L, H, P) in x's dtype, and the last state (B, H, P, N) in float32.

    Raises:
        RuntimeError: when differentiated twice.
    """
    A, D, delta_bias, state = (None if v is None else v.float() for v in (A, D, delta_bias, state))
    if D is not None:
        D = (D if D.ndim == 2 else D[:, None]).expand(x.shape[2:])
    return _forward(x, delta, A, B, C, D, z, delta_bias, state, reset, delta_softplus, chunk or chunk_of(x.dtype))
