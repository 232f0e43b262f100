"""Test-time training: the memory is a small model, and reading a sequence trains it, one mini-batch after another.

    G_s = d/dW ½|f(k_s; W_start) - v_s|²          the gradient at token s, at the weights that its mini-batch began with
    W_t = W_start - τ_t Σ_{s ≤ t} η_s G_s         over the tokens of the mini-batch up to t
    out_t = f(q_t; W_t)

Source: Sun et al. 2024 (2407.04620): sections 2.1 to 2.3 for the layer and its three views (k the training view, v the
label view, q the test view), 2.4 for mini-batches, 2.5 and appendix A for the dual form; τ is in the code released with
it. Symbols: B batch, H heads, N tokens of width D, b tokens of a mini-batch. The inner model is a stack of linear maps
with GELU between them: one is TTT-Linear, two are TTT-MLP.

Where we differ from the paper: the loss is halved, as in the released code, so that its gradient has no factor 2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nondual.ops.autocast import as_autocast_does, autocast_off
from nondual.ops.checks import check_kinds, check_shapes, check_tensors
from nondual.ops.dtypes import accumulation_dtype


class TTTState(NamedTuple):
    """The inner model between two calls, which may fall inside a mini-batch.

    Attributes:
        weights: of each map, at the start of the present mini-batch (B, H, D, D'), with one more row for a bias.
        sums: of each map, Σ η_s G_s over the tokens of the present mini-batch, in the shape of its weights.
        seen: how many tokens of the present mini-batch have been read, 0 to b - 1.
    """

    weights: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    seen: int

    def select(self, rows: Int[Tensor, " r"]) -> "TTTState":
        """The state of these rows of the batch, in memory of its own."""
        return TTTState(tuple(w[rows] for w in self.weights), tuple(s[rows] for s in self.sums), self.seen)


class Head(Protocol):
    """What stands between the last map and the loss: f(x; W) = output(z, x), z being what the maps make of x."""

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """f (B, H, n, D) from z and x of that shape."""
        ...

    def gradient(self, z: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """The gradient of ½|output(z, x) - target|² with respect to z."""
        ...


class Plain:
    """f(x; W) = z: no norm and no residual path, as in theorem 1 of the paper."""

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """z itself."""
        return z

    def gradient(self, z: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """z - target."""
        return z - target


PLAIN = Plain()


class NormedResidual(NamedTuple):
    """f(x; W) = x + LayerNorm(z), as published (section 2.7): training starts near the identity and stays stable.

    Attributes:
        weight: of the norm (H, D), one for each head.
        bias: of the norm (H, D).
        eps: added to the variance.
    """

    weight: Float[Tensor, "h d"]
    bias: Float[Tensor, "h d"]
    eps: float = 1e-6

    # --8<-- [start:head]
    def output(self, z: Tensor, x: Tensor) -> Tensor:
        """x + LayerNorm(z)."""
        return x + F.layer_norm(z, z.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]

    def gradient(self, z: Tensor, x: Tensor, target: Tensor) -> Tensor:
        """Through the norm: less its own mean and its share along the normalised z, over the deviation."""
        centred = z - z.mean(-1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        unit = centred * inverse
        g = (x + unit * self.weight[:, None] + self.bias[:, None] - target) * self.weight[:, None]
        return (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True)) * inverse

    # --8<-- [end:head]


class _Piece(NamedTuple):
    """Tokens of one mini-batch, n of them: q, k, v (B, H, n, D), their rates (B, H, n, 1) and their τ (n, 1).

    first is True where none of the mini-batch came before them, so that the sums are 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    share: Tensor
    first: bool


def ttt(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n dv"],
    rate: Float[Tensor, "b h n"],
    weights: Sequence[Float[Tensor, "h d d_out"]],
    *,
    head: Head = PLAIN,
    share: Float[Tensor, " m"] | None = None,
    mini_batch: int = 16,
    state: TTTState | None = None,
    impl: Literal["dual", "reference"] = "dual",
) -> tuple[Float[Tensor, "b h n dv"], TTTState]:
    """What the inner model says of each query after it was trained on all tokens so far, and the model itself.

        W_t = W_start - τ_t Σ_{s ≤ t} η_s G_s        out_t = f(q_t; W_t)

    Every token after the first of a mini-batch takes its gradient at the weights of the mini-batch's start, so that all
    of a mini-batch is a few matrix products: z̄ = q W_start - (τ_t η_s (q_t · k_s))_{s ≤ t} dz, with dz the gradient at
    the outputs of the map; for the next map z̄ goes through GELU and takes the place of q. No W_t is ever built. The
    order of the mini-batches counts from the first token of the state, wherever a sequence is cut.

    Sums and states are kept in float32 (in float64 for float64) whatever q is. Under autocast q, k and v are cast to
    its dtype. Differentiable any number of times, in reverse and in forward mode.

    Args:
        q: the test view (B, H, N, D), of any floating dtype; N may be 0.
        k: the training view (B, H, N, D), in q's dtype.
        v: the label view (B, H, N, Dv), in q's dtype. With `NormedResidual` Dv must be D.
        rate: η, the inner learning rate of each token (B, H, N), of any floating dtype.
        weights: of each map at the start of the sequence (H, D, D'), of any floating dtype. With one row more, D + 1,
            the last row is a bias: the weight of an input that is always 1.
        head: what follows the last map: `PLAIN` or `NormedResidual(...)`.
        share: τ, a factor of each place in a mini-batch (b,); 1 where left out.
        mini_batch: b. With 1 it is online gradient descent.
        state: the state before the first token, from an earlier call; `weights` then only say its shapes.
        impl: "dual", or "reference": token by token, each W_t built, its gradient by autograd from the loss itself.

    Returns:
        out (B, H, N, Dv) in q's dtype, and the state after the last token, in memory of its own. A NaN can reach every
        token of its own mini-batch, earlier ones too.

    Raises:
        TypeError: what is not a Tensor.
        ValueError: shapes, dtypes or devices that do not fit, a mini_batch below 1, a state of another shape or made
            with a longer mini_batch, an unknown impl.
    """
    check_tensors({"q": q, "k": k, "v": v, "rate": rate}, {"share": share})
    q, k, v = as_autocast_does(q, k, v)
    _check(q, k, v, rate, weights, share, mini_batch, state)
    if impl not in PIECES:
        raise ValueError(f"impl must be one of {', '.join(PIECES)}, got {impl!r}")
    wide = accumulation_dtype(q.dtype)
    if state is None:
        start = [w.to(wide).expand(q.shape[0], *w.shape).clone() for w in weights]
        state = TTTState(tuple(start), tuple(torch.zeros_like(w) for w in start), 0)
    with autocast_off(q.device.type):
        out, state = _read(q, k, v, rate[..., None], share, mini_batch, state, PIECES[impl], head, wide)
    return out.to(q.dtype), state


# --8<-- [start:loop]
def _read(q, k, v, rate, share, mini_batch, state, piece_of, head, wide):
    """One mini-batch after another; a step is taken at the end of each."""
    (weights, sums, seen), outs, length = state, [], q.shape[2]
    q, k, v, rate = (x.to(wide) for x in (q, k, v, rate))
    share = (q.new_ones(mini_batch) if share is None else share.to(wide))[:, None]
    # A range has fixed ends in a compiled program too, which is then of one length.
    for end in range(mini_batch - seen, length + mini_batch, mini_batch):
        at = max(end - mini_batch, 0)
        n = min(end, length) - at
        if n <= 0:
            break
        views = [x[:, :, at : at + n] for x in (q, k, v, rate)]
        piece = _Piece(views[0], views[1], views[2], views[3], share[seen : seen + n], seen == 0)
        out, sums = piece_of(piece, weights, sums, head)
        outs.append(out)
        seen += n
        if seen == mini_batch:
            weights = tuple(w - share[-1] * total for w, total in zip(weights, sums))
            sums, seen = tuple(torch.zeros_like(w) for w in weights), 0
    out = torch.cat(outs, 2) if outs else v.clone()
    return out, TTTState(weights, sums, seen)


# --8<-- [end:loop]


def _with_one(x: Tensor, w: Tensor) -> Tensor:
    """x with one more channel that is always 1 where w has a row for it."""
    return F.pad(x, (0, 1), value=1.0) if w.shape[-2] == x.shape[-1] + 1 else x


def _gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_slope(z: Tensor) -> Tensor:
    """The derivative of `_gelu`."""
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return (1 + t) / 2 + z / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def _dual(p: _Piece, weights: tuple[Tensor, ...], sums: tuple[Tensor, ...], head: Head):
    """The tokens of a piece all at once, by matrices."""
    # --8<-- [start:dual]
    # 1. The training view through the maps, at the weights of the start.
    inputs, zs = [], []
    for w in weights:
        inputs.append(_with_one(_gelu(zs[-1]) if zs else p.k, w))
        zs.append(inputs[-1] @ w)
    # 2. Back: the gradient at the outputs of each map, the last map's first.
    slopes = [head.gradient(zs[-1], p.k, p.v)]
    for w, z in zip(reversed(weights[1:]), reversed(zs[:-1])):
        slopes.insert(0, (slopes[0] @ w[..., : z.shape[-1], :].mT) * _gelu_slope(z))
    # 3. The test view through the maps as they are after each token's step.
    steps = [p.rate * g for g in slopes]
    z = p.q
    for i, (w, x, step) in enumerate(zip(weights, inputs, steps)):
        y = _with_one(_gelu(z) if i else z, w)
        moved = (y @ x.mT).tril() @ step
        z = y @ w - p.share * (moved if p.first else moved + y @ sums[i])
    # 4. What the next piece adds to.
    new = tuple(x.mT @ step for x, step in zip(inputs, steps))
    sums = new if p.first else tuple(total + each for total, each in zip(sums, new))
    return head.output(z, p.q), sums
    # --8<-- [end:dual]


def _primal(p: _Piece, weights: tuple[Tensor, ...], sums: tuple[Tensor, ...], head: Head):
    """Token by token: the loss differentiated by autograd, and the weights after each step."""

    def f(x: Tensor, ws: Sequence[Tensor]) -> Tensor:
        z = _with_one(x, ws[0]) @ ws[0]
        for w in ws[1:]:
            z = _with_one(_gelu(z), w) @ w
        return head.output(z, x)

    # --8<-- [start:primal]
    def loss(ws: Sequence[Tensor], k: Tensor, v: Tensor) -> Tensor:
        return (f(k, ws) - v).square().sum() / 2

    outs = []
    for t in range(p.q.shape[2]):
        q, k, v, rate = (x[:, :, t : t + 1] for x in p[:4])
        gradients = torch.func.grad(loss)(weights, k, v)
        sums = tuple(total + rate * g for total, g in zip(sums, gradients))
        outs.append(f(q, [w - p.share[t] * total for w, total in zip(weights, sums)]))
    return torch.cat(outs, 2), sums
    # --8<-- [end:primal]


PIECES: dict[str, Callable[..., tuple[Tensor, tuple[Tensor, ...]]]] = {"dual": _dual, "reference": _primal}
"""By impl: a piece, the weights at its mini-batch's start, the sums before it and the head, to its outputs and the sums
after it."""


def _check(q, k, v, rate, weights, share, mini_batch, state) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be (B, H, N, D), got {tuple(q.shape)}")
    B, H, N, D = q.shape
    if v.ndim != 4:
        raise ValueError(f"v must be (B, H, N, Dv), got {tuple(v.shape)}")
    width = v.shape[-1]
    if isinstance(mini_batch, bool) or not isinstance(mini_batch, int) or mini_batch < 1:
        raise ValueError(f"mini_batch must be an integer of 1 or more, got {mini_batch!r}")
    check_shapes(
        {
            "k": (k, (B, H, N, D), "(B, H, N, D)"),
            "v": (v, (B, H, N, width), "(B, H, N, Dv)"),
            "rate": (rate, (B, H, N), "(B, H, N)"),
            "share": (share, (mini_batch,), "(mini_batch,)"),
        }
    )
    if isinstance(weights, Tensor) or not weights:
        raise ValueError("weights must be a sequence of one Tensor or more, each (H, D, D'): write [w] for one map")
    named = {f"weights[{i}]": w for i, w in enumerate(weights)}
    check_tensors(named)
    for name, w in named.items():
        if w.ndim != 3 or w.shape[0] != H or w.shape[1] not in (D, D + 1):
            raise ValueError(f"{name} must be ({H}, {D} or {D + 1} with a bias, D'), got {tuple(w.shape)}")
        D = w.shape[2]
    if width != D:
        raise ValueError(f"the last of weights must end in v's width, {width}, got {D}")
    check_kinds({"q": q, "k": k, "v": v}, {"rate": rate, "share": share, **named}, None)
    if state is None:
        return
    if len(state.weights) != len(weights) or len(state.sums) != len(weights):
        raise ValueError(f"state must have {len(weights)} weights and sums, as weights has, got {len(state.weights)}")
    for i, w in enumerate(weights):
        for name, x in (("weights", state.weights[i]), ("sums", state.sums[i])):
            check_shapes({f"state.{name}[{i}]": (x, (B, *w.shape), "(B, H, D, D')")})
    if not 0 <= state.seen < mini_batch:
        raise ValueError(f"state.seen must be 0 to mini_batch - 1 = {mini_batch - 1}, got {state.seen}")
