"""Attention over a sequence that is cut: every rank trades its part of the rows for a part of the heads.

    this rank holds    n of N rows, all H heads
    all-to-all         N rows, H/P heads: attention of these heads as on one device, by flash attention
    all-to-all         n of N rows, all H heads

Each rank sends (P - 1)/P of its rows of q, k, v and of the output, and nothing that grows with P. It needs H to be a
multiple of P, and a rank holds the whole sequence of its heads. Key/value heads that are fewer than the ranks, or do
not divide among them, are sent to each rank whose query heads read them.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses" (2309.14509), section 3. Symbols: P ranks, N positions, n of them on
this rank; B batch, H query heads, G key/value heads, D head width, Dv width of the values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.flash_attention import flash_attention
from nondual.parallel.exchange import Ranks, naming_the_lost, not_compiled, note_sent
from nondual.parallel.inputs import OverRanks, Placing, checked_rows, refuse_options, refuse_transforms
from nondual.parallel.layout import Layout

dist = torch.distributed


def all_to_all_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g n d"],
    v: Float[Tensor, "b g n dv"],
    layout: Placing,
    *,
    group: Any = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h n dv"]:
    """Each query's weighted mean of the values of all ranks, as `flash_attention` gives it for the whole sequence.

    Every rank must make the call and, where it is differentiated, go backward through its own output: the others wait
    for it. A rank may hold no rows.

    Args:
        q: this rank's queries (B, H, n, D), rows in the layout's order; float64, float32, float16 or bfloat16.
        k: its keys (B, G, n, D). H must be a multiple of G.
        v: its values (B, G, n, Dv).
        layout: which rank holds which positions: a `Layout`, or a function of N and P that gives it, such as `zigzag`.
        group: the ranks: a process group, a mesh of one dimension, or None for all.
        causal: each query sees its own position and those before.
        window: each query sees the last `window` keys, its own included; it implies causal.
        scale: factor on q · k; 1/√D where left out.

    Returns:
        This rank's rows of the output (B, H, n, Dv), in q's dtype.

    Raises:
        TypeError: q, k or v is not a tensor, or layout neither a Layout nor a function.
        ValueError: on every rank alike: H is no multiple of P; rows that do not fit together, the layout, or those of
            the other ranks; a window below 1.
        RuntimeError: no process group, a rank that does not answer, or a second derivative. A forward-mode derivative
            or a transform of torch.func.
    """
    return _attention("all_to_all_attention", q, k, v, layout, group, causal, window, scale)


@dataclass(frozen=True)
class AllToAllAttention(OverRanks):
    """What `MultiHeadAttention(op=...)` calls, over `all_to_all_attention`; it has no parameters.

        MultiHeadAttention(512, 8, causal=True, op=AllToAllAttention(zigzag))

    `nondual.parallel.shard_sequence` puts it into a whole model.

    Attributes:
        layout: as in `all_to_all_attention`.
        group: the ranks; all where None.
        window: how many keys a query sees, its own included; it implies causal. All where None.
        scale: factor on q · k; 1/√D where None.
    """

    layout: Placing
    group: Any = None
    window: int | None = None
    scale: float | None = None

    def __call__(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Float[Tensor, "b h n dv"]:
        """Attention of this rank's rows to those of all ranks.

        Args:
            q: queries (B, H, n, D).
            k: keys (B, G, n, D), H a multiple of G.
            v: values (B, G, n, Dv).
            mask: None. Which keys a query sees follows from positions alone: causal and window.
            causal: no query sees a later key.
            dropout: 0.
            return_weights: False.

        Returns:
            out (B, H, n, Dv).

        Raises:
            TypeError: as in `all_to_all_attention`.
            ValueError: a mask, a dropout or the weights are asked for; or as in `all_to_all_attention`.
            RuntimeError: as in `all_to_all_attention`.
        """
        asked = (mask, dropout, return_weights)
        return _attention("AllToAllAttention", q, k, v, self.layout, self.group, causal, self.window, self.scale, asked)


@not_compiled
def _attention(call, q, k, v, layout, group, causal, window, scale, asked=(None, 0.0, False)) -> Tensor:
    refuse_transforms(call, q, k, v)

    def refuse(ranks: Ranks) -> None:
        refuse_options(call, *asked)
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be an integer of 1 or more or None, got {window!r}")
        if isinstance(q, Tensor) and q.ndim == 4 and q.shape[1] % ranks.size:
            raise ValueError(
                f"q must have a number of heads that the {ranks.size} ranks divide, got {q.shape[1]}: use "
                "ring_attention, which takes any number, or a group of a size that divides it"
            )

    options = {"causal": causal, "window": window, "scale": None if scale is None else float(scale)}
    ranks, layout, q, k, v = checked_rows(call, q, k, v, layout, group, options=options, refuse=refuse)
    # --8<-- [start:all_to_all]
    copies = ranks.size // math.gcd(k.shape[1], ranks.size)  # of each key/value head, so that all ranks get as many
    k, v = (x if copies == 1 else x.repeat_interleave(copies, 1) for x in (k, v))
    q, k, v = _ToHeads.apply(ranks, layout, q, k, v)  # (B, H/P, N, D), (B, G/P, N, D), (B, G/P, N, Dv)
    out = flash_attention(q, k, v, causal=causal, window=window, scale=scale)
    (out,) = _ToRows.apply(ranks, layout, out)  # (B, H, n, Dv)
    # --8<-- [end:all_to_all]
    return out


# --- rows for heads, and back ----------------------------------------------------------------------------------------


class _ToHeads(torch.autograd.Function):
    """n rows of all heads to all rows of a part of the heads: several tensors in one collective."""

    @staticmethod
    def forward(ctx, ranks: Ranks, layout: Layout, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.layout = ranks, layout
        return tuple(_to_heads(ranks, layout, xs))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_ToRows.apply(ctx.ranks, ctx.layout, *gradients)


class _ToRows(torch.autograd.Function):
    """All rows of a part of the heads to n rows of all heads: the inverse of `_ToHeads`, and its derivative."""

    @staticmethod
    def forward(ctx, ranks: Ranks, layout: Layout, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.layout = ranks, layout
        return tuple(_to_rows(ranks, layout, xs))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_ToHeads.apply(ctx.ranks, ctx.layout, *gradients)


def _to_heads(ranks: Ranks, layout: Layout, xs: Sequence[Tensor]) -> list[Tensor]:
    """Each (B, heads, n, W) to (B, heads/P, N, W), rows in the order of positions."""
    p, n = ranks.size, layout.lengths[ranks.rank]
    # (P, n, B, heads/P, W): what goes to one rank is together
    by_rank = [x.unflatten(1, (p, x.shape[1] // p)).permute(1, 3, 0, 2, 4) for x in xs]
    sent = torch.cat([x.flatten(2) for x in by_rank], -1).flatten(0, 1)  # (P n, widths)
    received = _in_order(_swap(ranks, sent, [n] * p, layout.lengths), layout)  # (N, widths)
    parts = received.split([math.prod(x.shape[2:]) for x in by_rank], -1)
    return [part.unflatten(-1, x.shape[2:]).permute(1, 2, 0, 3) for part, x in zip(parts, by_rank)]


def _to_rows(ranks: Ranks, layout: Layout, xs: Sequence[Tensor]) -> list[Tensor]:
    """Each (B, heads/P, N, W), rows in the order of positions, to (B, heads, n, W)."""
    p, n = ranks.size, layout.lengths[ranks.rank]
    rows_first = [x.permute(2, 0, 1, 3) for x in xs]  # (N, B, heads/P, W)
    sent = _in_order(torch.cat([x.flatten(1) for x in rows_first], -1), layout, back=True)  # (N, widths)
    received = _swap(ranks, sent, layout.lengths, [n] * p).unflatten(0, (p, n))  # (P, n, widths)
    parts = received.split([math.prod(x.shape[1:]) for x in rows_first], -1)
    return [part.unflatten(-1, x.shape[1:]).permute(2, 0, 3, 1, 4).flatten(1, 2) for part, x in zip(parts, rows_first)]


def _swap(ranks: Ranks, rows: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    """The first `sends[0]` rows go to rank 0, the next `sends[1]` to rank 1, and so on; what comes is in that order."""
    received = rows.new_empty((sum(receives), rows.shape[1]))
    for rank, part in enumerate(rows.split(list(sends))):
        if rank != ranks.rank and part.numel():
            note_sent(part)
    with naming_the_lost(ranks, "all-to-all"):
        dist.all_to_all_single(received, rows.contiguous(), list(receives), list(sends), group=ranks.group)
    return received


def _in_order(rows: Tensor, layout: Layout, *, back: bool = False) -> Tensor:
    """Rows in the order of ranks, put in the order of positions; or back."""
    pieces = [piece for of_rank in layout.pieces for piece in of_rank if len(piece)]
    order = sorted(range(len(pieces)), key=lambda i: pieces[i].start)
    if order == list(range(len(pieces))):
        return rows
    if back:
        parts = dict(zip(order, rows.split([len(pieces[i]) for i in order])))
        return torch.cat([parts[i] for i in range(len(pieces))])
    parts = rows.split([len(piece) for piece in pieces])
    return torch.cat([parts[i] for i in order])
