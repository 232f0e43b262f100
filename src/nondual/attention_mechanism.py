"""Attention as it began: a decoder that looks back over the encoder's states.

Source: Bahdanau, Cho and Bengio 2014 (1409.0473), sections 3.1 and A.1.2; the multiplicative scores: Luong, Pham and
Manning 2015 (1508.04025), section 3.1, and Vaswani et al. 2017 (1706.03762), section 3.2.1.

Symbols, with the paper's in brackets where they differ: s decoder states (B, N, S) [s_{i-1}], h encoder states
(B, M, H) [h_j], A the width in which they are compared [n'], scores (B, N, M) [e_ij], weights (B, N, M) [alpha_ij],
context (B, N, H) [c_i], w_s [W_a], w_h [U_a], v [v_a].
"""

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.ops.attention import masked_softmax
from nondual.ops.checks import check_tensors


def additive_scores(
    s: Float[Tensor, "b n s"],
    h: Float[Tensor, "b m h"],
    w_s: Float[Tensor, "a s"],
    w_h: Float[Tensor, "a h"],
    v: Float[Tensor, " a"],
) -> Float[Tensor, "b n m"]:
    """e_ij = vᵀ tanh(W_s s_i + W_h h_j): a small network scores every pair.

    Args:
        s: decoder states (B, N, S).
        h: encoder states (B, M, H).
        w_s: (A, S).
        w_h: (A, H).
        v: (A,).

    Returns:
        Scores (B, N, M).

    Raises:
        TypeError: one of them is not a tensor.

    Source: 1409.0473, section A.1.2.
    """
    check_tensors({"s": s, "h": h, "w_s": w_s, "w_h": w_h, "v": v})
    return compare(s @ w_s.mT, h @ w_h.mT, v)


# --8<-- [start:scores]
def compare(
    asked: Float[Tensor, "b n a"], found: Float[Tensor, "b m a"], v: Float[Tensor, " a"]
) -> Float[Tensor, "b n m"]:
    """vᵀ tanh(asked_i + found_j), where asked is W_s s and found is W_h h."""
    return torch.tanh(asked[:, :, None] + found[:, None]) @ v


# --8<-- [end:scores]


