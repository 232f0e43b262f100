"""Linear attention by chunks, in plain torch: the matrix within a chunk, a recurrence from chunk to chunk.

Source: Hua et al. 2022 (2202.10447), section 3.2, and Sun et al. 2023 (2307.08621), equation 7, for the chunks; Yang
et al. 2023 (2312.06635), section 4, for a decay of each channel; Yang et al. 2024 (2406.06484), section 3.2, and its
sequel (2412.06464), section 3.3, for the delta rule: there by the inverse of a triangular matrix (the UT transform),
here by solving the system. Symbols as in `nondual.ops.linear_attention`; K chunks of T steps, t the step that reads, s
an earlier one, which was written; S the state before a chunk.

1. what is written      U = V; with β the solution of (I + strictly lower(β K Kᵀ ∘ decay)) (U, W) = (β V, β decay K)
2. from chunk to chunk  S ← (decay of the chunk) S + (K, decayed to the chunk's end)ᵀ (U - W S)
3. the state before     with β U - W S in place of U; out = (Q, decayed from the chunk's start) S
4. a chunk's own        out += (Q Kᵀ ∘ decay) U

Time and memory are linear in N. Nothing is divided by an exponential: each decay is the exponential of a difference of
sums of logs, taken from a later step to an earlier one, so that it is at most 1 where no log is above 0. The sums are
kept in float64: in float32 a small decay beside a large one would be lost.

Where each channel decays, Q Kᵀ ∘ decay is not a product of matrices, since the decay stands inside the sum over the
channels. Cut at any step c, it is one for the pairs with s <= c < t: (Q from c to t) (K from s to c)ᵀ. So the chunk is
halved, and each half again, until single steps are left (`by_halves`).

Differentiable by autograd, twice too, in forward mode, and under the transforms of torch.func.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.linear_attention.chunk_recurrence import pass_on
from nondual.ops.linear_attention.inputs import Inputs
from nondual.ops.linear_attention.resets import within_resets
from nondual.ops.ssd.chunked import any_length

CHUNK = 64


def linear_attention(given: Inputs) -> tuple[Tensor, Tensor]:
    """Every output and the last state.

    Args:
        given: what `nondual.ops.linear_attention.linear_attention` has checked; nothing in it is empty.

    Returns:
        out (B, H, N, Dv) in q's dtype, and the last state in float32 or better, in memory of its own.
    """
    with autocast_off(given.q.device.type):  # the products are sums, and stay as wide as they are
        out, S = within_resets(_linear_attention, given.in_full())
    return out.to(given.q.dtype), S


def _linear_attention(given: Inputs) -> tuple[Tensor, Tensor]:
    S = given.first_state()
    if not given.causal:
        S = S + given.k.mT @ given.v
        return given.q @ S, S
    length, chunk = given.q.shape[2], _chunk(given)
    q, k, v = (cut(x, chunk) for x in (given.q, given.k, given.v))  # (B, H, K, T, ·)
    masks = Masks(given.reset, chunk, q.device)
    decays = None if given.log_decay is None else Decays(given, chunk, masks, q.dtype)
    # --8<-- [start:chunks]
    # 1. what is written
    u, w = v, None
    if given.beta is not None:
        u, w = solve(k, v, cut(given.beta[..., None], chunk), decays, masks)
    # 2. from chunk to chunk: the state before each (B, H, K, D, Dv), and the last
    to_end = masks.until_end(k if decays is None else decays.to_end * k)
    whole = masks.whole(k) if decays is None else decays.whole
    before, S = pass_on(whole, to_end.mT @ u, S, to_end if w is not None else None, w)
    # 3. and 4. what each step reads, of the state before its chunk and of the chunk
    if w is not None:
        u = plus_product(u, w, -before)
    from_start = masks.from_start(q if decays is None else decays.from_start * q)
    out = plus_product(within(q, k, u, decays, masks), from_start, before)
    # --8<-- [end:chunks]
    out = out.flatten(2, 3)
    out = out.index_select(2, torch.arange(length, device=out.device)) if any_length(length) else out[:, :, :length]
    return out, S


def _chunk(given: Inputs) -> int:
    """How many steps of a chunk: no more than there are, and a power of two where each channel decays."""
    length, chunk = given.q.shape[2], given.chunk or CHUNK
    if not any_length(length):
        chunk = min(chunk, length)
    each_channel = given.log_decay is not None and given.log_decay.ndim == 4
    return 1 << (chunk - 1).bit_length() if each_channel else chunk


def cut(x: Tensor, chunk: int) -> Tensor:
    """(B, H, N, …) as (B, H, K, T, …), with zeros after the end: steps that write and read nothing."""
    length = x.shape[2]
    # In three chunks or more, the last ones of zeros: torch compiles a size of 1 for itself, and K - 1 is a size too.
    if any_length(length):
        step = torch.arange((length + 3 * chunk - 1) // chunk, device=x.device)[:, None] * chunk
        step = step + torch.arange(chunk, device=x.device)  # (K, T)
        after = (step >= length).view(*step.shape, *[1] * (x.ndim - 3))
        return x[:, :, step.clamp(max=length - 1)].masked_fill(after, 0)
    if missing := -length % chunk:
        x = F.pad(x, (*[0, 0] * (x.ndim - 3), 0, missing))
    return x.unflatten(2, (-1, chunk))


class Masks:
    """Which steps depend on which, given the resets. Without resets `visible` is the causal mask, and the other methods
    change nothing.

    visible: (T, T), or with resets (B, 1, K, T, T): True where step t depends on what step s wrote.
    """

    visible: Tensor
    sequence: Tensor | None = None

    def __init__(self, reset: Tensor | None, chunk: int, device: torch.device):
        self.visible = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
        if reset is not None:
            self.sequence = sequence = cut(reset[:, None], chunk).cumsum(-1)  # (B, 1, K, T), counted within each chunk
            self.visible = self.visible & (sequence[..., :, None] == sequence[..., None, :])

    def until_end(self, x: Tensor) -> Tensor:
        """x (B, H, K, T, …) with 0 at the steps that the state after the chunk does not depend on."""
        if self.sequence is None:
            return x
        return x.masked_fill((self.sequence != self.sequence[..., -1:])[..., None], 0)

    def from_start(self, x: Tensor) -> Tensor:
        """x (B, H, K, T, …) with 0 at the steps that do not depend on the state before the chunk."""
        return x if self.sequence is None else x.masked_fill((self.sequence > 0)[..., None], 0)

    def whole(self, x: Tensor) -> Tensor:
        """How much of the state before a chunk (…, K, 1, 1) is left after it, without decays: 1, or 0 with a reset."""
        if self.sequence is None:
            return x.new_ones(()).expand(1, 1, x.shape[2], 1, 1)
        return (self.sequence[..., -1:] == 0).to(x.dtype)[..., None]

    def pairs(self, x: Tensor) -> Tensor:
        """x (…, T, T) with 0 where step t does not depend on step s."""
        return x.tril() if self.sequence is None else x.masked_fill(~self.visible, 0)


def plus_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a @ b, each (B, H, K, ·, ·), without a tensor for the product."""
    return torch.baddbmm(out.flatten(0, 2), a.flatten(0, 2), b.flatten(0, 2)).view(out.shape)


