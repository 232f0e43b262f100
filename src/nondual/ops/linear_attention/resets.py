"""A NaN must not pass a reset, and 0 times NaN is NaN: how the engines made of matrix products keep it from doing so.

A product of matrices multiplies what a mask has set to 0, too. So where sequences are packed, the inputs go in with 0
for each NaN or inf, and the NaN is put back into the outputs that depend on it: those of the later steps of its own
sequence, in its own channel for a value, in all of them for a key, a decay or a write strength.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nondual.ops.linear_attention.inputs import Inputs, normalised


def within_resets(run: Callable[[Inputs], tuple[Tensor, Tensor]], given: Inputs) -> tuple[Tensor, Tensor]:
    """What `run` computes of these inputs, with every NaN or inf held within its own sequence.

    Args:
        run: from inputs in full (`Inputs.in_full`) to out and state, both with the normaliser's column where there is
            one. It keeps sequences apart by masks, as far as numbers go.
        given: in full. Without a reset they go to `run` as they are.

    Returns:
        out (B, H, N, Dv), normalised if it is to be, and the state.
    """
    if given.reset is None:
        out, last = run(given)
        return normalised(out, given.normalise), last
    q, k, v, log_decay, beta, state = (
        given.q,
        given.k,
        given.v,
        given.log_decay,
        given.beta,
        given.state,
    )
    # what spoils every channel from a step on: (B, H, N)
    bad = _spoilt(k).any(-1)
    if log_decay is not None and log_decay.ndim > 1:
        spoilt = log_decay.detach().isnan()
        bad = bad | (spoilt.any(-1) if log_decay.ndim == 4 else spoilt)
    if beta is not None:
        bad = bad | _spoilt(beta)
    bad = (bad[..., None] | _spoilt(v)).to(torch.int32)  # (B, H, N, Dv)
    before = None if state is None else _spoilt(state).any(2).to(torch.int32)  # (B, H, Dv)
    clean = given._replace(
        q=_clean(q),
        k=_clean(k),
        v=_clean(v),
        log_decay=None if log_decay is None else log_decay.masked_fill(log_decay.detach().isnan(), 0),
        beta=None if beta is None else _clean(beta),
        state=None if state is None else _clean(state),
    )
    out, last = run(clean)
    reached = since_reset(bad, before, given.reset) > 0
    nothing = out.new_zeros(())
    last = last + torch.where(reached[:, :, -1, None], torch.nan, nothing)
    reached = reached | _spoilt(q).any(-1, keepdim=True)
    if given.normalise:  # whatever the normaliser is reached by reaches every channel
        reached = reached[..., :-1] | reached[..., -1:]
    return normalised(out, given.normalise) + torch.where(reached, torch.nan, nothing), last


def since_reset(counts: Tensor, before: Tensor | None, reset: Tensor) -> Tensor:
    """The sum of `counts` (B, H, N, C) from the start of each step's own sequence to the step.

    What comes before the first reset starts with `before` (B, H, C).
    """
    total = counts.cumsum(2)
    index = torch.arange(1, reset.shape[1] + 1, device=reset.device)
    start = torch.where(reset, index, 0).cummax(1).values  # (B, N): 1 + where the sequence began, or 0
    excluded = torch.cat([torch.zeros_like(total[:, :, :1]), total], 2)  # excluded[t] is the sum of those before t
    where = (start - 1).clamp(min=0)[:, None, :, None].expand(-1, total.shape[1], -1, total.shape[3])
    total = total - excluded.gather(2, where)
    if before is not None:
        total = total + before[:, :, None] * (start == 0)[:, None, :, None]
    return total


def _spoilt(x: Tensor) -> Tensor:
    return ~x.detach().isfinite()


def _clean(x: Tensor) -> Tensor:
    return x.masked_fill(_spoilt(x), 0)
