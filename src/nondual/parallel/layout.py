"""Which rank of a group holds which positions of a sequence.

    contiguous(10, 2)    rank 0: 0 1 2 3 4          rank 1: 5 6 7 8 9
    zigzag(12, 2)        rank 0: 0 1 2 | 9 10 11    rank 1: 3 4 5 | 6 7 8

In causal attention a late position looks at more keys than an early one, so that with contiguous pieces the last of P
ranks has almost twice the mean work. In zig-zag order each rank has one piece from the front and the piece as far from
the back, and the work is even.

Source of the zig-zag order: Zhu 2024, ring-flash-attention, and Llama 3 (Dubey et al. 2024, 2407.21783), section 3.3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """For each rank the pieces of the sequence that it holds, in the order in which it holds them.

    Attributes:
        pieces: pieces[r] are the ranges of positions of rank r; a rank may hold none. Together they are 0 to N - 1,
            each position once.

    Raises:
        ValueError: pieces that leave a position out, hold one twice, or go backwards.
    """

    pieces: tuple[tuple[range, ...], ...]

    def __post_init__(self) -> None:
        end = 0
        for piece in sorted((p for of_rank in self.pieces for p in of_rank if len(p)), key=lambda p: p.start):
            if piece.step != 1 or piece.start != end:
                raise ValueError(
                    f"pieces must hold each position from 0 on once, in ranges of step 1, got {piece} where {end} is "
                    "the first position that no piece before it holds"
                )
            end = piece.stop
        if not self.pieces:
            raise ValueError("pieces must be there for 1 rank or more, got none")

    @property
    def length(self) -> int:
        """N, the positions of the whole sequence."""
        return sum(self.lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many positions each rank holds."""
        return tuple(sum(map(len, of_rank)) for of_rank in self.pieces)

    @property
    def size(self) -> int:
        """P, the ranks."""
        return len(self.pieces)

    def positions(self, rank: int, *, device: torch.device | str | None = None) -> Int[Tensor, "n"]:
        """The positions of a rank's rows (n), in the order in which it holds them.

        Args:
            rank: 0 to P - 1.
            device: of the result.
        """
        return torch.cat([torch.arange(p.start, p.stop, device=device) for p in (range(0), *self.pieces[rank])])

    def shard(self, x: Tensor, rank: int, dim: int = -2) -> Tensor:
        """A rank's part of a whole sequence: x[..., positions, ...], a copy.

        Args:
            x: a tensor with N positions along dim.
            rank: 0 to P - 1.
            dim: the dimension of the positions; -2 for (B, N, E) and (B, H, N, D).

        Raises:
            ValueError: x has not N positions.
        """
        if x.shape[dim] != self.length:
            raise ValueError(f"x must have the layout's {self.length} positions along dim={dim}, got {tuple(x.shape)}")
        return x.index_select(dim, self.positions(rank, device=x.device))

    def join(self, parts: Sequence[Tensor], dim: int = -2) -> Tensor:
        """The whole sequence from the parts of all ranks: the inverse of `shard`.

        Args:
            parts: the part of each rank, in the order of ranks.
            dim: the dimension of the positions.

        Raises:
            ValueError: another number of parts, or a part of another length.
        """
        if tuple(part.shape[dim] for part in parts) != self.lengths:
            raise ValueError(f"parts must have the lengths {self.lengths}, got {[tuple(p.shape) for p in parts]}")
        order = torch.cat([self.positions(rank, device=parts[0].device) for rank in range(self.size)])
        return torch.cat(list(parts), dim).index_select(dim, order.argsort())


def contiguous(length: int, size: int) -> Layout:
    """Each rank one piece, in order; where P does not divide N the first ranks hold one position more.

    Args:
        length: N, 0 or more.
        size: P, the ranks, 1 or more.

    Raises:
        ValueError: a length or size out of range.
    """
    return of_lengths([len(piece) for piece in _even(length, size)])


def of_lengths(lengths: Sequence[int]) -> Layout:
    """Each rank one piece, in order, of the length that is named for it.

    Args:
        lengths: for each rank how many positions it holds, 0 or more.

    Raises:
        ValueError: no lengths, or a negative one.
    """
    if not lengths or min(lengths) < 0:
        raise ValueError(f"lengths must be 0 or more, one for each rank, got {list(lengths)}")
    ends = [sum(lengths[: rank + 1]) for rank in range(len(lengths))]
    return Layout(tuple((range(end - n, end),) for end, n in zip(ends, lengths)))


def zigzag(length: int, size: int) -> Layout:
    """Each rank one piece from the front and the piece as far from the back, so that causal work is even.

    Args:
        length: N, 0 or more. It is cut in 2 P pieces that differ in length by at most one position.
        size: P, the ranks, 1 or more.

    Raises:
        ValueError: a length or size out of range.
    """
    pieces = _even(length, 2 * size)
    return Layout(tuple((pieces[rank], pieces[-1 - rank]) for rank in range(size)))


def _even(length: int, pieces: int) -> list[range]:
    """0 to length - 1 in pieces whose lengths differ by at most one, longer ones first."""
    if length < 0 or pieces < 1:
        raise ValueError(f"length must be 0 or more and size 1 or more, got {length} and {pieces}")
    short, longer = divmod(length, pieces)
    ends = [i * short + min(i, longer) for i in range(pieces + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]
