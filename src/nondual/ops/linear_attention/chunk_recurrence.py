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


def pass_on(whole: Tensor, added: Tensor, initial: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """The state before every chunk and after the last (B, H, K+1, D, Dv).

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
    S, states = initial, [initial]
    for k in range(added.shape[2]):
        S = _next(S, whole[:, :, k], added[:, :, k], *(None if v is None else v[:, :, k] for v in (x, y)))
        states.append(S)
    return torch.stack(states, 2)


def _next(S: Tensor, whole: Tensor, added: Tensor, x: Tensor | None, y: Tensor | None) -> Tensor:
    if x is None or y is None:
        return torch.addcmul(added, whole, S)
    return torch.addcmul(added, whole, S) - x.mT @ (y @ S)


@torch.library.custom_op("nondual::linear_attention_pass_on", mutates_args=())
def _pass_on(
    whole: Tensor, added: Tensor, initial: Tensor, x: Tensor | None, y: Tensor | None, reverse: bool
) -> Tensor:
    """From the first chunk to the last, or in reverse: then `initial` comes after the last chunk."""
    chunks = added.shape[2]
    S = added.new_empty(*added.shape[:2], chunks + 1, *added.shape[3:])
    S[:, :, chunks if reverse else 0] = initial
    for k in reversed(range(chunks)) if reverse else range(chunks):
        before, after = (S[:, :, k + 1], S[:, :, k]) if reverse else (S[:, :, k], S[:, :, k + 1])
        torch.addcmul(added[:, :, k], whole[:, :, k], before, out=after)
        if x is not None and y is not None:
            after -= x[:, :, k].mT @ (y[:, :, k] @ before)
    return S


@_pass_on.register_fake
def _(whole, added, initial, x, y, reverse):
    return added.new_empty(*added.shape[:2], added.shape[2] + 1, *added.shape[3:])


def _save(ctx, inputs, output):
    whole, _, _, x, y, ctx.reverse = inputs
    ctx.save_for_backward(whole, x, y, output)


def _differentiate(ctx, d_S):
    """The gradient e_{k+1} of added_k is the same recurrence from the other end, with X and Y in each other's place:
    e_k = ∂S_k + whole_k e_{k+1} - Y_kᵀ (X_k e_{k+1})."""
    whole, x, y, S = ctx.saved_tensors
    if ctx.reverse:
        d_out, d_end, before = d_S[:, :, 1:], d_S[:, :, 0], S[:, :, 1:]
    else:
        d_out, d_end, before = d_S[:, :, :-1], d_S[:, :, -1], S[:, :, :-1]
    e = _pass_on(whole, d_out, d_end, y, x, not ctx.reverse)
    e, d_initial = (e[:, :, :-1], e[:, :, -1]) if ctx.reverse else (e[:, :, 1:], e[:, :, 0])
    d_whole = d_x = d_y = None
    if ctx.needs_input_grad[0]:
        d_whole = (before * e).sum_to_size(whole.shape)
    if x is not None and y is not None:
        d_x, d_y = -(y @ before) @ e.mT, -(x @ e) @ before.mT
    return d_whole, e, d_initial, d_x, d_y, None


_pass_on.register_autograd(_differentiate, setup_context=_save)
