"""State space duality by blocks, in plain torch: attention within a chunk, a recurrence from chunk to chunk.

Source: Dao and Gu 2024 (2405.21060), section 6 and Listing 1. Symbols: B batch, L steps, H heads = G groups of R heads
that share B and C, P a head's channels, N states; K chunks of T steps. In the einsums: k chunk, t output step, s input
step.

The matrix of `ssd_matrix` is cut into T x T blocks. Those on its diagonal are multiplied out (T² for each chunk, so
that time and memory are linear in L); those below have rank N, and pass through the state:

1. within a chunk       y = (C Bᵀ ∘ decay) Δx
2. a chunk's state      S = Σ_s (decay from s to the chunk's end) Δ_s x_s B_sᵀ
3. from chunk to chunk  h ← (decay of the whole chunk) h + S
4. what was before      y += (decay of the chunk up to t) h C_t

Nothing is divided by an exponential. A decay is the exponential of a difference of two sums, masked before it is taken;
the sums are kept in float64, so that the difference is exact to float32 where strong and weak steps meet in one chunk.
Where A > 0 the decays grow, beyond what float32 holds too: `apart` keeps a factor of up to e^60 out of the products, so
that infinity times an input of 0 does not become NaN.

NaN and inf go where they go in the recurrence, and no further: in x to the later outputs of that channel, in Δ, B and
C to later outputs of that head or group, and never past a reset. The same holds for the gradients, but a NaN in z or in
the incoming gradient can reach any step of its own chunk. That is why each product is masked on both sides: 0 times NaN
is NaN.

Step 3 is one operator to torch, so that a program compiled for one length serves all. Differentiable by autograd, twice
too, in forward mode, and under the transforms of torch.func.
"""

import math

import torch
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.discretize import step_length
from nondual.ops.impl import refuses_transforms
from nondual.ops.linear_recurrence import doubling
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
    with autocast_off(x.device.type):  # the products below are sums, and stay as wide as they are
        return _ssd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk)


def _ssd(x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, chunk):
    dtype, (x, delta, A, B, C, D, z, delta_bias, state) = x.dtype, wide(x, delta, A, B, C, D, z, delta_bias, state)
    delta = step_length(delta, delta_bias, delta_softplus)
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    if not any_length(length):
        chunk = min(chunk, length)
    first = x.new_zeros(batch, heads, width, states) if state is None else state
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
    # 3. from chunk to chunk: h <- (decay of the whole chunk) h + S
    h = pass_on(decays.whole, decays.growth[:, :, -1:], S, first, masks.ends)  # (B, K+1, H, P, N)
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


FORGETS_ALL = -1000.0


def log_decay(delta: Tensor, A: Tensor) -> Tensor:
    """Δ A in float64 (B, L, H). Below -1000 its exponential is 0 in every dtype, and a smaller number would only cost
    the sums their last places."""
    return (delta.double() * A.double()).clamp(min=FORGETS_ALL)


class Masks:
    """What a reset hides. Without one `seen` is the causal mask, the others are None, and the methods change nothing.

    seen: (B, K, 1, 1, T, T), True where output step t depends on input step s.
    lost: (B, K, T), True at steps with a reset between them and the end of their chunk.
    unreached: (B, K, T), True at steps with a reset between the start of their chunk and them.
    ends: (B, K, 1), True where there is a reset in the chunk, so that the state before the chunk ends there.
    sequence: (B, K, T), how many resets there have been in the chunk so far.
    """

    seen: Tensor
    lost: Tensor | None = None
    unreached: Tensor | None = None
    ends: Tensor | None = None
    sequence: Tensor | None = None

    def __init__(self, reset: Tensor | None, chunk: int, device: torch.device):
        self.seen = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
        if reset is not None:
            self.sequence = sequence = cut(reset, chunk).cumsum(-1)
            self.seen = (self.seen & (sequence[..., :, None] == sequence[..., None, :]))[:, :, None, None]
            self.lost = sequence != sequence[..., -1:]
            self.unreached = sequence > 0
            self.ends = sequence[..., -1:] > 0

    def until_end(self, v: Tensor) -> Tensor:
        """v (B, K, T, …) with 0 at the steps that the state after the chunk does not depend on."""
        return unless(v, self.lost)

    def from_start(self, v: Tensor) -> Tensor:
        """v (B, K, T, …) with 0 at the steps that do not depend on the state before the chunk."""
        return unless(v, self.unreached)


