"""State space duality by blocks, in plain torch: attention within a chunk, a recurrence from chunk to chunk.

Source: Dao and Gu 2024 (2405.21060), section 6 and Listing 1. Symbols: B batch, L steps, H heads = G groups of R heads
that share B and C, P a head's channels, N states; K chunks of T steps. In the einsums: k chunk, t output step, s input
step.

The matrix of `ssd_matrix` is cut into T x T blocks. Those on its diagonal are multiplied out (T² for each chunk, so
that time and memory are linear in L); those below have rank N, and pass through the state:

1. within a chunk     y = (C Bᵀ ∘ fade) Δx
2. a chunk's state    S = Σ_s exp(what is left of the chunk after s) Δ_s x_s B_sᵀ
3. from chunk to chunk  h ← exp(the whole chunk) h + S
4. what was before    y += exp(the chunk up to t) h C_t

Nothing is divided by an exponential. A fade is the exponential of a difference of two sums, masked before it is taken,
so that nothing overflows; the sums are kept in float64, so that the difference is exact to float32 where strong and
weak steps meet in one chunk.
Differentiable by autograd, twice too.
"""

import torch
from torch import Tensor

from nondual.ops.selective_scan.reference import step_length
from nondual.ops.ssd.reference import skip_and_gate, wide

