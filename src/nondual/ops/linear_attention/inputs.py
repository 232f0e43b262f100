"""What passed the door of linear attention: what its engines take, checked and of one form."""

from typing import NamedTuple, TypeVarTuple, cast

import torch
from torch import Tensor

from nondual.ops.dtypes import accumulation_dtype

Given = TypeVarTuple("Given")  # each of them Tensor, or Tensor | None


class Inputs(NamedTuple):
    """The arguments of `nondual.ops.linear_attention.linear_attention`, which fit together; the engines take these.

    Attributes:
        q: queries (B, H, N, D).
        k: keys (B, G, M, D); M = N where causal.
        v: values (B, G, M, Dv).
        log_decay: (H,), (B, H, N) or (B, H, N, D); None for no decay.
        beta: write strengths (B, H, N), which make it the delta rule; None for a sum.
        normalise: divide by the sum of the weights, kept as one more column of the state.
        causal: no position sees a later one.
        scale: factor on q · k.
        state: the state before the first step, (B, H, D, Dv), or (B, H, D, Dv + 1) with `normalise`; None for zero.
        reset: (B, N), True where a sequence begins and all that came before is forgotten.
        chunk: steps of a chunk; None for the engine's own.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    normalise: bool
    causal: bool
    scale: float
    state: Tensor | None
    reset: Tensor | None
    chunk: int | None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but the options."""
        return (self.q, self.k, self.v, self.log_decay, self.beta, self.state, self.reset)

    def in_full(self) -> "Inputs":
        """The same with q, k, v, beta and state in float32 or better, q times `scale`, a head of k and v for each of q,
        and with the column of ones that `normalise` adds to v. log_decay stays as it is."""
        q, k, v, beta, state = wide(self.q, self.k, self.v, self.beta, self.state)
        share = q.shape[1] // k.shape[1]
        if share > 1:
            k, v = (x.repeat_interleave(share, 1) for x in (k, v))
        if self.scale != 1:
            q = q * self.scale
        if self.normalise:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return self._replace(q=q, k=k, v=v, beta=beta, state=state)

    def first_state(self) -> Tensor:
        """The state before the first step, zero where there is none: of the dtype and width that `in_full` gives v."""
        if self.state is not None:
            return self.state
        return self.q.new_zeros(*self.q.shape[:2], self.k.shape[-1], self.v.shape[-1])

    def steps(self) -> Tensor | None:
        """log_decay as (1 or B, H, N or 1, D or 1), in float64, and -1000 at least: what is below has an exponential of
        0 in every dtype, and -inf less -inf would be NaN. The sums of these logs are kept in float64, so that small
        ones are not lost beside large ones."""
        if self.log_decay is None:
            return None
        log = self.log_decay.double().clamp(min=LOWEST_LOG)
        return log[None, :, None, None] if log.ndim == 1 else log[..., None] if log.ndim == 3 else log


LOWEST_LOG = -1000.0


def wide(x: Tensor, *rest: *Given) -> tuple[Tensor, *Given]:
    """All of them in float32, or in float64 where x is, as states and sums are."""
    dtype = accumulation_dtype(x.dtype)
    given = cast("tuple[Tensor | None, ...]", (x, *rest))
    return cast("tuple[Tensor, *Given]", tuple(None if v is None else v.to(dtype) for v in given))


def normalised(out: Tensor, normalise: bool) -> Tensor:
    """With `normalise`, out (…, Dv + 1) divided by its last column, the sum of the weights: (…, Dv). 0, without a
    gradient, where that sum is 0."""
    if not normalise:
        return out
    total = out[..., -1:]
    nothing = total.detach() == 0
    return (out[..., :-1] / total.masked_fill(nothing, 1)).masked_fill(nothing, 0)
