"""State space duality by blocks, in plain torch: attention within a chunk, a recurrence from chunk to chunk.

Source: Dao and Gu 2024 (2405.21060), section 6 and Listing 1. Symbols: B batch, L steps, H heads = G groups of R heads
that share B and C, P a head's channels, N states; K chunks of T steps. In the einsums: k chunk, t output step, s input
step.

The matrix of `ssd_matrix` is cut into T x T blocks. Those on its diagonal are multiplied out (T² for each chunk, so
that time and memory are linear in L); those below have rank N, and pass through the state:

1. within a chunk       y = (C Bᵀ ∘ decay) Δx
2. a chunk's state      S = Σ_s (decay from s to the chunk's end) Δ_s x_s B_sᵀ
3. from chunk to chunk  h ← (decay of the whole chunk) h + S
4. the state before     y += (decay from the chunk's start to t) h C_t

Nothing is divided by an exponential. A decay is the exponential of a difference of two sums, masked before it is taken;
the sums are kept in float64, so that the difference is exact to float32 where strong and weak steps meet in one chunk.
Where A > 0 the "decays" are above 1 and can exceed float32: `log_growth` keeps a factor of up to e^60 out of the
products, so that infinity times an input of 0 does not become NaN.

NaN and inf go where they go in the recurrence, and no further: in x to the later outputs of that channel, in Δ, B and
C to later outputs of that head or group, and never past a reset. The same holds for the gradients, but a NaN in z or in
the incoming gradient can reach any step of its own chunk. That is why each product is masked on both sides: 0 times NaN
is NaN.

Step 3 is `pass_on`, in chunk_recurrence.py. Differentiable by autograd, twice too, in forward mode, and under the
transforms of torch.func.
"""

import math

import torch
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.discretize import step_length
from nondual.ops.ssd.chunk_recurrence import pass_on
from nondual.ops.ssd.inputs import Inputs
from nondual.ops.ssd.reference import skip_and_gate, wide

CHUNK = 64


def ssd(given: Inputs) -> tuple[Tensor, Tensor]:
    """Every output and the last state.

    Args:
        given: what `nondual.ops.ssd.ssd` has checked; x must not be empty.

    Returns:
        y (B, L, H, P) in x's dtype, and the last state (B, H, P, N) in float32 or better, in memory of its own.
    """
    with autocast_off(given.x.device.type):  # the products are sums, and stay as wide as they are
        return _ssd(given)


def _ssd(given: Inputs) -> tuple[Tensor, Tensor]:
    x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk = given
    dtype, (x, delta, A, B, C, D, z, delta_bias, state) = x.dtype, wide(x, delta, A, B, C, D, z, delta_bias, state)
    delta = step_length(delta, delta_bias, delta_softplus)
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    chunk = chunk or CHUNK
    if not any_length(length):
        chunk = min(chunk, length)
    initial = x.new_zeros(batch, heads, width, states) if state is None else state
    masks = Masks(reset, chunk, x.device)

    rates = cut(log_decay(delta, A), chunk).movedim(2, -1).unflatten(2, (groups, -1))  # (B, K, G, R, T)
    v = cut(delta[..., None] * x, chunk).unflatten(3, (groups, -1))  # (B, K, T, G, R, P)
    B, C = cut(B, chunk), cut(C, chunk)  # (B, K, T, G, N)

    # --8<-- [start:blocks]
    decays = Decays(rates, masks, v)
    # 1. within a chunk: attention, whose weights are C_t · B_s times the decay from s to t
    y = multiply(weights(C, B, decays, masks), v, masks)  # (B, K, T, G, R, P)
    # 2. a chunk's state: its inputs, each with the decay from its step to the chunk's end
    inputs, keys = masks.until_end(decays.to_end * v), masks.until_end(B)
    S = torch.einsum("bktgrp,bktgn->bkgrpn", inputs, keys)
    # 3. from chunk to chunk: h <- (decay of the whole chunk) h + S; h is (B, K+1, H, P, N)
    h = pass_on(decays.whole, decays.growth[:, :, -1:], S, initial, masks.any_reset)
    # 4. the state before a chunk, read by C_t, with the decay from the chunk's start to t
    before = h[:, :-1].unflatten(2, (groups, -1))  # (B, K, G, R, P, N)
    read = torch.einsum("bktgn,bkgrpn->bktgrp", masks.from_start(C), before)
    y = torch.addcmul(y, decays.from_start, masks.from_start(read))
    y = y * decays.growth
    # --8<-- [end:blocks]

    y = y.flatten(3, 4).flatten(1, 2)  # (B, K T, H, P)
    y = y.index_select(1, torch.arange(length, device=y.device)) if any_length(length) else y[:, :length]
    return skip_and_gate(y, x, D, z).to(dtype), h[:, -1].clone()  # a copy: a view would keep all the states in memory


