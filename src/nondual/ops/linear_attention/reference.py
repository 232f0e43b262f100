"""Linear attention in plain torch, one step after another: slow, in any floating dtype, wherever torch runs.

Source: Katharopoulos et al. 2020 (2006.16236), section 3.4, for the recurrence; Sun et al. 2023 (2307.08621), equation
6, for the decay; Yang et al. 2023 (2312.06635), equation 3, for a decay of each channel; Schlag, Irie and Schmidhuber
2021 (2102.11174), equations 20 to 25, for the delta rule, and Yang, Kautz and Hatamizadeh 2024 (2412.06464), equation
10, for it with a decay. Symbols as in `nondual.ops.linear_attention`.

Where we differ from the papers: our state S is (D, Dv), the transpose of Schlag's and of Yang's, whose S is (Dv, D).
Differentiable by autograd, twice too, and in forward mode; memory grows with B·H·N·D·Dv in the backward.
"""

import torch
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.linear_attention.inputs import Inputs, normalised


def linear_attention(given: Inputs) -> tuple[Tensor, Tensor]:
    """Every output and the last state.

    Args:
        given: what `nondual.ops.linear_attention.linear_attention` has checked; its chunk means nothing here.

    Returns:
        out (B, H, N, Dv) in q's dtype, and the last state in float32 or better, in memory of its own.
    """
    with autocast_off(given.q.device.type):
        out, S = _linear_attention(given.in_full())
    return normalised(out, given.normalise).to(given.q.dtype), S


def _linear_attention(given: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, beta, reset, S = given.q, given.k, given.v, given.beta, given.reset, given.first_state()
    if not given.causal:  # one sum, which every query reads
        S = S + k.mT @ v
        return q @ S, S
    decay = None if (log := given.steps()) is None else log.exp().to(q.dtype).expand(-1, -1, q.shape[2], -1)
    outputs = []
    # unbind, not q[:, :, t]: the gradient of a slice is as long as what it was cut from, and N of them make N²
    # --8<-- [start:recurrence]
    for t, (q_t, k_t, v_t) in enumerate(zip(*(x.unbind(2) for x in (q, k, v)))):
        if reset is not None:
            S = S.masked_fill(reset[:, t, None, None, None], 0)
        if decay is not None:
            S = decay[:, :, t, :, None] * S  # (B, H, D, Dv)
        if beta is not None:  # write the difference from what the key already reads
            v_t = beta[:, :, t, None] * (v_t - (k_t[..., None] * S).sum(-2))
        S = S + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None] * S).sum(-2))
    # --8<-- [end:recurrence]
    return (torch.stack(outputs, 2), S) if outputs else (torch.zeros_like(v), S.clone())
