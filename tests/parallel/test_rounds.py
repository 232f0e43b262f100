"""The rounds of keys and values: who computes how much, what is under way meanwhile, and what a rank holds."""

import pytest
import torch
from ring_cases import D, drawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nondual.ops.flash_attention import partial, reference
from nondual.parallel import contiguous, ring_attention, rounds, traffic, zigzag

N = 192  # positions
TILE = (12, 12)  # fewer numbers than a rank has in any tensor of its rows

# --- in every rank -------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers that any one tensor held which an operation made while this was on."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.numel())
        return out


def rows_of(layout, rank, heads=6):
    return [layout.shard(x, rank) for x in drawn(heads, 2, layout.length, 1)]


def passes(layout, q, k, v, d_out):
    """Forward and backward, causal."""
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(ring_attention(*leaves, layout, causal=True), leaves, d_out)


def measured(rank, size):
    """Scores that are computed under two layouts; the largest tensor; what happens in which order; messages."""
    partial.TILE = TILE
    scores = reference._scores
    count = [0]

    def counted(*args):
        s = scores(*args)
        count[0] += s.numel()
        return s

    reference._scores = counted
    computed = []
    for layout in (zigzag(N, size), contiguous(N, size), zigzag(N + 5, size)):
        count[0] = 0
        passes(layout, *rows_of(layout, rank))
        computed.append(count[0])
    reference._scores = scores

    layout = zigzag(N, size)
    rows = rows_of(layout, rank, heads=2)
    with Largest() as seen:
        passes(layout, *rows)

    events = []
    added, exchanged = rounds.add_, rounds.exchange

    def adds(*args):
        events.append("a")
        added(*args)

    def exchanges(*args):
        pending = exchanged(*args)
        events.append("s")

        class Waited:
            def arrived(self):
                events.append("w")
                return pending.arrived()

        return Waited()

    rounds.add_, rounds.exchange = adds, exchanges
    layout = zigzag(8 * size, size)
    rows = rows_of(layout, rank)
    with traffic() as sent:
        ring_attention(*rows[:3], layout, causal=True)
    rounds.add_, rounds.exchange = added, exchanged
    with traffic() as both:
        passes(layout, *rows)
    return computed, seen.numbers, "".join(events), sent.messages, both.messages


# --- tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(in_ranks):
    """said[P][rank]: what `measured` returns."""
    return in_ranks(measured, timeout=150)


def test_causal_work_is_even_in_zig_zag_order_counted_in_scores_that_are_computed(said):
    once = said[1][0][0][0]
    for size, ranks in said.items():
        even, contiguously, uneven = zip(*(of_rank[0] for of_rank in ranks))
        assert max(even) == min(even) and sum(even) <= once * 1.2  # tiles on the diagonal are computed whole
        assert max(uneven) <= 1.05 * sum(uneven) / size
        if size > 1:
            assert max(contiguously) > 1.3 * sum(contiguously) / size


def test_the_largest_tensor_of_a_rank_falls_as_one_over_p(said):
    whole = said[1][0][1]
    assert whole == 2 * 2 * N * D  # (B, H, N, D): nothing is N x N
    for size, ranks in said.items():
        assert {of_rank[1] * size for of_rank in ranks} == {whole}


def test_the_next_block_is_under_way_while_this_one_is_used(said):
    for size, ranks in said.items():
        for of_rank in ranks:
            events = of_rank[2]
            assert events == "saaaw" + "saw" * (size - 2) + "a" if size > 1 else events == "aaa"


def test_messages_are_counted(said):
    for size, ranks in said.items():
        steps = size - 1
        assert {of_rank[3] for of_rank in ranks} == {2 * steps}
        assert {of_rank[4] for of_rank in ranks} == {2 * steps + 2 * steps + (2 * size if steps else 0)}
