"""Windows over ranks: what one device gives, output and gradients, from no more keys than are in reach."""

import os
import re

import pytest
import torch
from refusals import message_of
from ring_cases import DV, B, D, against_one_device, drawn, farthest, layouts, packed, with_gradients

from nondual.ops.flash_attention import flash_attention
from nondual.parallel import halo, of_lengths, ring_attention, zigzag
from nondual.parallel.pieces import fragments

# --- in every rank -------------------------------------------------------------------------------------------------


def keys_in_reach(layout, window, documents):
    """For each rank the positions that its queries see and that it does not hold, one query at a time."""
    first = [0] * layout.length
    if documents is not None:
        first = [sum(documents[:i]) for i, n in enumerate(documents) for _ in range(n)]
    held = [set(layout.positions(rank).tolist()) for rank in range(layout.size)]
    return held, [{j for i in own for j in range(max(first[i], i - window + 1), i)} - own for own in held]


def laws(rank, size):
    """Differences from one device, and bytes beside those of the keys in reach, for every case."""
    said = {}
    for name, layout in layouts(size).items():
        for i, (window, documents) in enumerate([(1, None), (2, None), (6, None), (3, packed(layout.length))]):
            if window >= max(documents or (layout.length,)):
                continue  # the ring without a window: below
            options = {"causal": True, "window": window, "documents": documents, "scale": None if i else 0.3}
            kv_heads = (2, 6, 1)[(i + len(name)) % 3]
            case = against_one_device(layout, rank, kv_heads, len(said), gaps=i % 2 == 1, **options)
            held, reached = keys_in_reach(layout, window, documents)
            of_position = B * kv_heads * (D + DV) * 8
            sends = sum(len(held[rank] & of_other) for of_other in reached) * of_position
            said[f"{name} {window} {documents}"] = [*case, sends, len(reached[rank]) * of_position]
    layout = zigzag(11, size)
    wide = {"causal": True, "window": 11}
    case = against_one_device(layout, rank, 2, 0, **wide)
    onward = 0 if size == 1 else 11 - layout.lengths[(rank + 1) % size]
    of_position = B * 2 * (D + DV) * 8
    said["past the first key"] = [*case, onward * of_position, (onward + 11 * (size > 1)) * of_position]
    return said


def in_half(rank, size):
    """Errors of narrow dtypes beside those of one device."""
    said = []
    layout = zigzag(29, size)
    for dtype in (torch.float32, torch.bfloat16):
        given = drawn(6, 2, 29, 1, dtype)
        exact, theirs = (
            with_gradients(lambda *x: flash_attention(*x, window=5), *xs) for xs in ([x.double() for x in given], given)
        )
        ours = with_gradients(
            lambda *x: ring_attention(*x, zigzag, causal=True, window=5), *(layout.shard(x, rank) for x in given)
        )
        assert {x.dtype for x in ours} == {dtype}
        exact, theirs = ([layout.shard(x.double(), rank) for x in xs] for xs in (exact, theirs))
        said.append([farthest([x.double() for x in xs], exact) for xs in (ours, theirs)])
    return said


def with_nan(rank, size):
    """Positions whose output is not finite, where keys outside of the windows of most are NaN."""
    layout = zigzag(24, size)
    q, k, v, _ = drawn(6, 2, 24, 1)
    k[:, :, 10] = torch.nan
    out = ring_attention(*(layout.shard(x, rank) for x in (q, k, v)), layout, causal=True, window=3)
    return layout.positions(rank)[~out.isfinite().all((0, 1, 3))].tolist()


def twice(rank, size):
    q, k, v, _ = (zigzag(8, size).shard(x, rank) for x in drawn(6, 2, 8, 1))
    k.requires_grad_()
    (gradient,) = torch.autograd.grad(
        ring_attention(q, k, v, zigzag, causal=True, window=3).sum(), k, create_graph=True
    )
    return message_of(lambda: gradient.sum().backward())


def all_at_once(rank, size):
    """A start of processes costs more than what they compute here."""
    said = {"laws": laws(rank, size), "nan": with_nan(rank, size)}
    if size == 3:
        said |= {"half": in_half(rank, size), "twice": twice(rank, size)}
    return said


def with_a_rank_lost(rank, size):
    layout = of_lengths([3, 4, 5])
    q, k, v, d_out = (layout.shard(x, rank) for x in drawn(6, 2, 12, 1))
    out = ring_attention(q, k.requires_grad_(), v, layout, causal=True, window=4)
    if rank == 1:
        os._exit(0)
    return message_of(lambda: out.backward(d_out))


# --- tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(in_ranks):
    """What `all_at_once` found: said[P][rank][name]."""
    return in_ranks(all_at_once, timeout=150)


def test_output_gradients_and_bytes_are_those_of_one_device_and_of_the_keys_in_reach(said):
    for size, ranks in said.items():
        for rank, of_rank in enumerate(ranks):
            for name, (difference, forward, backward, sends, returns) in of_rank["laws"].items():
                assert difference < 1e-13, (size, rank, name)
                assert (forward, backward) == (sends, returns), (size, rank, name)


def test_narrow_dtypes_are_as_exact_as_on_one_device(said):
    for of_rank in said[3]:
        for ours, theirs in of_rank["half"]:
            assert ours <= 2 * theirs


def test_nan_reaches_windows_alone(said):
    for size, ranks in said.items():
        found = {position for of_rank in ranks for position in of_rank["nan"]}
        assert {10, 11, 12} <= found
        if size > 1:  # others of a piece, and of those that fetch the key, may be reached, as in flash_attention
            pieces = [piece for of_rank in zigzag(24, size).pieces for piece in of_rank]
            assert found <= {i for piece in pieces if piece.stop > 10 and piece.start <= 12 for i in piece}


def test_a_second_derivative_is_refused(said):
    for of_rank in said[3]:
        assert re.match("RuntimeError: (flash|ring)_attention.* has no second derivative", of_rank["twice"])


def test_a_rank_that_dies_on_the_way_is_named_by_the_others(in_ranks):
    (ranks,) = in_ranks(with_a_rank_lost, sizes=(3,), dying=(1,), timeout=120).values()
    for rank in (0, 2):
        said = rf"RuntimeError: ring_attention, the gradients of .*: rank 1 does not answer \(rank {rank} of 3"
        assert re.match(said, ranks[rank]) or (rank == 0 and not ranks[rank])


def test_what_is_fetched_by_hand():
    layout = zigzag(12, 2)  # rank 0 holds 0 1 2 | 9 10 11, rank 1 the rest
    held = [fragments(layout, rank) for rank in range(2)]
    assert halo.needed(held, 0, 3) == [range(7, 9)] and halo.needed(held, 1, 3) == [range(1, 3)]
    assert halo.needed(held, 0, 1) == [] == halo.needed(held, 1, 1)
    assert halo.needed(held, 0, 10) == [range(3, 9)]  # 0, 1 and 2 are its own
    assert halo.needed(held, 1, 5) == [range(0, 3)]  # once, though 6 sees back to 2 as well
    packed = [fragments(layout, rank, (8, 4)) for rank in range(2)]
    assert halo.needed(packed, 0, 3) == [range(8, 9)]  # 9 sees no position of the first document


def test_what_is_fetched_does_not_grow_with_the_sequence_nor_with_the_ranks():
    for length, size in ((64, 2), (640, 2), (640, 8)):
        held = [fragments(zigzag(length, size), rank) for rank in range(size)]
        fetched = [sum(map(len, halo.needed(held, rank, 4))) for rank in range(size)]
        assert max(fetched) == 2 * 3 if size > 2 else max(fetched) == 3
