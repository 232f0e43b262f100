"""The formulas of cost: equal to what ranks count as they send, to what brute force counts, and to cases by hand."""

import re

import pytest
import torch

from nondual.parallel import (
    Layout,
    all_to_all_attention,
    contiguous,
    of_lengths,
    ring_attention,
    traffic,
    zigzag,
)
from nondual.parallel.cost import (
    LINKS,
    Heads,
    Link,
    all_to_all_bytes,
    all_to_all_time,
    halo_bytes,
    multiply_adds,
    pairs,
    ring_bytes,
    ring_time,
    state_bytes,
    state_time,
)
from nondual.parallel.scan import parallel_linear_attention

LAYOUTS = [
    contiguous(17, 3),
    zigzag(24, 4),
    zigzag(7, 5),
    of_lengths([5, 0, 1, 11]),
    contiguous(0, 2),
    Layout(((range(4, 9), range(0, 2)), (), (range(2, 4), range(9, 13)))),  # out of order
    contiguous(13, 1),
]


# --- pairs and bytes by brute force --------------------------------------------------------------------------------


def seen(layout, *, causal=True, window=None):
    """For each rank, which positions its queries see: a table of queries and keys."""
    i = torch.arange(layout.length)
    table = (i[:, None] >= i) if causal else torch.ones(len(i), len(i), dtype=torch.bool)
    if window is not None:
        table &= i[:, None] - i < window
    return [table[layout.positions(rank)] for rank in range(layout.size)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", [{}, {"causal": False}, {"window": 1}, {"window": 4}, {"window": 100}])
def test_pairs_are_those_of_the_whole_table(layout, how):
    rows = seen(layout, **how)
    counted = [[int(r[:, layout.positions(rank)].sum()) for rank in range(layout.size)] for r in rows]
    assert pairs(layout, **how).tolist() == counted


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_a_halo_holds_each_key_in_reach_once(layout, window):
    heads = Heads(6, 3, 5, 7, batch=2, dtype=torch.float16)
    reached = [r.any(0) for r in seen(layout, window=window)]
    if window >= layout.length:
        assert all(halo_bytes(heads, layout, r, window) == ring_bytes(heads, layout, r) for r in range(layout.size))
        return
    for rank in range(layout.size):
        others = [other for other in range(layout.size) if other != rank]
        sent = sum(int(reached[other][layout.positions(rank)].sum()) for other in others)
        returned = sum(int(reached[rank][layout.positions(other)].sum()) for other in others)
        of_position = 2 * 3 * (5 + 7)
        assert halo_bytes(heads, layout, rank, window) == (sent * of_position * 2, returned * of_position * 2)


def test_bytes_by_hand():
    """Two ranks of 4 positions; 4 heads of queries and 2 of keys, width 8, in bfloat16."""
    heads, layout = Heads(4, 2, 8), contiguous(8, 2)
    of_block = 4 * 2 * (8 + 8)  # positions, heads, widths of a key and a value
    assert ring_bytes(heads, layout, 0) == (of_block * 2, of_block * 2 + 2 * of_block * 4)
    # Half of 4 rows of 4 + 2 + 2 heads, and half of the heads of the other rank's 4 rows.
    assert all_to_all_bytes(heads, layout, 0) == (4 * 4 * 8 * 2 + 4 * 2 * 8 * 2,) * 2
    assert all_to_all_bytes(Heads(4, 1, 8), layout, 0) == all_to_all_bytes(heads, layout, 0)  # one head, sent twice
    assert halo_bytes(heads, layout, 0, window=3) == (2 * 2 * 16 * 2, 0)  # two keys reach into the second rank
    assert halo_bytes(heads, layout, 1, window=3) == (0, 2 * 2 * 16 * 2)  # and their gradients come back


def test_one_rank_sends_nothing_and_empty_sequences_cost_nothing():
    heads = Heads(8, 2, 16)
    for layout in (contiguous(40, 1), zigzag(0, 4)):
        for rank in range(layout.size):
            assert ring_bytes(heads, layout, rank) == all_to_all_bytes(heads, layout, rank) == (0, 0)
            assert halo_bytes(heads, layout, rank, 5) == (0, 0)
    assert ring_time(heads, contiguous(0, 1), LINKS[0], 1e12).total == 0


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_a_ring_and_all_to_all_send_the_same_where_ranks_are_one_more_than_heads_to_a_key_head(size):
    """With equal parts: the ring sends 2 G of P - 1 blocks, all-to-all 2 (H + G) of (P - 1) / P of one."""
    layout = contiguous(64 * size, size)
    for ratio in (size - 2, size - 1, size):
        if ratio < 1:
            continue
        heads = Heads(ratio * size, size, 16)
        ring, swap = ring_bytes(heads, layout, 0).forward, all_to_all_bytes(heads, layout, 0).forward
        assert (ring > swap) == (size > ratio + 1) and (ring == swap) == (size == ratio + 1)


def test_work_is_even_in_zig_zag_order_in_every_step():
    size, length = 6, 6 * 2 * 50
    table = pairs(zigzag(length, size))
    assert table.sum() == length * (length + 1) // 2
    for step in range(1, size):
        assert {int(table[rank, (rank - step) % size]) for rank in range(size)} == {2 * 50 * 50}
    last = pairs(contiguous(length, size)).sum(1)
    assert last[-1] / last.sum() == pytest.approx((2 * size - 1) / size**2, rel=0.01)


def test_a_state_by_hand():
    """A state of 100 numbers and a decay of 3, directly among three ranks; a large one by doubling among five."""
    assert [state_bytes(100, 3, 3, rank) for rank in range(3)] == [(800, 0), (412, 412), (0, 800)]
    state, with_decay = 2**20 * 4, (2**20 + 3) * 4
    sent = [2**k for k in range(3)]
    for rank in range(5):
        forward = sum(with_decay if rank >= span else state for span in sent if rank + span < 5)
        assert state_bytes(2**20, 3, 5, rank).forward == state_bytes(2**20, 3, 5, 4 - rank).backward == forward
    assert state_bytes(100, 3, 1, 0) == (0, 0)
    found = state_time(250_000, 0, 2, Link("slow", 1e6, 0.5), compute=2.0)
    assert found == pytest.approx((2 + 1 + 0.5, 2, 1, 0.5))


def test_a_state_sends_a_thousandth_of_a_ring_from_this_length_on():
    """64 heads of width 128, against 8 heads of keys: 4 KiB a position, 4 MiB a state, sent twice by the first of 4."""
    state, size = 64 * 128 * 128, 4
    assert state_bytes(state, 64, size, 0).forward == 2 * state * 4
    ring = [ring_bytes(Heads(64, 8, 128), contiguous(length, size), 0).forward for length in (2_730_664, 2_730_668)]
    assert ring[0] < 1000 * 2 * state * 4 <= ring[1]


# --- time ----------------------------------------------------------------------------------------------------------


def test_times_by_hand():
    """Two ranks of 100 positions without causality: each step computes 10,000 pairs and one block travels."""
    heads, layout = Heads(1, 1, 8, dtype=torch.float32), contiguous(200, 2)
    step = 2 * 100 * 100 * (8 + 8) / 1e9
    sending = 100 * 16 * 4 / 1e6
    assert sending > step
    found = ring_time(heads, layout, Link("slow", 1e6, 0.5), 1e9, causal=False)
    assert found == pytest.approx((sending + step + 0.5, 2 * step, sending, 0.5))
    fast = ring_time(heads, layout, Link("fast", 1e12, 0.5), 1e9, causal=False)
    assert fast.total == pytest.approx(2 * step + 0.5)  # hidden
    back = ring_time(heads, layout, Link("slow", 1e6, 0.5), 1e9, causal=False, backward=True)
    # A block goes during the first step, gradients of the other's block during the second, and then come home.
    of_step = step * 5 / 2
    total = max(of_step, sending) + max(of_step, sending) + sending + 1.5
    assert back == pytest.approx((total, 2 * of_step, 3 * sending, 1.5))

    heads = Heads(2, 2, 8, dtype=torch.float32)
    found = all_to_all_time(heads, layout, Link("slow", 1e6, 0.5), 1e9, causal=False)
    assert found == pytest.approx(
        (4 * step + 4 * sending / 2 + 1, 4 * step, 4 * sending / 2, 1)
    )  # two waits, one each way
    assert all_to_all_time(heads, zigzag(64, 1), Link("slow", 1e6, 0.5), 1e9).latency == 0


@pytest.mark.parametrize("link", LINKS, ids=lambda link: link.name)
def test_traffic_hides_from_so_many_positions_a_rank_on(link):
    """In zig-zag order a step computes n^2 / 2 pairs: as long as sending n rows where n = itemsize G rate / (H b)."""
    rate, size = 4e14, 4
    n = 2 * 8 * rate / (64 * link.bandwidth)
    for factor, hidden in ((0.9, False), (1.1, True)):
        heads, layout = Heads(64, 8, 128), zigzag(size * 2 * round(factor * n / 2), size)
        found = ring_time(heads, layout, link, rate)
        waits = found.total - found.latency - found.compute
        assert (waits < 1e-9 * found.compute) == hidden


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("time_of", [ring_time, all_to_all_time])
def test_times_grow_with_length_and_fall_with_a_better_machine(time_of, backward):
    heads, link, rate = Heads(64, 8, 128), LINKS[1], 4e14

    def total(length=1 << 16, size=8, link=link, rate=rate, make=zigzag):
        found = time_of(heads, make(length, size), link, rate, backward=backward)
        assert max(found[1:]) <= found.total <= sum(found[1:]) * (1 + 1e-12)
        return found.total

    lengths = [total(1 << power) for power in range(8, 21)]
    assert lengths == sorted(lengths)
    short = [total(1 << 12, link=link) for link in LINKS]
    assert short == sorted(set(short))
    assert total(rate=2 * rate) <= total()
    assert total(1 << 20, size=16) < total(1 << 20, size=8) < total(1 << 20, size=1)
    slower = total(1 << 20, make=contiguous) / total(1 << 20)
    assert slower == pytest.approx(2 - 1 / 8, rel=0.01) if time_of is ring_time else slower == 1


def test_a_thousand_ranks_and_ten_million_positions_are_counted_exactly():
    layout = zigzag(10_240_000, 1024)
    table = pairs(layout)
    assert int(table.sum()) == 10_240_000 * 10_240_001 // 2
    assert 0 < ring_time(Heads(64, 8, 128), layout, LINKS[0], 4e14).total < 60


def test_multiply_adds_are_two_products_forward_and_five_backward():
    heads = Heads(6, 3, 5, 7, batch=2)
    assert multiply_adds(heads, 11) == 2 * 6 * 11 * (5 + 7)
    assert multiply_adds(heads, 11, backward=True) == 2 * 6 * 11 * (5 + 7 + 5 + 5 + 7)


# --- counted in ranks ----------------------------------------------------------------------------------------------


def counted(call, *given, **how):
    """Bytes that this rank sends in the forward and in the backward pass."""
    with traffic() as forward:
        outputs = call(*given, **how)
    with traffic() as backward:
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
    return [forward.bytes, backward.bytes]


def all_calls(rank, size):
    """For each way and layout: what this rank counted, and the formula."""
    found = []
    uneven = of_lengths([9] + [0] * (size - 2) + [4])
    for dtype, layout in ((torch.bfloat16, zigzag(23, size)), (torch.float64, uneven)):
        heads = Heads(6 * size, 6, 5, 7, batch=2, dtype=dtype)
        n = layout.lengths[rank]
        shapes = [(2, heads.query, n, 5), (2, heads.key, n, 5), (2, heads.key, n, 7)]
        for call, how, formula in (
            (ring_attention, {"causal": True}, ring_bytes(heads, layout, rank)),
            (ring_attention, {"causal": True, "window": 4}, halo_bytes(heads, layout, rank, 4)),
            (ring_attention, {"causal": True, "window": 99}, halo_bytes(heads, layout, rank, 99)),
            (all_to_all_attention, {"causal": True}, all_to_all_bytes(heads, layout, rank)),
        ):
            qkv = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
            name = f"{call.__name__} {how} {dtype} {layout.lengths}"
            found.append([name, counted(call, *qkv, layout, **how), list(formula)])
    n = contiguous(17, size).lengths[rank]
    for width, gates, decay in ((5, {"log_decay": -torch.rand(2, 3, n)}, 2 * 3), (100, {}, 1)):  # direct, by doubling
        shapes = [(2, 3, n, width), (2, 3, n, width), (2, 3, n, 7 * width)]
        qkv = [torch.randn(shape, requires_grad=True) for shape in shapes]
        count = counted(lambda *x, gates=gates: parallel_linear_attention(*x, **gates)[0], *qkv)
        formula = state_bytes(2 * 3 * width * 7 * width, decay, size, rank)
        found.append([f"state of width {width}", count, list(formula)])
    return found


def test_every_formula_is_what_ranks_count_as_they_send(in_ranks):
    for of_ranks in in_ranks(all_calls, sizes=(3, 4), timeout=150).values():
        for rank, found in enumerate(of_ranks):
            for name, count, formula in found:
                assert count == formula, (len(of_ranks), rank, name)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Heads(0, 1, 8), "heads, widths and batch must be 1 or more, got (0, 1, 8, 8, 1)"),
        (lambda: Heads(6, 4, 8), "heads of keys must divide those of queries, got 4 and 6"),
        (lambda: Heads(6, 3, 8, dtype=torch.int32), "dtype must be a floating one, got torch.int32"),
        (lambda: Link("", 0, 0), "bandwidth must be positive and latency 0 or more, got 0, 0"),
        (lambda: Link("", 1, -1), "bandwidth must be positive and latency 0 or more, got 1, -1"),
        (lambda: ring_bytes(Heads(2, 2, 8), contiguous(8, 2), 2), "rank must be 0 to 1, got 2"),
        (lambda: halo_bytes(Heads(2, 2, 8), contiguous(8, 2), 0, 0), "window must be 1 or more, got 0"),
        (lambda: all_to_all_bytes(Heads(4, 2, 8), contiguous(8, 3), 0), "must divide the heads of queries, got 3"),
        (lambda: pairs(contiguous(8, 2), causal=False, window=2), "window must be 1 or more, with causal=True, got 2"),
        (lambda: ring_time(Heads(2, 2, 8), contiguous(8, 2), LINKS[0], 0), "rate must be positive"),
        (lambda: state_bytes(-1, 0, 2, 0), "state and decay must be 0 or more"),
        (lambda: state_bytes(1, 0, 2, 2), "rank 0 to size - 1, got 1, 0, 2 and 2"),
        (lambda: state_time(1, 0, 0, LINKS[0]), "size 1 or more"),
    ],
)
def test_wrong_input_is_named(call, said):
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        call()
