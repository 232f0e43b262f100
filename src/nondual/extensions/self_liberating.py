"""Self-liberating attention: what was attended to fades by itself, over time, and may persist over depth.

    DecayingAttention    scores plus the sum of the logarithms of the forget gates between query and key
    PersistentScores     the scores of each layer are added to those of the layer below: a connection
    CertifiedStream      decoding that lets a key go once what it can still weigh is less than ε

    TransformerLayer(DecayingAttention(64, 4), FeedForward(64, 256), 64, norm_first=True)
    DecayingAttention(512, 8, op=flash_attention)    # the same without ever holding the N x N weights

Sources: forget gates in softmax attention, Lin et al. 2025, "Forgetting Transformer" (2503.02130), section 3; scores
carried on, He et al. 2020, "RealFormer" (2012.11747), section 3. The certified stream is ours. Symbols: x (B, N, E), H
heads of width D, f_t the forget gate at t, s_ij a score before the decay, P_ij a weight.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nondual.connections import LayerCall, check_count
from nondual.mixers import check_takes
from nondual.ops import masks
from nondual.ops.attention import masked_softmax
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.relative_positions import RelativePositions


def decay_between(log_forget: Float[Tensor, "... n"]) -> Float[Tensor, "... n n"]:
    """For each query i and earlier key j the sum of log f over j + 1 … i; 0 on the diagonal, -inf above it.

        log f   a  b  c        0   -∞  -∞
                               b    0  -∞
                             b + c  c   0

    Each sum is formed by itself and not as a difference of two long ones. So a gate of 0 (log f = -inf) forgets all
    before it and gives no NaN, and sums of short stretches stay exact however long the sequence is.

    Args:
        log_forget: (…, N), 0 or less.

    Returns:
        (…, N, N), in float32 or better.
    """
    wide, n = at_least_float32(log_forget), log_forget.shape[-1]
    after = torch.ones(n, n, dtype=torch.bool, device=log_forget.device).tril(-1)  # l > j
    steps = torch.where(after, wide[..., :, None], 0.0).cumsum(-2)
    return steps.masked_fill(~masks.causal(n, device=log_forget.device), -torch.inf)


class DecayingAttention(nn.Module):
    """Causal attention whose scores fall with what was forgotten between a key and the query, a mixer (B, N, E).

        f_t = sigmoid(x_t w_f + b_f) for each head,        P_ij = softmax_j(s_ij + Σ_{l=j+1…i} log f_l)

    Queries and keys are normalised to a root mean square of 1 and multiplied by a learned gain for each head. So no
    score exceeds `bound`, which `CertifiedStream` rests on. Gates that are all 1 leave ordinary attention.

    Without `op` the weights (B, H, N, N) are formed. With op=flash_attention, of `nondual.ops.flash_attention`, the
    results are the same in memory linear in N, and its kernels run on a GPU (where they are not yet measured).

    Args:
        d_model: E.
        n_heads: H.
        forgets: whether there are gates.
        half_life: of how many steps the gates begin, for x = 0: half of a weight is gone after so many.
        positions: where queries and keys stand, as in `MultiHeadAttention`; rotary ones alone, since a bias is not
            bounded.
        op: what joins queries, keys and values, called as op(q, k, v, causal=True, log_forget=...), with log f (B, H,
            N) or None without gates; the weights are formed where it is left out. `partial` binds its other options.

    Raises:
        TypeError: positions of another kind, or an op that is not callable.
        ValueError: a size below 1, heads that do not divide d_model, a half-life that is not finite or not above 0,
            positions of another width or with a bias.
    """

    n_heads: int
    d_head: int
    positions: RelativePositions | None
    op: Callable[..., Any] | None
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    forget: nn.Linear | None
    log_gain: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        forgets: bool = True,
        half_life: float = 64.0,
        positions: RelativePositions | None = None,
        op: Callable[..., Any] | None = None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        if not 0 < half_life < math.inf:
            raise ValueError(f"half_life must be above 0 and finite, got {half_life}")
        if op is not None and not callable(op):
            raise TypeError(f"op must be a function such as flash_attention, or None, got {type(op).__name__}")
        self.n_heads, self.d_head, self.positions, self.op = n_heads, d_model // n_heads, positions, op
        if positions is not None:
            if not isinstance(positions, RelativePositions):
                raise TypeError(f"positions must be Rotary, got {type(positions).__name__}")
            why = positions.refuses(n_heads, self.d_head)
            if why is not None:
                raise ValueError(why)
            if positions.bias(1, 1) is not None:
                raise ValueError(f"positions must turn and add no bias, as Rotary does, got {type(positions).__name__}")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.log_gain = nn.Parameter(torch.zeros(n_heads))
        self.forget = nn.Linear(d_model, n_heads) if forgets else None
        if self.forget is not None:
            gate = 0.5 ** (1 / half_life)
            nn.init.zeros_(self.forget.weight)
            nn.init.constant_(self.forget.bias, math.log(gate / (1 - gate)))

    def bound(self) -> Float[Tensor, " h"]:
        """What no score exceeds, of either sign, for each head: its gain squared times √D."""
        return (2 * self.log_gain).exp() * self.d_head**0.5

    def parts(self, x: Float[Tensor, "b n e"], start: int = 0) -> "Parts":
        """Queries, keys, values (B, H, N, D) and log f (B, H, N) of positions that begin at `start`."""
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=self.n_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        gain = self.log_gain.exp()[:, None, None].to(q.dtype)
        q, k = (gain * F.rms_norm(each, each.shape[-1:]) for each in (q, k))
        if self.positions is not None:
            q, k = self.positions.turn(q, start), self.positions.turn(k, start)
        if self.forget is None:
            log_forget = torch.zeros(q.shape[:3], dtype=at_least_float32(q).dtype, device=q.device)
        else:
            log_forget = rearrange(F.logsigmoid(at_least_float32(self.forget(x))), "b n h -> b h n")
        return Parts(q, k, v, log_forget)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        *,
        scores: Callable[[Tensor], Tensor] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out (B, N, E), or (out, weights (B, H, N, N)).

        Args:
            x: (B, N, E).
            scores: what is done to the scores (B, H, N, N) before the decay, such as adding those of another layer
                (`PersistentScores`).
            return_weights: also return the weights.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x of another rank or width; scores or the weights asked of a layer with an op.
        """
        check_tensors({"x": x})
        if x.ndim != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ValueError(f"x must be (B, N, {self.q_proj.in_features}), got {tuple(x.shape)}")
        if self.op is not None and (scores is not None or return_weights):
            asked = "return_weights must be False" if scores is None else "scores must be None"
            raise ValueError(f"{asked} with an op, which forms no scores to show or to add to; leave op out")
        q, k, v, log_forget = self.parts(x)
        if self.op is not None:
            out = self.op(q, k, v, causal=True, log_forget=log_forget if self.forget is not None else None)
            return self.out_proj(rearrange(out.to(v.dtype), "b h n d -> b n (h d)"))
        with autocast_off(x.device.type):  # it would multiply in half precision
            # --8<-- [start:decay]
            s = at_least_float32(q) @ at_least_float32(k).mT / self.d_head**0.5
            s = s if scores is None else scores(s)
            causal = masks.causal(s.shape[-1], device=s.device)
            mask = causal if self.forget is None else decay_between(log_forget)
            weights = masked_softmax(s, mask)
            # --8<-- [end:decay]
            out = (weights @ at_least_float32(v)).to(v.dtype)
        out = self.out_proj(rearrange(out, "b h n d -> b n (h d)"))
        return (out, weights.to(out.dtype)) if return_weights else out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            scores: Callable[[Tensor], Tensor] | None = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            scores: Callable[[Tensor], Tensor] | None = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            scores: Callable[[Tensor], Tensor] | None = None,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Parts(NamedTuple):
    """What a `DecayingAttention` makes of x: queries, keys and values (B, H, N, D), and log f (B, H, N)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_forget: Tensor


class PersistentScores(nn.Module):
    """The scores of each layer added to those of the layer below, as a connection: CausalLM(..., connection=…).

        S_l = s_l + c_l S_{l-1},    l = 2 … L

    With c = 1 this is RealFormer; with c = 0 the plain stream. The mixers must take `scores=`, as `DecayingAttention`
    does, and have as many heads in each layer.

    Args:
        n_layers: L, of the model.
        carried: what c_l starts at.
        learned: whether c_l is a parameter.

    Raises:
        ValueError: n_layers below 1.
    """

    n_layers: int
    carried: Tensor

    def __init__(self, n_layers: int, *, carried: float = 1.0, learned: bool = False):
        super().__init__()
        check_sizes(n_layers=n_layers)
        self.n_layers = n_layers
        start = torch.full((n_layers - 1,), float(carried))
        if learned:
            self.carried = nn.Parameter(start)
        else:
            self.register_buffer("carried", start)

    def forward(self, x: Float[Tensor, "b n e"], layers: Sequence[LayerCall]) -> Float[Tensor, "b n e"]:
        """The embeddings (B, N, E) through the layers, each told what to add to its scores.

        Args:
            x: (B, N, E).
            layers: of one forward pass, in order.

        Raises:
            ValueError: another number of layers, a layer without a mixer, or a mixer that takes no scores.
        """
        check_count("layers", len(layers), self.n_layers)
        for i, layer in enumerate(layers):
            if not hasattr(layer.layer, "mixer"):
                raise ValueError(
                    f"layers must have a mixer whose scores can be added to, got {type(layer.layer).__name__}"
                )
            check_takes(cast(Any, layer.layer).mixer, "scores", f"layer {i}")
        below: list[Tensor] = []

        def added(i: int) -> Callable[[Tensor], Tensor]:
            def add(s: Tensor) -> Tensor:
                s = s if i == 0 else s + self.carried[i - 1].to(s.dtype) * below[-1]
                below.append(s)
                return s

            return add

        for i, layer in enumerate(layers):
            x = layer(x, scores=added(i))
        return x


class CertifiedStream:
    """Decoding one position at a time, with a bound on what letting keys go can have changed.

        stream = CertifiedStream(mixer, epsilon=1e-3)
        for x in positions:          # (B, 1, E) each
            out = stream.step(x)     # as mixer(x[:, :n])[:, -1:], to within the bound

    A score is at most c and at least -c (`DecayingAttention.bound`), and a query's own key has not decayed. So a key
    whose decay is d, 0 or less, has at most e^{2c + d} of the whole weight. As d only falls, this bound only shrinks.
    The stream lets the oldest keys of a head go while the sum of the bounds of all that are gone stays at or below ε.
    Then the weight m that is missing is at most ε, and each head's output is off by at most 2 ε max|v|, v being any
    value that the head has read: what it would be is (1 - m) · kept + m · gone, the two means of values.

    What is kept is the same number of positions for all heads and rows, that of the one which keeps most.

    Args:
        mixer: a `DecayingAttention` with gates.
        epsilon: ε, the most weight that may be missing.

    Attributes:
        kept: how many positions are held.
        missing: (B, H), the bound on the missing weight at the last step, at most ε.

    Raises:
        TypeError: another mixer.
        ValueError: a mixer without gates, or an epsilon outside of (0, 1).
    """

    mixer: DecayingAttention
    epsilon: float
    length: int
    missing: Tensor | None

    def __init__(self, mixer: DecayingAttention, epsilon: float):
        if not isinstance(mixer, DecayingAttention):
            raise TypeError(f"mixer must be a DecayingAttention, got {type(mixer).__name__}")
        if mixer.forget is None:
            raise ValueError("mixer must have forget gates: without them no key fades")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self.mixer, self.epsilon, self.length, self.missing = mixer, epsilon, 0, None
        self._keys = self._values = self._decay = self._held = torch.empty(0)

    @property
    def kept(self) -> int:
        return self._keys.shape[2] if self.length else 0

    @torch.no_grad()
    def step(self, x: Float[Tensor, "b 1 e"]) -> Float[Tensor, "b 1 e"]:
        """The output at the next position, (B, 1, E).

        Args:
            x: (B, 1, E), the next position of each row.

        Raises:
            TypeError: x is not a tensor.
            ValueError: x of another shape, or another batch than before. The stream is then as it was.
        """
        check_tensors({"x": x})
        width = self.mixer.q_proj.in_features
        if x.ndim != 3 or x.shape[1:] != (1, width) or (self.length and len(x) != len(self._keys)):
            batch = len(self._keys) if self.length else "B"
            raise ValueError(f"x must be ({batch}, 1, {width}), got {tuple(x.shape)}")
        q, k, v, log_forget = self.mixer.parts(x, self.length)
        q, k, v = (at_least_float32(each) for each in (q, k, v))
        zero = torch.zeros_like(log_forget)
        if self.length:
            decay = torch.cat([self._decay + log_forget, zero], 2)
            keys, values = torch.cat([self._keys, k], 2), torch.cat([self._values, v], 2)
            held = torch.cat([self._held, torch.ones_like(zero, dtype=torch.bool)], 2)
            missing = cast(Tensor, self.missing) * log_forget[..., 0].exp()
        else:
            decay, keys, values, held = zero, k, v, torch.ones_like(zero, dtype=torch.bool)
            missing = torch.zeros_like(zero[..., 0])
        # --8<-- [start:let_go]
        bound = at_least_float32(self.mixer.bound())[:, None]
        bounds = (2 * bound + decay).exp() * held  # (B, H, kept)
        # the oldest stand first
        goes = held & (missing[..., None] + bounds.cumsum(2) <= self.epsilon)
        goes[..., -1] = False  # a query sees itself
        missing = missing + (bounds * goes).sum(2)
        held = held & ~goes
        # --8<-- [end:let_go]
        with autocast_off(x.device.type):  # it would multiply in half precision
            weights = masked_softmax(q @ keys.mT / self.mixer.d_head**0.5 + decay[:, :, None], held[:, :, None])
            out = rearrange((weights @ values).to(x.dtype), "b h n d -> b n (h d)")
        out = self.mixer.out_proj(out)
        first = int(held.any(0).any(0).int().argmax())  # the first position that any head of any row still holds
        self._keys, self._values = keys[:, :, first:], values[:, :, first:]
        self._decay, self._held = decay[..., first:], held[..., first:]
        self.missing, self.length = missing, self.length + 1
        return out
