"""Flash attention's kernels as operators of torch, with their backward pass, and the function that calls them.

Each pass is a `custom_op` and not a `triton_op`: that one traces into the launch, which Triton's interpreter cannot
follow, and then what runs on a GPU would not be what is tested without one.
"""

import math

import torch
from torch import Tensor

from nondual.ops.flash_attention.triton.launch import (
    Forget,
    empty_as,
    empty_outputs,
    launch_backward,
    launch_decode,
    launch_forward,
)
from nondual.ops.flash_attention.triton.tiles import splits_of


@torch.library.custom_op("nondual::flash_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if splits := splits_of(q, k, window):
        return launch_decode(q, k, v, causal, window, scale, splits)
    return launch_forward(q, k, v, causal, window, scale)


@_forward.register_fake
def _(q, k, v, causal, window, scale):
    return empty_outputs(q, v)


@torch.library.custom_op("nondual::flash_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor,
    causal: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_backward(d_out, d_total, q, k, v, out, top, total, causal, window, scale)[:3]


@_backward.register_fake
def _(d_out, d_total, q, k, v, out, top, total, causal, window, scale):
    return tuple(empty_as(x, *x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _differentiate(ctx, d_out, d_top, d_total):
    """Only the sum of top and total is used, so both have the same gradient: one of them is enough."""
    return *_backward(d_out, d_total, *ctx.saved_tensors, *ctx.options), None, None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        "flash_attention(impl='triton') has no second derivative; "
        "nondual.ops.attention.attention(impl='reference') has one"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


# --- with forget gates: operators of their own, so that those without are as they were -------------------------------


@torch.library.custom_op("nondual::forgetting_attention", mutates_args=())
def _forgetting(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, first: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if splits := splits_of(q, k, window):
        return launch_decode(q, k, v, True, window, scale, splits, (sums, first))
    return launch_forward(q, k, v, True, window, scale, (sums, first))


@_forgetting.register_fake
def _(q, k, v, sums, first, window, scale):
    return empty_outputs(q, v)


@torch.library.custom_op("nondual::forgetting_attention_backward", mutates_args=())
def _forgetting_backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, first: Tensor, out: Tensor,
    top: Tensor, total: Tensor, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dc = launch_backward(d_out, d_total, q, k, v, out, top, total, True, window, scale, (sums, first))
    assert dc is not None  # there are gates
    return dq, dk, dv, dc


@_forgetting_backward.register_fake
def _(d_out, d_total, q, k, v, sums, first, out, top, total, window, scale):
    return *(empty_as(x, *x.shape) for x in (q, k, v)), torch.empty(sums.shape, dtype=sums.dtype, device=sums.device)


def _save_gates(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _differentiate_gates(ctx, d_out, d_top, d_total):
    return *_forgetting_backward(d_out, d_total, *ctx.saved_tensors, *ctx.options), None, None, None


_forgetting.register_autograd(_differentiate_gates, setup_context=_save_gates)
_forgetting_backward.register_autograd(_refuse)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float = 1.0,
    return_lse: bool = True,
    forget: Forget | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention and its log-sum-exp by the kernels; `nondual.ops.flash_attention` has checked the inputs.

    Args:
        q: queries (B, H, N, D), float16, bfloat16 or float32, in any layout; D at most 256.
        k: keys (B, G, M, D).
        v: values (B, G, M, Dv), Dv at most 256.
        causal: each query sees its own position and those before, aligned at the end.
        window: each query sees the last `window` keys, its own included; implies causal.
        scale: factor on q · k.
        return_lse: return the log-sum-exp; otherwise None in its place.
        forget: with causal, c in float64 and the first key seen, both (B, H, M), as
            `nondual.ops.flash_attention.forget.sums_of` makes them of the gates.

    Returns:
        out (B, H, N, Dv) in q's dtype, and lse (B, H, N), natural, in float32, or None.

    Raises:
        RuntimeError: when differentiated twice.
    """
    if scale <= 0:  # the kernels take a row's maximum before they multiply by scale, which is right if scale > 0
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if forget is None:
        out, top, total = _forward(q, k, v, causal or window is not None, window or 0, float(scale))
    else:
        out, top, total = _forgetting(q, k, v, *forget, window or 0, float(scale))
    return out, (top + total) * math.log(2) if return_lse else None