def dot_scores(s: Float[Tensor, "b n d"], h: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """e_ij = s_i · h_j: no network at all, the two must live in one space. Source: 1508.04025, section 3.1 ("dot").

    `dot_scores(s @ w, h)` is the same paper's "general" score; its third, "concat", is `additive_scores` with W_s and
    W_h side by side as one matrix.

    Args:
        s: decoder states (B, N, D).
        h: encoder states (B, M, D).

    Returns:
        Scores (B, N, M).

    Raises:
        TypeError: s or h is not a tensor.
        ValueError: their widths differ.
    """
    check_tensors({"s": s, "h": h})
    if s.shape[-1] != h.shape[-1]:
        raise ValueError(f"s and h must have one width for a dot product, got {s.shape[-1]} and {h.shape[-1]}")
    return s @ h.mT


def scaled_dot_scores(s: Float[Tensor, "b n d"], h: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """e_ij = s_i · h_j / √D, so that the spread of a score does not grow with the width. Source: 1706.03762, 3.2.1.

    Arguments, result and errors as those of `dot_scores`.
    """
    return dot_scores(s, h) / math.sqrt(s.shape[-1])


def attend(
    scores: Float[Tensor, "b n m"], h: Float[Tensor, "b m h"], mask: Bool[Tensor, "..."] | None = None
) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
    """Scores to weights to context: α = softmax(e) over the encoder's positions, c_i = Σ_j α_ij h_j.

    Args:
        scores: (B, N, M), any floating dtype; their softmax is taken in float32 or better, under autocast too.
        h: encoder states (B, M, H), of the dtype of scores, or any that autocast casts.
        mask: bool, broadcastable to (B, N, M), True where attending is allowed; (B, 1, M) for padding.

    Returns:
        (context (B, N, H), weights (B, N, M)). A row with nothing to attend gives 0.

    Raises:
        TypeError: scores, h or mask is not a tensor.
        ValueError: a mask that is not boolean or does not fit.

    Source: 1409.0473, equations 5 and 6.
    """
    check_tensors({"scores": scores, "h": h}, {"mask": mask})
    if mask is not None:
        fits = mask.ndim <= 3 and all(a in (1, b) for a, b in zip(mask.shape[::-1], scores.shape[::-1]))
        if mask.dtype != torch.bool or not fits:
            raise ValueError(
                f"mask must be torch.bool and broadcast to (B, N, M) = {tuple(scores.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    weights = masked_softmax(scores, mask)
    return weights @ h, weights


class AdditiveAttention(nn.Module):
    """Bahdanau attention: learned W_s, W_h and v, compared in a hidden layer of `d_attention` units.

    Args:
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.
    """

    w_s: nn.Linear
    w_h: nn.Linear
    v: nn.Parameter

    def __init__(self, d_state: int, d_memory: int, d_attention: int):
        super().__init__()
        self.w_s = nn.Linear(d_state, d_attention, bias=False)
        self.w_h = nn.Linear(d_memory, d_attention, bias=False)
        self.v = nn.Parameter(torch.empty(d_attention).uniform_(-1, 1) / math.sqrt(d_attention))

    def project(self, h: Float[Tensor, "b m h"]) -> Float[Tensor, "b m a"]:
        """W_h h (B, M, A), which does not depend on the query: computed once a sentence and given to each `forward`.

        Args:
            h: encoder states (B, M, H).

        Raises:
            TypeError: h is not a tensor.
            ValueError: wrong rank or width.
        """
        _check_states("h", h, self.w_h.in_features)
        return self.w_h(h)

    def forward(
        self,
        s: Float[Tensor, "b n s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
    ) -> tuple[Float[Tensor, "b n h"], Float[Tensor, "b n m"]]:
        """Decoder states s (B, N, S) look over encoder states h (B, M, H): (context (B, N, H), weights (B, N, M)).

        Args:
            s: (B, N, S).
            h: (B, M, H).
            mask: as in `attend`.
            projected: what `project(h)` gave, (B, M, A); computed here where left out.

        Raises:
            TypeError: s, h, mask or projected is not a tensor.
            ValueError: wrong rank, width or batch; a mask or a projection that does not fit.
        """
        _check_states("s", s, self.w_s.in_features)
        _check_states("h", h, self.w_h.in_features)
        if s.shape[0] != h.shape[0]:
            raise ValueError(f"s and h must have one batch, got {s.shape[0]} and {h.shape[0]}")
        if projected is None:
            projected = self.project(h)
        check_tensors({"projected": projected})
        expected = (*h.shape[:2], self.w_h.out_features)
        if tuple(projected.shape) != expected:
            raise ValueError(f"projected must be project(h), {expected}, got {tuple(projected.shape)}")
        return attend(compare(self.w_s(s), projected, self.v), h, mask)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self, s: Tensor, h: Tensor, mask: Tensor | None = None, *, projected: Tensor | None = None
        ) -> tuple[Tensor, Tensor]: ...


def _check_states(name: str, x: Tensor, width: int) -> None:
    check_tensors({name: x})
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (B, length, {width}), got {tuple(x.shape)}")


class AttentionDecoder(nn.Module):
    """One GRU cell that, before each step, asks the encoder's states a question with its own previous state.

        c_i = attend(s_{i-1}, h),   s_i = GRU([y_{i-1}; c_i], s_{i-1})

    Args:
        d_input: width of the embedded previous output y.
        d_state: width S of the decoder's state.
        d_memory: width H of the encoder's states.
        d_attention: width A of the comparison.

    Source: 1409.0473, sections 3.1 and A.1.2, with torch's GRU cell.
    """

    attention: AdditiveAttention
    cell: nn.GRUCell

    def __init__(self, d_input: int, d_state: int, d_memory: int, d_attention: int):
        super().__init__()
        self.attention = AdditiveAttention(d_state, d_memory, d_attention)
        self.cell = nn.GRUCell(d_input + d_memory, d_state)

    def step(
        self,
        y: Float[Tensor, "b y"],
        s: Float[Tensor, "b s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
        *,
        projected: Float[Tensor, "b m a"] | None = None,
    ) -> tuple[Float[Tensor, "b s"], Float[Tensor, "b m"]]:
        """One step: the next state, and the weights it read with.

        Args:
            y: the previous output, embedded (B, Y).
            s: the previous state (B, S).
            h: encoder states (B, M, H).
            mask: as in `attend`.
            projected: `attention.project(h)`, (B, M, A). It is the same at every step: give it where h is read more
                than once. Computed here where left out.

        Returns:
            (the next state (B, S), the weights (B, M)).

        Raises:
            TypeError, ValueError: as `AdditiveAttention.forward` raises them.
        """
        check_tensors({"y": y, "s": s})
        context, weights = self.attention(s[:, None], h, mask, projected=projected)
        return self.cell(torch.cat([y, context[:, 0]], dim=-1), s), weights[:, 0]

    def forward(
        self,
        y: Float[Tensor, "b n y"],
        s: Float[Tensor, "b s"],
        h: Float[Tensor, "b m h"],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "b n s"], Float[Tensor, "b n m"]]:
        """All steps, each given the true previous output (teacher forcing). W_h h is computed once, before the first.

        Args:
            y: the previous outputs, embedded (B, N, Y).
            s: the first state (B, S).
            h: encoder states (B, M, H).
            mask: as in `attend`.

        Returns:
            (states (B, N, S), weights (B, N, M)).

        Raises:
            TypeError, ValueError: as `AdditiveAttention.forward` raises them; y of length 0.
        """
        check_tensors({"y": y, "s": s})
        if y.shape[1] == 0:
            raise ValueError("y must hold one step or more, got length 0")
        projected, states, weights = self.attention.project(h), [], []
        for i in range(y.shape[1]):
            s, row = self.step(y[:, i], s, h, mask, projected=projected)
            states.append(s)
            weights.append(row)
        return torch.stack(states, 1), torch.stack(weights, 1)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, y: Tensor, s: Tensor, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
