"""Causal attention in a window over a sequence that is cut: each rank fetches the keys in reach, and nothing else.

    window=3, of_lengths([4, 4])    rank 1 holds 4 5 6 7, and fetches 2 3
    its piece                       queries 4 5 6 7 over keys 2 3 4 5 6 7: `flash_attention`, aligned at the end

A piece of n rows needs the W - 1 keys before it, whoever holds them: its halo, as in programs for fluids that are cut
into blocks. What is fetched does not grow with N nor with P. All ranks know the layout and so plan all sends alike; a
key that two pieces of a rank need is fetched once. Backward the gradients of fetched keys go back to their owners, who
add them to their own.

Source: Beltagy et al. 2020, "Longformer" (2004.05150), section 3.1, for the window; the exchange is the halo of
stencil programs. Symbols as in `nondual.parallel.ring`; W the window.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.flash_attention import Impl, flash_attention
from nondual.parallel.exchange import Ranks, exchange
from nondual.parallel.pieces import Fragment, as_slice

Held = Sequence[Sequence[Fragment]]
"""What each rank holds, as `nondual.parallel.pieces.fragments` gives it."""


def windowed_attention(
    ranks: Ranks, held: Held, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, impl: Impl
) -> Tensor:
    """Causal attention in a window; `nondual.parallel.ring.ring_attention` has checked the inputs.

    Args:
        ranks: the group.
        held: what each rank holds.
        q: this rank's queries (B, H, n, D).
        k: its keys (B, G, n, D).
        v: its values (B, G, n, Dv).
        window: how many keys a query sees, its own included.
        scale: factor on q · k.
        impl: as in `flash_attention`.

    Returns:
        out (B, H, n, Dv) in q's dtype.
    """
    # --8<-- [start:halo]
    k_fetched, v_fetched = _Fetch.apply(k, v, ranks, plan(ranks, held, window))
    k, v = (torch.cat(both, 2) for both in ((k, k_fetched), (v, v_fetched)))
    places = _places(held, ranks.rank, window)
    outs = []
    for piece in held[ranks.rank] or [Fragment(range(0), 0, 0)]:  # without rows too there is a way back to the keys
        keys = [slice(at, at + len(part)) for part, at in _overlaps(reach(piece, window, own=True), places)]
        k_i, v_i = (torch.cat([x[:, :, rows] for rows in keys or [slice(0)]], 2) for x in (k, v))
        outs.append(flash_attention(q[:, :, as_slice(piece.rows)], k_i, v_i, window=window, scale=scale, impl=impl))
    return torch.cat(outs, 2)
    # --8<-- [end:halo]


# --- what is fetched -----------------------------------------------------------------------------------------------


def reach(piece: Fragment, window: int, *, own: bool = False) -> range:
    """The keys before a piece that its queries see, in its own document; with `own`, those of the piece too."""
    start, stop = piece.positions.start, piece.positions.stop
    return range(max(piece.first, start - window + 1), stop if own else start)


def needed(held: Held, rank: int, window: int) -> list[range]:
    """The positions that a rank fetches from others: in order, each once.

    Args:
        held: what each rank holds.
        rank: which one.
        window: how many keys a query sees, its own included.
    """
    found: list[range] = []
    end = 0  # what lies before is found, or the rank's own
    for piece in sorted(held[rank], key=lambda piece: piece.positions.start):
        keys = reach(piece, window)
        keys = range(max(keys.start, end), keys.stop)
        if len(keys):
            found.append(keys)
        end = piece.positions.stop
    return found


def plan(ranks: Ranks, held: Held, window: int) -> list[tuple[list[range], int]]:
    """For each rank, the rows of this rank that it is sent, and how many this rank is sent by it."""
    of_rank = [needed(held, rank, window) for rank in range(ranks.size)]
    places = list(map(_held_places, held))
    own = places[ranks.rank]
    return [
        (
            [range(at, at + len(part)) for keys in of_other for part, at in _overlaps(keys, own)],
            sum(len(part) for keys in of_rank[ranks.rank] for part, _ in _overlaps(keys, of_places)),
        )
        for of_other, of_places in zip(of_rank, places)
    ]


def _places(held: Held, rank: int, window: int) -> list[tuple[range, int]]:
    """Where positions stand on a rank: its own rows, and then those of each rank from which it fetches."""
    places = _held_places(held[rank])
    row = sum(len(piece.positions) for piece in held[rank])
    fetched = needed(held, rank, window)
    for of_other in map(_held_places, held):
        for keys in fetched:
            for part, _ in _overlaps(keys, of_other):
                places.append((part, row))
                row += len(part)
    return places


def _held_places(pieces: Sequence[Fragment]) -> list[tuple[range, int]]:
    return [(piece.positions, piece.row) for piece in pieces]


def _overlaps(keys: range, places: Sequence[tuple[range, int]]) -> list[tuple[range, int]]:
    """The parts of some positions that stand in these places, in the order of positions, and their first rows."""
    found = []
    for positions, row in sorted(places, key=lambda place: place[0].start):
        part = range(max(keys.start, positions.start), min(keys.stop, positions.stop))
        if len(part):
            found.append((part, row + part.start - positions.start))
    return found


# --- fetching ------------------------------------------------------------------------------------------------------


class _Fetch(torch.autograd.Function):
    """Rows of keys and values from other ranks, and their gradients back."""

    @staticmethod
    def forward(ctx, k, v, ranks, planned):
        ctx.ranks, ctx.planned, ctx.rows = ranks, planned, k.shape[2]
        sends, receives = [], []
        for other, (rows, count) in enumerate(planned):
            for x in (k, v):
                if rows:
                    sends.append((other, torch.cat([x[:, :, as_slice(part)] for part in rows], 2)))
                if count:
                    receives.append((other, _empty(x, count)))
        arrived = exchange(ranks, sends, receives, "ring_attention, the keys in a window").arrived()
        return tuple(torch.cat([x[:, :, :0], *arrived[kind::2]], 2) for kind, x in enumerate((k, v)))

    @staticmethod
    def backward(ctx, *gradients):
        return *_Return.apply(ctx.ranks, ctx.planned, ctx.rows, *gradients), None, None


class _Return(torch.autograd.Function):
    """The gradients of fetched rows go to their owners, which add them up: dk and dv of n rows."""

    @staticmethod
    def forward(ctx, ranks, planned, n, *gradients):
        sends, receives = [], []
        parts = [x.split([count for _, count in planned], 2) for x in gradients]
        for other, (rows, count) in enumerate(planned):
            for of_kind in parts:
                if count:
                    sends.append((other, of_kind[other]))
                if rows:
                    receives.append((other, _empty(of_kind[other], sum(map(len, rows)))))
        arrived = exchange(ranks, sends, receives, "ring_attention, the gradients of keys in a window").arrived()
        sums = [_empty(x, n, accumulation_dtype(x.dtype)).zero_() for x in gradients]
        sent = [rows for rows, _ in planned if rows]
        for kind, total in enumerate(sums):
            for rows, came in zip(sent, arrived[kind::2]):
                for part, piece in zip(rows, came.split([len(part) for part in rows], 2)):
                    total[:, :, as_slice(part)] += piece
        return tuple(total.to(x.dtype) for total, x in zip(sums, gradients))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("ring_attention has no second derivative; on one device nondual.ops.attention.attention has")


def _empty(x: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """As x, with another number of rows."""
    return x.new_empty(*x.shape[:2], rows, x.shape[3], dtype=x.dtype if dtype is None else dtype)
