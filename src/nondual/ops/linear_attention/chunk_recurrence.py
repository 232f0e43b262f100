"""The state carried from chunk to chunk, as one operator of torch: a program compiled for one length serves all.

    S_{k+1} = whole_k S_k + added_k                          for a sum
    S_{k+1} = whole_k S_k + added_k - X_kᵀ (Y_k S_k)         for the delta rule

Source: Yang et al. 2024 (2406.06484), section 3.2. Symbols: B batch, H heads, K chunks of T steps, D width of keys, Dv
of values. For the delta rule X holds the keys, with their decay to the chunk's end, and Y the W of `chunked.solve`, so
that X_kᵀ (U_k - Y_k S_k) is what the chunk writes, and added_k = X_kᵀ U_k.
"""

import torch
from torch import Tensor

from nondual.ops.impl import refuses_transforms


def pass_on(
    whole: Tensor, added: Tensor, initial: Tensor, x: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state before every chunk (B, H, K, D, Dv), and after the last (B, H, D, Dv).

    Differentiable any number of times, in forward mode, and under the transforms of torch.func. What cannot take an
    operator gets its operations one by one.

    Args:
        whole: the decay of each whole chunk, (B, H, K, 1, 1), or (B, H, K, D, 1) where each channel decays; B and H may
            be 1.
        added: (B, H, K, D, Dv).
        initial: the state before the first chunk (B, H, D, Dv).
        x: X (B, H, K, T, D), with y; None for a sum.
        y: Y (B, H, K, T, D).
    """
    if not refuses_transforms(whole, added, initial, x, y):
        return _pass_on(whole, added, initial, x, y, False)
    S, before = initial, []
    for k in range(added.shape[2]):
        before.append(S)
        X, Y = (None if v is None else v[:, :, k] for v in (x, y))
        S = _after(S, whole[:, :, k], added[:, :, k], X, Y)
    return torch.stack(before, 2), S


def _after(S: Tensor, whole: Tensor, added: Tensor, x: Tensor | None, y: Tensor | None) -> Tensor:
    after = torch.addcmul(added, whole, S)
    return after if x is None or y is None else after - x.mT @ (y @ S)


@torch.library.custom_op("nondual::linear_attention_pass_on", mutates_args=())
def _pass_on(
    whole: Tensor, added: Tensor, initial: Tensor, x: Tensor | None, y: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """From the first chunk to the last, or in reverse: `before` is then what comes before a chunk on that way."""
    before, chunks = torch.empty_like(added, memory_format=torch.contiguous_format), range(added.shape[2])
    S = initial.clone()
    for k in reversed(chunks) if reverse else chunks:
        before[:, :, k] = S
        X, Y = (None if v is None else v[:, :, k] for v in (x, y))
        S = _after(S, whole[:, :, k], added[:, :, k], X, Y)
    return before, S


@_pass_on.register_fake
def _(whole, added, initial, x, y, reverse):
    return added.new_empty(added.shape), initial.new_empty(initial.shape)


def _save(ctx, inputs, output):
    whole, _, _, x, y, ctx.reverse = inputs
    ctx.save_for_backward(whole, x, y, output[0])


def _differentiate(ctx, d_before, d_last):
    """The gradient of added_k is the same recurrence from the other end, with X and Y in each other's place:
    e_k = ∂S_k + whole_k e_{k+1} - Y_kᵀ (X_k e_{k+1}), and e_{k+1} is the gradient of added_k."""
    whole, x, y, before = ctx.saved_tensors
    e, d_initial = _pass_on(whole, d_before, d_last, y, x, not ctx.reverse)
    d_whole = d_x = d_y = None
    if ctx.needs_input_grad[0]:
        d_whole = (before * e).sum_to_size(whole.shape)
    if x is not None and y is not None:
        d_x, d_y = -(y @ before) @ e.mT, -(x @ e) @ before.mT
    return d_whole, e, d_initial, d_x, d_y, None


_pass_on.register_autograd(_differentiate, setup_context=_save)