CHUNK = 64


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
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Every output and the last state; the input is taken as `nondual.ops.ssd` has checked it, and is not empty.

    Args:
        x: input (B, L, H, P).
        delta: step lengths (B, L, H), before bias and softplus.
        A: (H,).
        B: (B, L, G, N).
        C: (B, L, G, N).
        D: skip (H,) or (H, P).
        z: gate (B, L, H, P), before its SiLU.
        delta_bias: (H,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, H, P, N); zero where left out.
        reset: (B, L), True where a sequence begins and all that came before is forgotten.
        chunk: T, steps of a chunk.

    Returns:
        y (B, L, H, P) in x's dtype, and the last state (B, H, P, N) in float32 or better.
    """
    if torch.amp.is_autocast_available(x.device.type):  # the products below are sums, and stay as wide as they are
        with torch.autocast(x.device.type, enabled=False):
            return _ssd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk)
    return _ssd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk)


def _ssd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk):
    dtype, (x, delta, A, B, C, D, z, delta_bias, state) = x.dtype, wide(x, delta, A, B, C, D, z, delta_bias, state)
    delta = step_length(delta, delta_bias, delta_softplus)
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    chunk = min(chunk, length)
    h = x.new_zeros(batch, heads, width, states) if state is None else state
    sight = Sight(reset, length, chunk) if reset is not None else None

    # twice (B, K, G, R, T), then (B, K, G, R, T, P), and twice (B, K, G, T, N)
    rates, step = (cut(v, chunk).movedim(2, -1).unflatten(2, (groups, -1)) for v in (log_fade(delta, A), delta))
    v = cut(x, chunk).movedim(2, -2).unflatten(2, (groups, -1))
    B, C = (cut(w, chunk).movedim(2, -2) for w in (B, C))

    # --8<-- [start:blocks]
    passed = fade_since_start(rates, sight)  # (B, K, G, R, T)
    scores = (C @ B.mT)[:, :, :, None]  # (B, K, G, 1, T, T): one for all heads of a group
    y = weights(scores, passed, step, sight) @ v  # 1. within a chunk
    rest = (passed[..., -1:] - passed).exp().to(x.dtype) * step
    S = kept(rest[..., None] * v, sight).mT @ kept(B, sight)[:, :, :, None]  # 2. a chunk's state (B, K, G, R, P, N)
    whole = passed[..., -1].exp().to(x.dtype).flatten(2)[..., None, None]  # (B, K, H, 1, 1)
    before = []
    for k, (whole_k, S_k) in enumerate(zip(whole.unbind(1), S.flatten(2, 3).unbind(1))):  # 3. from chunk to chunk
        before.append(h)
        h = S_k + whole_k * h if sight is None else S_k + (whole_k * h).masked_fill(~sight.crosses[:, k], 0)
    before = torch.stack(before, 1).unflatten(2, (groups, -1))  # (B, K, G, R, P, N)
    inter = passed.exp().to(x.dtype)[..., None] * (C[:, :, :, None] @ before.mT)  # 4. what was before
    y = y + (inter if sight is None else inter.masked_fill(~sight.reached, 0))
    # --8<-- [end:blocks]

    y = y.flatten(2, 3).movedim(2, -2).flatten(1, 2)[:, :length]
    return skip_and_gate(y, x, D, z).to(dtype), h


def cut(v: Tensor, chunk: int) -> Tensor:
    """(B, L, …) as (B, K, T, …), with zeros after the end: steps of no length, in which nothing happens."""
    missing = -v.shape[1] % chunk
    if missing:
        v = torch.cat([v, v.new_zeros(v.shape[0], missing, *v.shape[2:])], 1)
    return v.unflatten(1, (-1, chunk))


FORGETS_ALL = -1000.0


def log_fade(delta: Tensor, A: Tensor) -> Tensor:
    """Δ A in float64 (B, L, H). Below -1000 its exponential is 0 in every dtype, and a smaller number would only cost
    the sums their last places."""
    return (delta.double() * A.double()).clamp(min=FORGETS_ALL)


class Sight:
    """What a reset leaves in sight: `start` is the step where the sequence of each step begins, counted from the start
    of its chunk, below 0 where that lies in an earlier one."""

    def __init__(self, reset: Tensor, length: int, chunk: int):
        at = torch.arange(length, device=reset.device)
        start = torch.where(reset, at, -1).cummax(1).values
        within = torch.arange(chunk, device=reset.device)
        start = torch.cat([start, start[:, -1:].expand(-1, -length % chunk)], 1).unflatten(1, (-1, chunk))
        start = start - torch.arange(start.shape[1], device=reset.device)[:, None] * chunk  # (B, K, T)
        self.seen = (within >= start[..., None]) & (within <= within[:, None])  # (B, K, t, s)
        self.seen = self.seen[:, :, None, None]
        self.kept = (within >= start[..., -1:])[:, :, None, :, None]  # (B, K, 1, T, 1): reaches the chunk's end
        self.reached = (start < 0)[:, :, None, None, :, None]  # by the state before the chunk
        self.crosses = (start[..., -1] < 0)[:, :, None, None, None]  # (B, K, 1, 1, 1): the state, the whole chunk


def fade_since_start(rates: Tensor, sight: Sight | None) -> Tensor:
    """The log of the fade from the start of the chunk, or of the sequence if that is later, to each step (…, T)."""
    if sight is None:
        return rates.cumsum(-1)
    return rates[..., None, :].masked_fill(~sight.seen, 0).sum(-1)  # a cumsum would carry a NaN across a reset


def weights(scores: Tensor, passed: Tensor, step: Tensor, sight: Sight | None) -> Tensor:
    """What of input step s is in output step t (…, t, s): 0 where s is later than t, or of another sequence.

    Masked before the exponential, which then does not overflow, and again at the end, for a NaN times 0.
    """
    chunk = passed.shape[-1]
    seen = torch.ones(chunk, chunk, dtype=torch.bool, device=passed.device).tril() if sight is None else sight.seen
    between = (passed[..., :, None] - passed[..., None, :]).to(scores.dtype).masked_fill(~seen, -torch.inf)
    return (scores * between.exp() * step[..., None, :]).masked_fill(~seen, 0)


def kept(v: Tensor, sight: Sight | None) -> Tensor:
    """v (B, K, G, …, T, ·) with zeros, not NaN times 0, at the steps that the end of their chunk has forgotten."""
    if sight is None:
        return v
    return v.masked_fill(~(sight.kept if v.ndim == 5 else sight.kept[:, :, :, None]), 0)
