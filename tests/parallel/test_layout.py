"""Layouts: every position on one rank, there and back, and causal work that is even in zig-zag order."""

import re

import pytest
import torch

from nondual.parallel import Layout, contiguous, of_lengths, zigzag


def test_by_hand():
    assert contiguous(10, 3).pieces == ((range(0, 4),), (range(4, 7),), (range(7, 10),))
    assert zigzag(12, 2).pieces == ((range(0, 3), range(9, 12)), (range(3, 6), range(6, 9)))
    assert of_lengths([3, 0, 2]).pieces == ((range(0, 3),), (range(3, 3),), (range(3, 5),))
    assert zigzag(12, 2).positions(0).tolist() == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize("make", [contiguous, zigzag])
@pytest.mark.parametrize("length", [0, 1, 5, 17, 24])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_shards_hold_every_position_once_and_join_again(make, length, size):
    layout = make(length, size)
    x = torch.randn(2, 3, length, 5)
    parts = [layout.shard(x, rank) for rank in range(size)]
    assert layout.length == length and layout.size == size
    assert [part.shape[-2] for part in parts] == list(layout.lengths)
    assert max(layout.lengths) - min(layout.lengths) <= 2
    assert torch.equal(layout.join(parts), x)
    assert torch.equal(layout.join([part.transpose(0, 2) for part in parts], dim=0), x.transpose(0, 2))


def pairs_of(layout: Layout, rank: int) -> int:
    """How many keys the queries of a rank see, all together."""
    return int((layout.positions(rank) + 1).sum())


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_causal_work_is_even_in_zig_zag_order_and_not_in_contiguous_pieces(size):
    length = 64 * size
    share = length * (length + 1) / 2 / size
    for rank in range(size):
        assert pairs_of(zigzag(length, size), rank) == share  # exactly: each pair of pieces has the same mean position
    assert pairs_of(contiguous(length, size), size - 1) / share == pytest.approx(2 - 1 / size, rel=0.01)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: contiguous(-1, 2), "length must be 0 or more and size 1 or more, got -1 and 2"),
        (lambda: zigzag(8, 0), "length must be 0 or more and size 1 or more, got 8 and 0"),
        (lambda: of_lengths([]), "lengths must be 0 or more, one for each rank, got []"),
        (lambda: of_lengths([2, -1]), "lengths must be 0 or more, one for each rank, got [2, -1]"),
        (lambda: Layout(()), "pieces must be there for 1 rank or more, got none"),
        (lambda: Layout(((range(0, 2),), (range(1, 3),))), "got range(1, 3) where 2 is the first position"),
        (lambda: Layout(((range(1, 2),),)), "got range(1, 2) where 0 is the first position"),
        (lambda: Layout(((range(0, 4, 2),),)), "pieces must hold each position from 0 on once, in ranges of step 1"),
        (lambda: contiguous(4, 2).shard(torch.ones(1, 5, 3), 0), "x must have the layout's 4 positions along dim=-2"),
        (lambda: contiguous(4, 2).join([torch.ones(1, 2, 3)]), "parts must have the lengths (2, 2), got [(1, 2, 3)]"),
    ],
)
def test_what_does_not_fit_is_refused(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