class Decays:
    """The decays within each chunk, C being 1 or, where each channel decays, D. Each leading size may be 1.

    to_end: from each step to the end of its chunk (B, H, K, T, C).
    from_start: from the start of the chunk to each step (B, H, K, T, C).
    whole: of the whole chunk (B, H, K, C, 1).
    pairs: from s to t (B, H, K, T, T), 0 where t does not depend on s; None where each channel has its own.
    log: the sums of the logs from the start of the chunk to each step, in float64 (B, H, K, T, C).
    """

    to_end: Tensor
    from_start: Tensor
    whole: Tensor
    pairs: Tensor | None = None
    log: Tensor

    def __init__(self, given: Inputs, chunk: int, masks: Masks, dtype: torch.dtype):
        steps = given.steps()
        assert steps is not None
        each_step = steps.shape[2] != 1 or given.q.shape[2] == 1
        self.log = log = cut(steps.expand(-1, -1, given.q.shape[2], -1), chunk).cumsum(3)
        self.to_end = masks.until_end((log[..., -1:, :] - log).exp().to(dtype))
        self.from_start = masks.from_start(log.exp().to(dtype))
        self.whole = self.from_start[..., -1, :, None]
        if log.shape[-1] == 1:
            # One decay of each head is the same in every chunk; the first is a whole one, but for steps after the end.
            one = log if each_step or masks.sequence is not None else log[:, :, :1]
            between = (one - one.mT).to(dtype)
            self.pairs = between.masked_fill(~masks.visible, -torch.inf).exp()


