"""The kernels of linear attention as two operators of torch with a backward pass, and the engine that calls them.

custom_op and not triton_op: torch traces the latter into the launch, which Triton's interpreter cannot follow, and then
what runs on a GPU would not be what is tested without one.
"""

import torch
from torch import Tensor

from nondual.ops.linear_attention.triton.launch import DeltaLauncher, SumLauncher
from nondual.ops.linear_attention.triton.tiles import chunk_of


@torch.library.custom_op("nondual::linear_attention", mutates_args=())
def _sum(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, reset: Tensor | None, scale: float,
    chunk: int, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return SumLauncher(q, k, v, log_decay, state, reset, scale, chunk, wide).forward()


@_sum.register_fake
def _(q, k, v, log_decay, state, reset, scale, chunk, wide):
    return v.new_empty(v.shape, dtype=torch.float32 if wide else None), _state_of(k, v)


@torch.library.custom_op("nondual::linear_attention_backward", mutates_args=())
def _sum_backward(
    d_y: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None,
    reset: Tensor | None, scale: float, chunk: int, wide: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the five floating inputs, in their order; that of log_decay is empty where it is None."""
    call = SumLauncher(q, k, v, log_decay, state, reset, scale, chunk, wide)
    dq, dk, dv, dlog, dinitial = call.backward(d_y, d_last)
    return dq, dk, dv, d_y.new_empty(0) if log_decay is None else dlog, dinitial


@_sum_backward.register_fake
def _(d_y, d_last, q, k, v, log_decay, state, reset, scale, chunk, wide):
    dlog = d_y.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dlog, _state_of(k, v)


@torch.library.custom_op("nondual::delta_rule", mutates_args=())
def _delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, state: Tensor | None, reset: Tensor | None,
    scale: float, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return DeltaLauncher(q, k, v, log_decay, beta, state, reset, scale, chunk).forward()


@_delta.register_fake
def _(q, k, v, log_decay, beta, state, reset, scale, chunk):
    return v.new_empty(v.shape), _state_of(k, v)


@torch.library.custom_op("nondual::delta_rule_backward", mutates_args=())
def _delta_backward(
    d_y: Tensor, d_last: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor,
    state: Tensor | None, reset: Tensor | None, scale: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the six floating inputs, in their order; that of log_decay is empty where it is None."""
    call = DeltaLauncher(q, k, v, log_decay, beta, state, reset, scale, chunk)
    dq, dk, dv, dlog, dbeta, dinitial = call.backward(d_y, d_last)
    return dq, dk, dv, d_y.new_empty(0) if log_decay is None else dlog.mT.contiguous(), dbeta, dinitial


@_delta_backward.register_fake
def _(d_y, d_last, q, k, v, log_decay, beta, state, reset, scale, chunk):
    dlog = d_y.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), dlog, beta.new_empty(beta.shape), _state_of(k, v)


def _state_of(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(k.shape[0], *k.shape[2:], v.shape[3], dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x for x in inputs if x is None or isinstance(x, Tensor)))
    ctx.options = [x for x in inputs if x is not None and not isinstance(x, Tensor)]


def _differentiate(backward):
    def differentiate(ctx, d_y, d_last):
        grads = backward(d_y, d_last, *ctx.saved_tensors, *ctx.options)
        given = (None if v is None else grad for v, grad in zip(ctx.saved_tensors, grads))
        return *given, None, *(None for _ in ctx.options)  # neither reset nor the options have one

    return differentiate


def _refuse(ctx, *_):
    raise RuntimeError("linear_attention(impl='triton') has no second derivative; impl='chunked' has one")


for forward, backward in ((_sum, _sum_backward), (_delta, _delta_backward)):
    forward.register_autograd(_differentiate(backward), setup_context=_save)
    backward.register_autograd(_refuse)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalise: bool = False,
    causal: bool = True,
    scale: float = 1.0,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs and last state by the kernels; inputs as `nondual.ops.linear_attention` has checked them, none empty.

    Args:
        q: queries (B, H, N, D), float16, bfloat16 or float32, in any layout; D at most 256.
        k: keys (B, G, N, D); where G < H a copy is made for each head.
        v: values (B, G, N, Dv), Dv at most 256.
        log_decay: (H,) or (B, H, N); None for no decay.
        beta: (B, H, N), which makes it the delta rule; None for a sum.
        normalise: divide by the sum of the weights, which is computed as one more column of v, in float32.
        causal: True.
        scale: factor on q · k.
        state: the state before the first step, (B, H, D, Dv), or (B, H, D, Dv + 1) with `normalise`; None for zero.
        reset: (B, N), True where a sequence begins and all that came before is forgotten.
        chunk: steps of a chunk, 16, 32, 64, 128 or 256, of which the delta rule takes at most 64; `chunk_of` where left
            out.

    Returns:
        out (B, H, N, Dv) in q's dtype, and the last state in float32.

    Raises:
        RuntimeError: when differentiated twice.
    """
    share = q.shape[1] // k.shape[1]
    if share > 1:
        k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, ·) from here on
    state = None if state is None else state.float()
    if log_decay is not None:
        log_decay = (log_decay if log_decay.ndim == 1 else log_decay.mT).float().expand(q.shape[:3])
    size = chunk_of(q.dtype, beta is not None, chunk)
    if beta is not None:
        out, last = _delta(q, k, v, log_decay, beta.float(), state, reset, scale, size)
        return out.transpose(1, 2), last
    if scale == 0:  # the state is carried times `scale`
        q, scale = q * 0, 1.0
    if not normalise:
        out, last = _sum(q, k, v, log_decay, state, reset, scale, size, False)
        return out.transpose(1, 2), last
    return _normalised(q, k, v, log_decay, state, reset, scale, size)


def _normalised(q, k, v, log_decay, state, reset, scale, size) -> tuple[Tensor, Tensor]:
    """Two runs, of the values and of a value of 1, and their ratio: 0, without a gradient, where the second is 0.

    Both give float32: a sum over all steps may be more than float16 holds, where the ratio is not.
    """
    first, total = (None, None) if state is None else (state[..., :-1], state[..., -1:])
    out, last = _sum(q, k, v, log_decay, first, reset, scale, size, True)
    weight, last_total = _sum(q, k, torch.ones_like(v[..., :1]), log_decay, total, reset, scale, size, True)
    nothing = weight.detach() == 0
    out = (out / weight.masked_fill(nothing, 1)).masked_fill(nothing, 0).to(q.dtype)
    return out.transpose(1, 2), torch.cat([last, last_total], -1)
