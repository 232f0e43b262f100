"""The attentions of 2014 to 2017 as modules with one call: a decoder's states read an encoder's.

    context, weights = attention(s, h, mask, projected=attention.project(h), past=past)

`project` is what depends on the encoder's states alone: computed once a sentence. `past` (B, M) is what an attention
remembers of its own earlier weights; `start` makes the first one and `carry` the next. Most attentions ignore it.

Sources: additive, Bahdanau et al. 2014 (1409.0473), A.1.2; dot, general, concat and local, Luong et al. 2015
(1508.04025), sections 3.1 and 3.2; location-aware, Chorowski et al. 2015 (1506.07503), equations 8 and 9; coverage, Tu
et al. 2016 (1601.04811), section 3.1, and See et al. 2017 (1704.04368), section 2.3; the last state at every step, Cho
et al. 2014 (1406.1078), section 2.2. Symbols: as in `nondual.attention_mechanism.scores`.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.attention_mechanism.scores import Weigh, around_median, attend, compare
from nondual.ops.attention import masked_softmax
from nondual.ops.checks import check_sizes, check_tensors
from nondual.weights import matrix_and_bias


class Attention(nn.Module):
    """What all of them share: arguments checked once, then scores, weights and context.

    A new one defines `_project(h)`, `_scores(s, projected, past)`, and `start` and `carry` if it remembers more than
    the weights of the step before.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.
    """

    d_state: int
    d_memory: int
    weigh: Weigh

    def __init__(self, d_state: int, d_memory: int, *, weigh: Weigh = masked_softmax):
        super().__init__()
        check_sizes(d_state=d_state, d_memory=d_memory)
        self.d_state, self.d_memory, self.weigh = d_state, d_memory, weigh

    def _project(self, h: Tensor) -> Tensor:
        return h

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _scores(s, projected, past)")

    def project(self, h: Float[Tensor, "b m h"]) -> Float[Tensor, "b m a"]:
        """The encoder's side of the scores, which does not depend on the query: computed once a sentence.

        Args:
            h: encoder states (B, M, H).

        Raises:
            TypeError: h is not a tensor.
            ValueError: wrong rank or width.
        """
        _check_states("h", h, self.d_memory)
        return self._project(h)

    def start(self, h: Float[Tensor, "b m h"], mask: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "b m"]:
        """What it remembers before the first step: equal weights on all allowed positions, (B, M)."""
        ones = h.new_ones(h.shape[:2])
        return masked_softmax(ones, None if mask is None else _row(mask, h))

    def carry(self, past: Float[Tensor, "b m"], weights: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        """What it remembers after a step with these weights: the weights themselves, (B, M)."""
        return weights

    def scores(
        self,
        s: Float[Tensor, "b n s"],
        h: Float[Tensor, "b m h"],
        *,
        projected: Float[Tensor, "b m a"] | None = None,
        past: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n m"]:
        """The scores e_ij (B, N, M) alone, before any mask.

        Args:
            s: decoder states (B, N, S).
            h: encoder states (B, M, H).
            projected: what `project(h)` gave; computed here where left out.
            past: what it remembers of the steps before, (B, M); `start(h)` where left out.

        Raises:
            TypeError: one of them is not a tensor.
            ValueError: wrong rank, width or batch; a projection or a past that does not fit.
        """
        self._check(s, h)
        if projected is None:
            projected = self.project(h)
        check_tensors({"projected": projected}, {"past": past})
        expected = (*h.shape[:2], self._width())
        if tuple(projected.shape) != expected:
            raise ValueError(f"projected must be project(h), {expected}, got {tuple(projected.shape)}")
        if past is not None and past.shape != h.shape[:2]:
            raise ValueError(f"past must be (B, M) = {tuple(h.shape[:2])}, got {tuple(past.shape)}")
        return self._scores(s, projected, past)

    def _check(self, s: Tensor, h: Tensor) -> None:
        _check_states("s", s, self.d_state)
        _check_states("h", h, self.d_memory)
        if s.shape[0] != h.shape[0]:
            raise ValueError(f"s and h must have one batch, got {s.shape[0]} and {h.shape[0]}")

    def _width(self) -> int:
        """The width of what `project` gives."""
        return self.d_memory

    def forward(
        self,
        s: Float[Tensor, "b n s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
        past: Float[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
        """Decoder states s (B, N, S) look over encoder states h (B, M, H): (context (B, N, H), weights (B, N, M)).

        Args:
            s: (B, N, S).
            h: (B, M, H).
            mask: as in `attend`.
            projected: what `project(h)` gave; computed here where left out.
            past: what it remembers of the steps before, (B, M); `start(h, mask)` where left out. One for all N queries.

        Raises:
            TypeError: s, h, mask, projected or past is not a tensor.
            ValueError: wrong rank, width or batch; a mask, a projection or a past that does not fit.
        """
        if past is None and self._remembers() and isinstance(h, Tensor) and h.ndim == 3:
            past = self.start(h, mask)
        return attend(self.scores(s, h, projected=projected, past=past), h, mask, weigh=self.weigh)

    def _remembers(self) -> bool:
        """Whether the scores depend on `past`."""
        return False

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self,
            s: Tensor,
            h: Tensor,
            mask: Tensor | None = None,
            *,
            projected: Tensor | None = None,
            past: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]: ...


def _check_states(name: str, x: Tensor, width: int) -> None:
    check_tensors({name: x})
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (B, length, {width}), got {tuple(x.shape)}")


def _row(mask: Tensor, h: Tensor) -> Tensor:
    """A mask that broadcasts to (B, N, M) and is the same for every query, as (B, M)."""
    row = mask.expand(h.shape[0], -1, h.shape[1]) if mask.ndim == 3 else mask.expand(1, -1, h.shape[1])
    if row.shape[1] != 1:
        raise ValueError(f"mask must be the same for every query here, (B, 1, M), got {tuple(mask.shape)}")
    return row[:, 0].expand(h.shape[:2])


class AdditiveAttention(Attention):
    """Bahdanau attention, e_ij = vᵀ tanh(W_s s_i + W_h h_j): a hidden layer of `d_attention` units compares each pair.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.
        bias: whether a b is added inside the tanh.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Source: 1409.0473, section A.1.2.
    """

    w_s: nn.Linear
    w_h: nn.Linear
    v: nn.Parameter

    def __init__(
        self, d_state: int, d_memory: int, d_attention: int, *, bias: bool = False, weigh: Weigh = masked_softmax
    ):
        super().__init__(d_state, d_memory, weigh=weigh)
        self.w_s = nn.Linear(d_state, d_attention, bias=bias)
        self.w_h = nn.Linear(d_memory, d_attention, bias=False)
        self.v = nn.Parameter(torch.empty(d_attention).uniform_(-1, 1) / math.sqrt(d_attention))

    def _width(self) -> int:
        return self.w_h.out_features

    def _project(self, h: Tensor) -> Tensor:
        return self.w_h(h)

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        return compare(self.w_s(s), projected, self.v)


class ConcatAttention(Attention):
    """Luong's "concat" score, e_ij = vᵀ tanh(W [s_i; h_j]): additive attention with one matrix for both.

    Each part of W multiplies its own states, so that no pair is formed. What stands in the place of w, such as an
    adapter, or what a hook makes of its output, must be linear too: its matrix is then computed at every call.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Source: 1508.04025, section 3.1.
    """

    w: nn.Linear
    v: nn.Parameter

    def __init__(self, d_state: int, d_memory: int, d_attention: int, *, weigh: Weigh = masked_softmax):
        super().__init__(d_state, d_memory, weigh=weigh)
        self.w = nn.Linear(d_state + d_memory, d_attention, bias=False)
        self.v = nn.Parameter(torch.empty(d_attention).uniform_(-1, 1) / math.sqrt(d_attention))

    def _width(self) -> int:
        return self.w.out_features

    def _project(self, h: Tensor) -> Tensor:
        matrix, _ = self._matrix_and_bias(h)
        return h @ matrix[:, self.d_state :].mT

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        matrix, bias = self._matrix_and_bias(s)
        return compare(F.linear(s, matrix[:, : self.d_state], bias), projected, self.v)

    def _matrix_and_bias(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        return matrix_and_bias(self.w, self.d_state + self.d_memory, like)


class DotAttention(Attention):
    """Luong's "dot" score, e_ij = s_i · h_j: no parameters, and both states must have one width.

    Args:
        d_state: width S of both states.
        d_memory: H, equal to S.
        scale: what the scores are multiplied by; 1/√S is the transformer's.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Raises:
        ValueError: two widths.

    Source: 1508.04025, section 3.1; the scale: 1706.03762, section 3.2.1.
    """

    scale: float

    def __init__(self, d_state: int, d_memory: int, *, scale: float = 1.0, weigh: Weigh = masked_softmax):
        super().__init__(d_state, d_memory, weigh=weigh)
        if d_state != d_memory:
            raise ValueError(
                f"d_state and d_memory must be equal for a dot product, got {d_state} and {d_memory}; "
                "use GeneralAttention"
            )
        self.scale = scale

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        return s @ projected.mT * self.scale


class GeneralAttention(Attention):
    """Luong's "general" score, e_ij = s_iᵀ W h_j.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Source: 1508.04025, section 3.1.
    """

    w: nn.Linear

    def __init__(self, d_state: int, d_memory: int, *, weigh: Weigh = masked_softmax):
        super().__init__(d_state, d_memory, weigh=weigh)
        self.w = nn.Linear(d_memory, d_state, bias=False)

    def _width(self) -> int:
        return self.w.out_features

    def _project(self, h: Tensor) -> Tensor:
        return self.w(h)

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        return s @ projected.mT


class LocalAttention(GeneralAttention):
    """Luong's "local-p": the general score within D positions of a place that the state predicts.

        p_i = (length - 1) · σ(v_pᵀ tanh(W_p s_i)),   α_ij = softmax(e)_ij · exp(-(j - p_i)² / 2(D/2)²)

    The softmax runs over the allowed positions with |j - p_i| <= D. After the factor a row sums to less than 1, as in
    the paper. (The paper's p runs from 0 to the length; here it ends on the last position.)

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        width: D, 1 or more.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Raises:
        ValueError: a width below 1.

    Source: 1508.04025, section 3.2, equations 9 and 10.
    """

    width: int
    w_p: nn.Linear
    v_p: nn.Linear

    def __init__(self, d_state: int, d_memory: int, width: int, *, weigh: Weigh = masked_softmax):
        super().__init__(d_state, d_memory, weigh=weigh)
        if width < 1:
            raise ValueError(f"width must be 1 or more, got {width}")
        self.width = width
        self.w_p = nn.Linear(d_state, d_state, bias=False)
        self.v_p = nn.Linear(d_state, 1, bias=False)

    def forward(
        self,
        s: Float[Tensor, "b n s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
        past: Float[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
        """As `Attention.forward`; the mask must be the same for every query, (B, 1, M)."""
        scores = self.scores(s, h, projected=projected, past=past)
        allowed = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else _row(mask, h)
        last = (allowed.sum(-1, keepdim=True) - 1).clamp(min=0)
        place = last[:, None] * torch.sigmoid(self.v_p(torch.tanh(self.w_p(s))))  # (B, N, 1)
        away = torch.arange(h.shape[1], device=h.device) - place
        _, weights = attend(scores, h, allowed[:, None] & (away.abs() <= self.width), weigh=self.weigh)
        weights = weights * torch.exp(-2 * (away / self.width).square())
        return weights.to(h.dtype) @ h, weights


class LocationAttention(AdditiveAttention):
    """Location-aware attention: the score also sees where the step before looked.

        f = F * α_{i-1},   e_ij = vᵀ tanh(W_s s_i + W_h h_j + W_f f_j + b)

    F is a convolution over positions of `d_location` filters; past the ends α is 0.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.
        d_location: how many filters, k.
        kernel: their length r, odd.
        bias: whether there is a b.
        window: attend only to positions at most this far from the median of α_{i-1} (`around_median`).
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Raises:
        ValueError: an even kernel.

    Source: 1506.07503, equations 8 and 9, and section 2.3 for smoothing and windowing.
    """

    w_f: nn.Linear
    filters: nn.Conv1d
    window: int | None

    def __init__(
        self,
        d_state: int,
        d_memory: int,
        d_attention: int,
        d_location: int,
        kernel: int,
        *,
        bias: bool = True,
        window: int | None = None,
        weigh: Weigh = masked_softmax,
    ):
        super().__init__(d_state, d_memory, d_attention, bias=bias, weigh=weigh)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that it has a middle, got {kernel}")
        self.w_f = nn.Linear(d_location, d_attention, bias=False)
        self.filters = nn.Conv1d(1, d_location, kernel, padding=kernel // 2, bias=False)
        self.window = window

    def _remembers(self) -> bool:
        return True

    # --8<-- [start:location]
    def features(self, past: Float[Tensor, "b m"]) -> Float[Tensor, "b m k"]:
        """f_j (B, M, k): what the filters see around each position in past (B, M)."""
        return self.filters(past[:, None]).mT

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        past = self.start(projected) if past is None else past
        located = projected + self.w_f(self.features(past))  # W_h h_j + W_f f_j
        return compare(self.w_s(s), located, self.v)

    # --8<-- [end:location]

    def forward(
        self,
        s: Float[Tensor, "b n s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
        past: Float[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
        """As `Attention.forward`."""
        if self.window is not None and past is not None:
            near = around_median(past, self.window)
            mask = near if mask is None else mask & near
        return super().forward(s, h, mask, projected=projected, past=past)


class CoverageAttention(AdditiveAttention):
    """Attention with coverage: the score also sees how much each position has been looked at so far.

        c_j = Σ_{l<i} α_lj,   e_ij = vᵀ tanh(W_s s_i + W_h h_j + w_c c_j + b)

    `coverage_loss` is the penalty that goes with it.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.
        weigh: how scores become weights: `masked_softmax`, or `smooth`.

    Source: 1704.04368, equations 10 and 11; the idea: 1601.04811, section 3.1.
    """

    w_c: nn.Parameter

    def __init__(self, d_state: int, d_memory: int, d_attention: int, *, weigh: Weigh = masked_softmax):
        super().__init__(d_state, d_memory, d_attention, bias=True, weigh=weigh)
        self.w_c = nn.Parameter(torch.zeros(d_attention))

    def _remembers(self) -> bool:
        return True

    def start(self, h: Float[Tensor, "b m h"], mask: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "b m"]:
        """Nothing has been looked at: 0, (B, M)."""
        return h.new_zeros(h.shape[:2])

    def carry(self, past: Float[Tensor, "b m"], weights: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
        """The sum of all weights so far, (B, M)."""
        return past + weights

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        covered = projected if past is None else projected + past[..., None] * self.w_c
        return compare(self.w_s(s), covered, self.v)


class UniformAttention(Attention):
    """The mean of the encoder's states at every step: attention without scores, to compare with.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
    """

    def _scores(self, s: Tensor, projected: Tensor, past: Tensor | None) -> Tensor:
        return projected.new_zeros(s.shape[0], s.shape[1], projected.shape[1])


class LastState(Attention):
    """The encoder's last state at every step, one fixed vector for the sentence: what there was before attention.

    Of a bidirectional encoder this is the forward half of h at the last position and the backward half at the first,
    and half of the weight is shown at each.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        bidirectional: whether the second half of h comes from reading backward.

    Raises:
        ValueError: an odd d_memory with two directions.

    Source: 1406.1078, section 2.2 (one direction).
    """

    bidirectional: bool

    def __init__(self, d_state: int, d_memory: int, *, bidirectional: bool = True):
        super().__init__(d_state, d_memory)
        if bidirectional and d_memory % 2:
            raise ValueError(f"d_memory must be even for two directions, got {d_memory}")
        self.bidirectional = bidirectional

    def forward(
        self,
        s: Float[Tensor, "b n s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
        past: Float[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
        """As `Attention.forward`; the mask must be the same for every query, (B, 1, M). No states give 0."""
        self._check(s, h)
        allowed = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if mask is None else _row(mask, h)
        at_first = (allowed & (allowed.cumsum(-1) == 1)).to(h.dtype)  # (B, M), 1 at one position
        at_last = (allowed & (allowed.flip(-1).cumsum(-1).flip(-1) == 1)).to(h.dtype)
        half = self.d_memory // 2 if self.bidirectional else self.d_memory
        forward, backward = h.split([half, self.d_memory - half], -1)
        context = torch.cat([at_last[:, None] @ forward, at_first[:, None] @ backward], -1)  # (B, 1, H)
        weights = (at_last + at_first) / 2 if self.bidirectional else at_last
        n = s.shape[1]
        return context.expand(-1, n, -1), weights[:, None].expand(-1, n, -1)