def within(q: Tensor, k: Tensor, u: Tensor, decays: Decays | None, masks: Masks) -> Tensor:
    """What each step reads of its own chunk: (Q Kᵀ ∘ decay) U, (B, H, K, T, Dv)."""
    if decays is None:
        return masks.pairs(q @ k.mT) @ u
    if decays.pairs is None:
        return by_halves(q, k, u, decays.log, masks)
    return ((q @ k.mT) * decays.pairs) @ u


def solve(k: Tensor, v: Tensor, beta: Tensor, decays: Decays | None, masks: Masks) -> tuple[Tensor, Tensor]:
    """What each step of the delta rule writes is U - W S, where S is the state before the chunk.

        (I + strictly lower(β K Kᵀ ∘ decay)) (U, W) = (β V, β (decay from the chunk's start) K)

    Returns:
        U (B, H, K, T, Dv) and W (B, H, K, T, D).
    """
    own = beta * k
    lower = own @ k.mT
    pairs = None if decays is None else decays.pairs  # the door lets no decay of each channel in here
    lower = (masks.pairs(lower) if pairs is None else lower * pairs).tril(-1)
    own = masks.from_start(own if decays is None else decays.from_start * own)
    both = torch.cat([beta * v, own], -1)
    both = torch.linalg.solve_triangular(lower, both, upper=False, unitriangular=True)
    u, w = both.split([v.shape[-1], k.shape[-1]], -1)
    return u, w


# --8<-- [start:halves]
def by_halves(q: Tensor, k: Tensor, v: Tensor, log: Tensor, masks: Masks) -> Tensor:
    """What each step reads of its own chunk where every channel has its own decay: (B, H, K, T, Dv).

    Pairs of steps are taken by the cut that parts them: those of the two halves of the chunk, of the two halves of each
    half, and so on. From the last step before the cut both exponents go one way, and neither is above 0:

        q_t · decay(s, t) k_s = (q_t exp(log_t - log_cut)) · (k_s exp(log_cut - log_s))
    """
    out = (q * k).sum(-1, keepdim=True) * v  # a step and itself: nothing has decayed
    half = q.shape[3] // 2
    while half:
        first, later = (slice(None),) * 4 + (0,), (slice(None),) * 4 + (1,)
        q_, k_, v_, log_ = (x.unflatten(3, (-1, 2, half)) for x in (q, k, v, log))  # (…, halves, 2, half, ·)
        cut_ = log_[first][..., -1:, :]
        read = q_[later] * (log_[later] - cut_).exp().to(q.dtype)
        written = k_[first] * (cut_ - log_[first]).exp().to(q.dtype)
        weights = read @ written.mT
        if masks.sequence is not None:
            sequence = masks.sequence.unflatten(3, (-1, 2, half))
            weights = weights.masked_fill(sequence[later][..., :, None] != sequence[first][..., None, :], 0)
        more = weights @ v_[first]
        out = out + torch.stack([torch.zeros_like(more), more], 4).flatten(3, 5)
        half //= 2
    return out


# --8<-- [end:halves]
