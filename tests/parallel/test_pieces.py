"""Which rows see which: every pair that a mask allows once, no other, in few parts, and as many on every rank."""

import pytest
import torch

from nondual.parallel import Layout, contiguous, of_lengths, zigzag
from nondual.parallel.pieces import Fragment, Pair, fragments, pairs

BACKWARDS = Layout(((range(9, 13), range(2, 5)), (range(5, 9),), (range(0, 2),)))


def test_by_hand():
    held = [fragments(zigzag(12, 2), rank) for rank in range(2)]
    assert held[0] == [Fragment(range(0, 3), 0, 0), Fragment(range(9, 12), 0, 3)]
    early, late, both = range(0, 3), range(3, 6), range(0, 6)
    own = [Pair(late, early, False), Pair(early, early, True), Pair(late, late, True)]
    assert pairs(held[0], held[0], causal=True) == own
    assert pairs(held[0], held[1], causal=True) == [Pair(late, both, False)]  # one product for two pieces of keys
    assert pairs(held[1], held[0], causal=True) == [Pair(both, early, False)]
    assert pairs(held[1], held[0], causal=False) == [Pair(both, both, False)]
    packed = fragments(zigzag(12, 2), 0, (2, 7, 0, 3))
    assert packed == [Fragment(range(0, 2), 0, 0), Fragment(range(2, 3), 2, 2), Fragment(range(9, 12), 9, 3)]


@pytest.mark.parametrize("documents", [None, (13,), (5, 0, 4, 4), (1,) * 13])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "layout", [zigzag(13, 3), contiguous(13, 4), of_lengths([0, 11, 0, 2]), BACKWARDS, zigzag(3, 4)]
)
def test_each_pair_that_is_allowed_is_computed_once_and_no_other(layout, causal, documents):
    if documents is not None and layout.length < 13:
        documents = (1, 2)
    of = torch.arange(len(documents or (1,))).repeat_interleave(torch.tensor(documents or (layout.length,)))
    allowed = of[:, None] == of
    if causal:
        allowed = allowed.tril()
    held = [fragments(layout, rank, documents) for rank in range(layout.size)]
    for rank in range(layout.size):
        for source in range(layout.size):
            seen = torch.zeros(layout.lengths[rank], layout.lengths[source], dtype=torch.int64)
            for pair in pairs(held[rank], held[source], causal):
                assert len(pair.rows) and len(pair.keys)
                part = torch.ones(len(pair.rows), len(pair.keys), dtype=torch.int64)
                rows, keys = (slice(x.start, x.stop) for x in pair[:2])
                seen[rows, keys] += part.tril() if pair.causal else part
            assert torch.equal(seen, allowed[layout.positions(rank)][:, layout.positions(source)].long())


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_in_zig_zag_order_every_step_is_half_a_block_on_every_rank(size):
    layout = zigzag(16 * size, size)
    held = [fragments(layout, rank) for rank in range(size)]
    for rank in range(size):
        for source in set(range(size)) - {rank}:
            (pair,) = pairs(held[rank], held[source], causal=True)  # and in one part
            assert len(pair.rows) * len(pair.keys) == 16 * 16 // 2 and not pair.causal