def cut(v: Tensor, chunk: int) -> Tensor:
    """(B, L, …) as (B, K, T, …), with zeros after the end: steps of no length, in which nothing happens."""
    length = v.shape[1]
    # In three chunks or more, the last ones of zeros: torch compiles a size of 1 for itself, and K - 1 is a size too.
    if any_length(length):
        step = torch.arange((length + 3 * chunk - 1) // chunk, device=v.device)[:, None] * chunk
        step = step + torch.arange(chunk, device=v.device)  # (K, T)
        after = (step >= length).view(*step.shape, *[1] * (v.ndim - 2))
        return v[:, step.clamp(max=length - 1)].masked_fill(after, 0)
    if missing := -length % chunk:
        v = torch.cat([v, v.new_zeros(v.shape[0], missing, *v.shape[2:])], 1)
    return v.unflatten(1, (-1, chunk))


def any_length(length: int) -> bool:
    """Whether the program that torch now compiles or exports is to serve every length."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # here: it takes half a second to import

    return not has_static_value(length)


LOWEST_LOG = -1000.0


def log_decay(delta: Tensor, A: Tensor) -> Tensor:
    """The log of each step's decay, Δ A, in float64 (B, L, H). Below -1000 its exponential is 0 in every dtype, and a
    smaller number would only cost the sums their last places."""
    return (delta.double() * A.double()).clamp(min=LOWEST_LOG)


class Masks:
    """Which steps depend on which, given the resets. Without resets `visible` is the causal mask, the others are None,
    and the methods change nothing.

    visible: (B, K, 1, 1, T, T), True where output step t depends on input step s.
    before_reset: (B, K, T), True at steps with a reset after them in their chunk.
    after_reset: (B, K, T), True at steps with a reset at or before them in their chunk.
    any_reset: (B, K, 1), True where there is a reset in the chunk.
    sequence: (B, K, T), how many resets there have been in the chunk so far.
    """

    visible: Tensor
    before_reset: Tensor | None = None
    after_reset: Tensor | None = None
    any_reset: Tensor | None = None
    sequence: Tensor | None = None

    def __init__(self, reset: Tensor | None, chunk: int, device: torch.device):
        self.visible = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
        if reset is not None:
            self.sequence = sequence = cut(reset, chunk).cumsum(-1)
            self.visible = (self.visible & (sequence[..., :, None] == sequence[..., None, :]))[:, :, None, None]
            self.before_reset = sequence != sequence[..., -1:]
            self.after_reset = sequence > 0
            self.any_reset = sequence[..., -1:] > 0

    def until_end(self, v: Tensor) -> Tensor:
        """v (B, K, T, …) with 0 at the steps that the state after the chunk does not depend on."""
        return masked(v, self.before_reset)

    def from_start(self, v: Tensor) -> Tensor:
        """v (B, K, T, …) with 0 at the steps that do not depend on the state before the chunk."""
        return masked(v, self.after_reset)


def masked(v: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """v (B, K, T, …) with this value where the mask (B, K, T) is True."""
    return v if mask is None else v.masked_fill(mask.view(*mask.shape, *[1] * (v.ndim - 3)), value)


class Decays:
    """The decays within each chunk, as exponentials of differences of one running sum.

    Where the state grows (A > 0), every decay up to an output step t is a product of two factors, so that neither of
    them overflows: what is here, and `growth`, which is multiplied in last. For A <= 0 `growth` is 1.

    to_end: from each step to the end of its chunk (B, K, T, G, R, 1).
    from_start: from the start of the chunk to each step (B, K, T, G, R, 1).
    whole: of the whole chunk (B, K, 1, G, R, 1).
    growth: the second factor, for each output step (B, K, T, G, R, 1).
    log_out, log_in: the decay from s to t, without `growth`, is exp(log_out_t - log_in_s); both (B, K, G, R, T).
    """

    def __init__(self, rates: Tensor, masks: Masks, like: Tensor):
        self.log_in: Tensor = since_start(rates, masks)
        growth = log_growth(self.log_in, masks)
        self.log_out: Tensor = self.log_in - growth
        self.to_end: Tensor = decay(self.log_out[..., -1:] - self.log_in, masks.before_reset, like)
        self.from_start: Tensor = decay(self.log_out, masks.after_reset, like)
        self.whole: Tensor = decay(self.log_out[..., -1:], masks.any_reset, like)
        self.growth: Tensor = decay(growth, None, like)


def since_start(rates: Tensor, masks: Masks) -> Tensor:
    """The log of the decay from the start of the chunk, or of the sequence if that is later, to each step (…, T)."""
    if masks.sequence is None:
        return rates.cumsum(-1)
    return rates[..., None, :].masked_fill(~masks.visible, 0).sum(-1)  # a cumsum would carry a NaN across a reset


MOST_LOG_GROWTH = 60.0  # e^60 is 1e26: products smaller by that do not underflow, and float32 ends at e^88


def log_growth(log: Tensor, masks: Masks) -> Tensor:
    """The log of a factor of each output step (…, T) without which none of its decays overflows: 0 where no decay is
    above e^60, which is everywhere for A < 0, and 60 at most.

    Args:
        log: the log of the decay from the start of the chunk or sequence to each step (…, T). No gradient is taken: the
            factor is divided out of the other one.
        masks: of the same chunks.
    """
    log = log.detach().nan_to_num(0.0, 0.0, 0.0)
    if torch.onnx.is_in_onnx_export():  # which has no running minimum
        return torch.zeros_like(log)
    if masks.sequence is not None:  # each sequence far below the one before it, so that its minimum is its own
        below = masks.sequence[:, :, None, None] * 1e9
        low = (log - below).cummin(-1).values + below
    else:
        low = log.cummin(-1).values
    return (log - low.clamp(max=0) - MOST_LOG_GROWTH).clamp(0, MOST_LOG_GROWTH)


def decay(log: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """The exponential of a log (B, K, G, R, T) as a factor (B, K, T, G, R, 1) in the dtype of `like`, and 0 where the
    mask (B, K, T) is True. It is never inf, since inf times 0 is NaN: see `highest`."""
    log = masked(log.movedim(-1, 2), mask, -torch.inf)
    return log.clamp(max=highest(like)).exp().to(like.dtype)[..., None]


def highest(like: Tensor) -> float:
    """The largest log of a decay: e^20 below the largest number of this dtype, so that the decay can be multiplied by
    something above 1. With `growth` that is e^128 in float32, by which any input above 1e-17 becomes inf."""
    return math.log(torch.finfo(like.dtype).max) - 20


def weights(C: Tensor, B: Tensor, decays: Decays, masks: Masks) -> Tensor:
    """How much of input step s is in output step t (B, K, G, R, t, s): 0 where s is later than t, or of another
    sequence. Both factors are masked, the decay before its exponential, which then does not overflow."""
    B, C = B.transpose(2, 3), C.transpose(2, 3)[:, :, :, None]  # (B, K, G, T, N), (B, K, G, 1, T, N)
    scores = (finite(C) @ finite(B).mT[:, :, :, None]).masked_fill(~masks.visible, 0)  # one for all heads of a group
    in_B, in_C = (~w.detach().isfinite().all(-1) for w in (B[:, :, :, None], C))
    reached = (in_B[..., None, :] & masks.visible).any(-1) | in_C  # (B, K, G, 1, T): output steps that a NaN reaches
    log_out = decays.log_out.masked_fill(reached, torch.nan)
    log = (log_out[..., :, None] - decays.log_in[..., None, :]).to(B.dtype).masked_fill(~masks.visible, -torch.inf)
    return scores * log.clamp(max=highest(B)).exp()


def multiply(weights: Tensor, v: Tensor, masks: Masks) -> Tensor:
    """The weights (B, K, G, R, t, s) times v (B, K, s, G, R, P), as (B, K, t, G, R, P). A NaN in v reaches the later
    steps of its own channel, and no earlier one, which a product with the weights' zeros would spoil too."""
    return (weights @ finite(v).movedim(2, -2)).movedim(-2, 2) + not_finite(v, masks)


def finite(v: Tensor) -> Tensor:
    """v with 0 for NaN and inf: a product with a mask's zeros would make NaN of them."""
    return v.masked_fill((v.detach() * 0).isnan(), 0)


def not_finite(v: Tensor, masks: Masks) -> Tensor:
    """NaN at the steps that a NaN or inf in v (B, K, T, …) reaches within its chunk, by channel, and 0 elsewhere."""
    zero = v.detach() * 0  # or NaN
    if masks.sequence is None:
        return zero.cumsum(2)
    bad = zero.isnan().to(v.dtype).flatten(3)  # (B, K, T, H P)
    reached = (masks.visible[:, :, 0, 0].to(v.dtype) @ bad).view(v.shape)
    return reached.masked_fill(reached > 0, torch.nan)
