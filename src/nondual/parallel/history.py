"""The rows of a sequence that stand before a rank's first one, which lie on the ranks before: what a convolution reads.

    rank 0: a b c d      rank 1: e      rank 2: f g        3 rows before
    rank 0: 0 0 0        rank 1: b c d  rank 2: c d e

A causal convolution of width K sees the K - 1 rows before each. At the start of a rank's part these are the last rows
of the rank before, and of ranks further back where a rank holds fewer than K - 1.

Source: the "halo" of a cut array in finite differences, such as Gropp, Lusk and Skjellum 1994, "Using MPI", chapter 4.
Symbols: P ranks, x (B, L, D) as in `nondual.ops.causal_conv1d`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.checks import check_kinds, check_shapes, check_tensors
from nondual.parallel.end_state import before_last_reset
from nondual.parallel.exchange import Ranks, compared, exchange, not_compiled, ranks_of
from nondual.parallel.inputs import device_of
from nondual.parallel.layout import Layout, of_lengths
from nondual.parallel.passed_on import first_rank_gives, need_of_gradients
from nondual.parallel.pieces import as_slice


@not_compiled
def rows_before(
    x: Float[Tensor, "b l d"],
    rows: int,
    *,
    history: Float[Tensor, "b r d"] | None = None,
    reset: Bool[Tensor, "b l"] | None = None,
    group: Any = None,
) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b l d"]]:
    """The rows before this rank's first one, from the ranks before it; and x.

        history, x = rows_before(x, width - 1, reset=reset)
        y, _ = causal_conv1d(x, weight, bias, history, reset=reset)

    Use the x that is returned in place of the one that was given: then backward comes by here on every rank, on one
    without rows too. Every rank must make the call and, where it is differentiated, go backward through it.

    Args:
        x: this rank's contiguous part of the sequence (B, L, D), in the order of ranks; L may differ, and be 0.
        rows: R, how many, 0 or more.
        history: the R rows before the whole sequence (B, R, D), in x's dtype, as rank 0 gives it; zeros where that
            leaves it out. What other ranks give is not read.
        reset: True at the first step of each of several packed sequences (B, L); given by all ranks, or by none.
        group: a process group, a mesh of one dimension, or None for all ranks.

    Returns:
        The R rows before x (B, R, D), with zeros before the start of the sequence and, as
        `nondual.ops.causal_conv1d.causal_conv1d` has it, for those before the last reset among them; and x.

    Raises:
        TypeError: what is not a tensor.
        ValueError: on every rank alike: shapes, dtypes or devices that do not fit, or differ between ranks in more than
            L; a number of rows below 0; a history that rank 0 does not give.
        RuntimeError: no process group, a rank that does not answer, or a second derivative.
    """
    ranks = ranks_of(group)

    def check() -> dict[str, int]:
        check_tensors({"x": x}, {"history": history, "reset": reset})
        if x.ndim != 3:
            raise ValueError(f"x must be 3-dimensional (B, L, D), got {tuple(x.shape)}")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise ValueError(f"rows must be an integer of 0 or more, got {rows!r}")
        check_shapes(
            {
                "history": (history, (x.shape[0], rows, x.shape[2]), "(B, R, D)"),
                "reset": (reset, tuple(x.shape[:2]), "(B, L)"),
            }
        )
        check_kinds({"x": x, "history": history}, {}, reset)
        return {
            "length": x.shape[1],
            "batch size": x.shape[0],
            "width": x.shape[2],
            "number of rows": rows,
            "bytes of a number": x.element_size(),
            "reset": int(reset is not None),
            "history": int(history is not None),
            "need of gradients": int(need_of_gradients(x, history)),
        }

    sizes = compared(ranks, "rows_before", check, device_of(ranks, x), may_differ=("length", "history"))
    given = [of_rank["history"] for of_rank in sizes]
    first_rank_gives("rows_before", "history", given)
    start = rows if given[0] else 0  # a history is the first of rank 0's rows
    lengths = [of_rank["length"] for of_rank in sizes]
    pieces = _pieces(of_lengths([start + lengths[0], *lengths[1:]]), rows)
    return _RowsBefore.apply(ranks, pieces, rows, reset, x, history if ranks.rank == 0 else None)


Pieces = dict[tuple[int, int], tuple[range, int]]


def _pieces(layout: Layout, rows: int) -> Pieces:
    """For each (from, to) the rows that go there, by their place on the rank that sends them, and the place in the
    result of the first of them."""
    pieces: Pieces = {}
    starts = [layout.pieces[rank][0].start for rank in range(layout.size)]
    for to in range(1, layout.size):
        for source in range(to):
            held = layout.pieces[source][0]
            first, stop = max(held.start, starts[to] - rows), min(held.stop, starts[to])
            if first < stop:
                place = first - (starts[to] - rows)
                pieces[source, to] = range(first - held.start, stop - held.start), place
    return pieces


class _RowsBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks: Ranks, pieces: Pieces, rows: int, reset, x, history):
        ctx.ranks, ctx.pieces, ctx.started = ranks, pieces, 0 if history is None else rows
        ctx.shape, ctx.length = (x.shape[0], rows, x.shape[2]), x.shape[1]
        ctx.set_materialize_grads(False)
        held = x if history is None else torch.cat([history, x], 1)
        marks = None if reset is None else F.pad(reset, (ctx.started, 0)).to(x.dtype)[..., None]

        def packed(piece: range) -> Tensor:
            cut = as_slice(piece)
            return held[:, cut] if marks is None else torch.cat([held[:, cut], marks[:, cut]], -1)

        batch, _, width = x.shape
        before = x.new_zeros(batch, rows, width + (marks is not None))
        mine = {key: piece for key, piece in pieces.items() if ranks.rank in key}
        sends = [(to, packed(piece)) for (source, to), (piece, _) in mine.items() if source == ranks.rank]
        places = [(source, len(piece), place) for (source, to), (piece, place) in mine.items() if to == ranks.rank]
        receives = [(source, x.new_empty(batch, count, before.shape[2])) for source, count, _ in places]
        arrived = exchange(ranks, sends, receives, "rows_before").arrived()
        for (_, count, place), part in zip(places, arrived):
            before[:, place : place + count] = part
        if history is not None:
            before[..., :width] = history
        ctx.forgotten = None
        if marks is not None:
            began = before[..., width:] != 0  # (B, R, 1)
            ctx.forgotten = before_last_reset(began)
            before = before[..., :width].masked_fill(ctx.forgotten, 0)
        return before, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_before, d_x = gradients
        ranks, started, (batch, _, width) = ctx.ranks, ctx.started, ctx.shape
        like = d_x if d_before is None else d_before
        d_before = like.new_zeros(ctx.shape) if d_before is None else d_before
        d_before = d_before if ctx.forgotten is None else d_before.masked_fill(ctx.forgotten, 0)
        d_held = like.new_zeros(batch, started + ctx.length, width)
        if d_x is not None:
            d_held[:, started:] = d_x
        if started:
            d_held[:, :started] = d_before
        sends, places = [], []
        for (source, to), (piece, place) in ctx.pieces.items():
            if to == ranks.rank:
                sends.append((source, d_before[:, place : place + len(piece)]))
            if source == ranks.rank:
                places.append((to, piece))
        receives = [(to, like.new_empty(batch, len(piece), width)) for to, piece in places]
        for (_, piece), part in zip(places, exchange(ranks, sends, receives, "rows_before").arrived()):
            d_held[:, as_slice(piece)] += part
        return None, None, None, None, d_held[:, started:], d_held[:, :started] if started else None
