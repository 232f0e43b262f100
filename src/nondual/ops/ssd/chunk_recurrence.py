"""The state carried from chunk to chunk, as one operator of torch: a program compiled for one length serves all.

    h_{k+1} = growth_k (decay_k h_k + added_k)

Source: Dao and Gu 2024 (2405.21060), section 6, step 3. Symbols: B batch, K chunks, H heads = G groups of R heads, P a
head's channels, N states.
"""

import torch
from torch import Tensor

from nondual.ops.impl import refuses_transforms
from nondual.ops.linear_recurrence import doubling


def pass_on(decay: Tensor, growth: Tensor, added: Tensor, initial: Tensor, forgets: Tensor | None) -> Tensor:
    """The state before every chunk and after the last (B, K+1, H, P, N).

    Differentiable any number of times, in forward mode, and under the transforms of torch.func. What cannot take an
    operator gets its operations one by one.

    Args:
        decay: the decay of each whole chunk, without the factor `growth` (B, K, 1, G, R, 1).
        growth: that factor, which is 1 unless the state grows; no gradient is taken of it (B, K, 1, G, R, 1).
        added: what each chunk adds, without that factor (B, K, G, R, P, N).
        initial: the state before the first chunk (B, H, P, N).
        forgets: True where nothing is left of the state before the chunk, not even a NaN (B, K, 1).
    """
    decay, growth, added = decay.flatten(2), growth.flatten(2), added.flatten(2, 3)  # (B, K, H) twice, (B, K, H, P, N)
    forgets = None if forgets is None else forgets.squeeze(-1)
    if torch.onnx.is_in_onnx_export():  # ONNX has no such operator, and no loop of a length of its own
        a, b = (decay * growth)[..., None, None], growth[..., None, None] * added
        return torch.cat([initial[:, None], doubling(a, b, initial)], 1)
    if not refuses_transforms(decay, growth, added, initial, forgets):
        return _pass_on(decay, growth, added, initial, forgets, False)
    h, states = initial, [initial]
    for k, (decay_k, growth_k) in enumerate(zip(*(v[..., None, None].unbind(1) for v in (decay, growth)))):
        h = h if forgets is None else h.masked_fill(forgets[:, k, None, None, None], 0)
        h = growth_k * (decay_k * h + added[:, k])
        states.append(h)
    return torch.stack(states, 1)


@torch.library.custom_op("nondual::ssd_pass_on", mutates_args=())
def _pass_on(
    decay: Tensor, growth: Tensor, added: Tensor, initial: Tensor, forgets: Tensor | None, reverse: bool
) -> Tensor:
    """From the first chunk to the last, or in reverse: then `initial` comes after the last chunk."""
    chunks = added.shape[1]
    h = added.new_empty(added.shape[0], chunks + 1, *added.shape[2:])
    grows = growth.device.type != "cpu" or bool((growth != 1).any())  # on a GPU, reading the answer would wait
    h[:, chunks if reverse else 0] = initial
    for k in reversed(range(chunks)) if reverse else range(chunks):
        before, after = (h[:, k + 1], h[:, k]) if reverse else (h[:, k], h[:, k + 1])
        if forgets is not None:
            before = before.masked_fill(forgets[:, k, None, None, None], 0)
        torch.addcmul(added[:, k], decay[:, k, :, None, None], before, out=after)
        if grows:
            after *= growth[:, k, :, None, None]
    return h


@_pass_on.register_fake
def _(decay, growth, added, initial, forgets, reverse):
    return added.new_empty(added.shape[0], added.shape[1] + 1, *added.shape[2:])


def _save(ctx, inputs, output):
    decay, growth, _, _, forgets, ctx.reverse = inputs
    ctx.save_for_backward(decay, growth, forgets, output)


def _differentiate(ctx, d_h):
    """The gradient e_k of added_k is the same recurrence from the other end: e_k = growth_k (∂h_{k+1} + decay_{k+1}
    e_{k+1})."""
    decay, growth, forgets, h = ctx.saved_tensors
    one = torch.ones_like(growth[:, :1])
    if ctx.reverse:
        shifted, d_out, d_end = torch.cat([growth[:, 1:], one], 1), d_h[:, 1:], d_h[:, 0] * growth[:, 0, :, None, None]
    else:
        shifted, d_out = torch.cat([one, growth[:, :-1]], 1), d_h[:, :-1]
        d_end = d_h[:, -1] * growth[:, -1, :, None, None]
    e = _pass_on(decay, shifted, d_out, d_end, forgets, not ctx.reverse)
    e, d_initial = (e[:, :-1], e[:, -1]) if ctx.reverse else (e[:, 1:], e[:, 0])
    d_decay = None
    if ctx.needs_input_grad[0]:
        h = h[:, 1:] if ctx.reverse else h[:, :-1]
        h = h if forgets is None else h.masked_fill(forgets[..., None, None, None], 0)
        d_decay = torch.einsum("bkhpn,bkhpn->bkh", h, e)
    return d_decay, None, e, d_initial, None, None


_pass_on.register_autograd(_differentiate, setup_context=_save)