def unless(v: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
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
    rows, passed: the decay from s to t, without `growth`, is exp(rows_t - passed_s); both (B, K, G, R, T).
    """

    def __init__(self, rates: Tensor, masks: Masks, like: Tensor):
        self.passed: Tensor = since_start(rates, masks)
        held = apart(self.passed, masks)
        self.rows: Tensor = self.passed - held
        self.to_end: Tensor = decay(self.rows[..., -1:] - self.passed, masks.lost, like)
        self.from_start: Tensor = decay(self.rows, masks.unreached, like)
        self.whole: Tensor = decay(self.rows[..., -1:], masks.ends, like)
        self.growth: Tensor = decay(held, None, like)


def since_start(rates: Tensor, masks: Masks) -> Tensor:
    """The log of the decay from the start of the chunk, or of the sequence if that is later, to each step (…, T)."""
    if masks.sequence is None:
        return rates.cumsum(-1)
    return rates[..., None, :].masked_fill(~masks.seen, 0).sum(-1)  # a cumsum would carry a NaN across a reset


HELD = 60.0  # e^60 is 1e26: products that are smaller by it do not underflow, and float32 ends at e^88


def apart(passed: Tensor, masks: Masks) -> Tensor:
    """The log of a factor of each output row (…, T) without which none of its decays overflows: 0 where no decay is
    above e^60, which is everywhere for A < 0, and 60 at most. A constant for the gradient, since it is divided out."""
    passed = passed.detach().nan_to_num(0.0, 0.0, 0.0)
    if torch.onnx.is_in_onnx_export():  # which has no running minimum
        return torch.zeros_like(passed)
    if masks.sequence is not None:  # each sequence far below the one before it: a minimum of its own
        below = masks.sequence[:, :, None, None] * 1e9
        low = (passed - below).cummin(-1).values + below
    else:
        low = passed.cummin(-1).values
    return (passed - low.clamp(max=0) - HELD).clamp(0, HELD)


def decay(log: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """The exponential of a log (B, K, G, R, T) as a factor (B, K, T, G, R, 1) in the dtype of `like`, and 0 where the
    mask (B, K, T) is True.

    It is never inf, since inf times 0 is NaN; what has grown so far is inf after the product, unless it is 0.
    """
    log = unless(log.movedim(-1, 2), mask, -torch.inf)
    return log.clamp(max=highest(like)).exp().to(like.dtype)[..., None]


def highest(like: Tensor) -> float:
    """The log that a decay is cut off at: e^20 below the largest number of this dtype, so that it can be multiplied by
    something above 1. With `apart` that is a growth of e^128 in float32, after which any input above 1e-17 is inf."""
    return math.log(torch.finfo(like.dtype).max) - 20


def weights(C: Tensor, B: Tensor, decays: Decays, masks: Masks) -> Tensor:
    """What of input step s is in output step t (B, K, G, R, t, s): 0 where s is later than t, or of another sequence.
    Both factors are masked, the decay before its exponential, which then does not overflow."""
    B, C = B.transpose(2, 3), C.transpose(2, 3)[:, :, :, None]  # (B, K, G, T, N), (B, K, G, 1, T, N)
    scores = (finite(C) @ finite(B).mT[:, :, :, None]).masked_fill(~masks.seen, 0)  # one for all heads of a group
    in_B, in_C = (~w.detach().isfinite().all(-1) for w in (B[:, :, :, None], C))
    spoilt = (in_B[..., None, :] & masks.seen).any(-1) | in_C  # (B, K, G, 1, T): steps that their NaN reaches
    rows = decays.rows.masked_fill(spoilt, torch.nan)
    between = (rows[..., :, None] - decays.passed[..., None, :]).to(B.dtype).masked_fill(~masks.seen, -torch.inf)
    return scores * between.clamp(max=highest(B)).exp()


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
    reached = (masks.seen[:, :, 0, 0].to(v.dtype) @ bad).view(v.shape)
    return reached.masked_fill(reached > 0, torch.nan)


# --- from chunk to chunk, as an operator of torch ---------------------------------------------------------------------


def pass_on(near: Tensor, far: Tensor, own: Tensor, first: Tensor, ends: Tensor | None) -> Tensor:
    """The state before every chunk and after the last (B, K+1, H, P, N): h <- far (near h + own).

    Args:
        near: the decay of each whole chunk, without the factor `far` (B, K, 1, G, R, 1).
        far: that factor, which is 1 unless the state grows; no gradient is taken of it (B, K, 1, G, R, 1).
        own: what each chunk adds, without that factor (B, K, G, R, P, N).
        first: the state before the first chunk (B, H, P, N).
        ends: True where nothing is left of the state before the chunk, not even a NaN (B, K, 1).
    """
    near, far, own = near.flatten(2), far.flatten(2), own.flatten(2, 3)  # (B, K, H), (B, K, H), (B, K, H, P, N)
    ends = None if ends is None else ends.squeeze(-1)
    if torch.onnx.is_in_onnx_export():
        a, b = (near * far)[..., None, None], far[..., None, None] * own
        return torch.cat([first[:, None], doubling(a, b, first)], 1)
    if not refuses_transforms(near, far, own, first, ends):
        return _pass_on(near, far, own, first, ends, False)
    h, states = first, [first]
    for k, (near_k, far_k) in enumerate(zip(*(v[..., None, None].unbind(1) for v in (near, far)))):
        h = far_k * (near_k * (h if ends is None else h.masked_fill(ends[:, k, None, None, None], 0)) + own[:, k])
        states.append(h)
    return torch.stack(states, 1)


@torch.library.custom_op("nondual::ssd_pass_on", mutates_args=())
def _pass_on(near: Tensor, far: Tensor, own: Tensor, first: Tensor, ends: Tensor | None, reverse: bool) -> Tensor:
    """From the first chunk to the last, or in reverse: then `first` comes after the last chunk."""
    chunks = own.shape[1]
    h = own.new_empty(own.shape[0], chunks + 1, *own.shape[2:])
    grows = far.device.type != "cpu" or bool((far != 1).any())  # a GPU would wait for the answer
    h[:, chunks if reverse else 0] = first
    for k in reversed(range(chunks)) if reverse else range(chunks):
        before, after = (h[:, k + 1], h[:, k]) if reverse else (h[:, k], h[:, k + 1])
        if ends is not None:
            before = before.masked_fill(ends[:, k, None, None, None], 0)
        torch.addcmul(own[:, k], near[:, k, :, None, None], before, out=after)
        if grows:
            after *= far[:, k, :, None, None]
    return h


@_pass_on.register_fake
def _(near, far, own, first, ends, reverse):
    return own.new_empty(own.shape[0], own.shape[1] + 1, *own.shape[2:])


def _save(ctx, inputs, output):
    near, far, _, _, ends, ctx.reverse = inputs
    ctx.save_for_backward(near, far, ends, output)


def _differentiate(ctx, d_h):
    """The gradient of own, e_k = far_k (∂h_{k+1} + near_{k+1} e_{k+1}), is the same recurrence from the other end."""
    near, far, ends, h = ctx.saved_tensors
    one = torch.ones_like(far[:, :1])
    if ctx.reverse:
        shifted, own, first = torch.cat([far[:, 1:], one], 1), d_h[:, 1:], d_h[:, 0] * far[:, 0, :, None, None]
    else:
        shifted, own, first = torch.cat([one, far[:, :-1]], 1), d_h[:, :-1], d_h[:, -1] * far[:, -1, :, None, None]
    e = _pass_on(near, shifted, own, first, ends, not ctx.reverse)
    e, d_first = (e[:, :-1], e[:, -1]) if ctx.reverse else (e[:, 1:], e[:, 0])
    d_near = None
    if ctx.needs_input_grad[0]:
        h = h[:, 1:] if ctx.reverse else h[:, :-1]
        h = h if ends is None else h.masked_fill(ends[..., None, None, None], 0)
        d_near = torch.einsum("bkhpn,bkhpn->bkh", h, e)
    return d_near, None, e, d_first, None, None


_pass_on.register_autograd(_differentiate, setup_context=_save)
