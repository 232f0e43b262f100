"""Which rows of queries see which rows of keys, where a sequence and its documents are cut into pieces.

Pieces of a layout are ranges without a common position, and they are cut again where a document ends. So of two of them
in one document the keys are the queries' own positions (masked by causality), or all come before (no mask), or all come
after (nothing to compute, if causal).

    zigzag(12, 2)             rank 0 holds 0 1 2 | 9 10 11, and rank 1 holds 3 4 5 | 6 7 8
    queries of 0, keys of 0   0-2 see 0-2 causally, 9-11 see 0-2 and, causally, 9-11
    queries of 0, keys of 1   9-11 see 3-8
    queries of 1, keys of 0   3-8 see 0-2

Half of a block with another rank, whichever rank it is: so the work is even. Symbols as in `nondual.parallel.layout`.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from nondual.parallel.layout import Layout


class Fragment(NamedTuple):
    """A piece of a rank, or the part of it that lies in one document.

    Attributes:
        positions: in the whole sequence.
        first: the position at which its document begins.
        row: its first row among those of the rank.
    """

    positions: range
    first: int
    row: int

    @property
    def rows(self) -> range:
        """Its rows among those of the rank."""
        return range(self.row, self.row + len(self.positions))


class Pair(NamedTuple):
    """Some queries of one rank, and the keys of a rank that each of them sees.

    Attributes:
        rows: of the queries.
        keys: rows of the keys, among those of their rank.
        causal: True where the two are the same positions, and each query sees its own and those before.
    """

    rows: range
    keys: range
    causal: bool


def as_slice(rows: range) -> slice:
    """What takes these rows from a tensor.

    Args:
        rows: a range of step 1.
    """
    return slice(rows.start, rows.stop)


def fragments(layout: Layout, rank: int, documents: Sequence[int] | None = None) -> list[Fragment]:
    """What a rank holds, cut at the borders of documents; empty parts are left out.

    Args:
        layout: which rank holds what.
        rank: 0 to P - 1.
        documents: the lengths of the sequences that are packed one after another; None for one.
    """
    borders = list(accumulate([layout.length] if documents is None else documents, initial=0))
    found, row = [], 0
    for piece in layout.pieces[rank]:
        for first, end in pairwise(borders):
            part = range(max(piece.start, first), min(piece.stop, end))
            if len(part):
                found.append(Fragment(part, first, row + part.start - piece.start))
        row += len(piece)
    return found


def pairs(queries: Sequence[Fragment], keys: Sequence[Fragment], causal: bool) -> list[Pair]:
    """What is to be computed of one rank's queries with the keys of one rank, in as few parts as rows allow.

    Args:
        queries: what a rank holds.
        keys: what the same rank or another holds.
        causal: a query sees no later key.
    """
    in_document: dict[int, list[Fragment]] = {}
    for of_keys in keys:
        in_document.setdefault(of_keys.first, []).append(of_keys)
    found = []
    for of_queries in queries:
        for of_keys in in_document.get(of_queries.first, ()):
            if not causal or of_keys.positions.start <= of_queries.positions.start:
                own = causal and of_keys.positions == of_queries.positions
                found.append(Pair(of_queries.rows, of_keys.rows, own))
    return _turned(_joined(_turned(_joined(found))))


def _joined(found: list[Pair]) -> list[Pair]:
    """Pairs without a mask whose queries are the same and whose keys lie side by side become one."""
    joined: list[Pair] = []
    for pair in sorted(found, key=lambda pair: (pair.causal, pair.rows.start, pair.rows.stop, pair.keys.start)):
        before = joined[-1] if joined else None
        if before and not pair.causal and before.rows == pair.rows and before.keys.stop == pair.keys.start:
            joined[-1] = before._replace(keys=range(before.keys.start, pair.keys.stop))
        else:
            joined.append(pair)
    return joined


def _turned(found: list[Pair]) -> list[Pair]:
    """Queries and keys change places."""
    return [Pair(pair.keys, pair.rows, pair.causal) for pair in found]
