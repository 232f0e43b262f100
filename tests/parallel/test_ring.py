"""Ring attention gives what one device gives, output and gradients, whatever ranks, heads, lengths and layout."""

import os
import re
from functools import partial

import pytest
import torch
from refusals import message_of
from ring_cases import (
    DV,
    B,
    D,
    against_one_device,
    drawn,
    farthest,
    layouts,
    one_device,
    packed,
    with_gradients,
)

from nondual.ops.flash_attention import flash_attention
from nondual.parallel import RingAttention, contiguous, of_lengths, ring_attention, rounds, zigzag
from nondual.self_attention import MultiHeadAttention

# --- in every rank -------------------------------------------------------------------------------------------------


def all_at_once(rank, size):
    """A start of processes costs more than what they compute here."""
    said = {"laws": laws(rank, size)}
    if size == 1:
        said["compiled"] = module(rank, size, compiled=True)
    if size == 2:
        said |= {"half": in_half(rank, size), "refusals": refusals(rank, size)}
    if size == 3:
        said |= {"nan": with_nan(rank, size), "module": module(rank, size)}
    return said


def laws(rank, size):
    """Differences from one device, and bytes beside the formula's, for every case."""
    said = {}
    for name, layout in layouts(size).items():
        documents = packed(layout.length)
        for i, options in enumerate(
            (
                {},
                {"causal": True},
                {"causal": True, "scale": -0.3},
                {"documents": documents},
                {"causal": True, "documents": documents},
            )
        ):
            kv_heads = (2, 6, 1)[(i + len(name)) % 3]
            seed = len(said)
            case = against_one_device(layout, rank, kv_heads, seed, gaps=i % 2 == 1, **options)
            onward = 0 if size == 1 else layout.length - layout.lengths[(rank + 1) % size]
            home = 0 if size == 1 else layout.length
            of_position = B * kv_heads * (D + DV) * 8
            said[f"{name} {options}"] = [*case, onward * of_position, (onward + home) * of_position]
    return said


def in_half(rank, size):
    """Errors of narrow dtypes beside those of one device, in the engines and under autocast."""
    said = []
    for dtype, impl in ((torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.float16, "triton")):
        given = drawn(6, 2, 13, 1, dtype)
        layout = zigzag(13, size)
        rows = [layout.shard(x, rank) for x in given]
        kernels = impl == "triton"
        options = {"causal": True, "scale": -0.3} if kernels else {"causal": True, "documents": (9, 4)}
        exact = with_gradients(lambda *x, o=options: one_device(*x, **o), *(x.double() for x in given))
        exact = [layout.shard(x, rank) for x in exact]
        judge = partial(flash_attention, impl="triton") if kernels else one_device
        theirs = with_gradients(lambda *x, o=options, f=judge: f(*x, **o), *given)
        ours = with_gradients(lambda *x, o=options, i=impl: ring_attention(*x, zigzag, impl=i, **o), *rows)
        assert {x.dtype for x in ours} == {dtype}
        theirs = [layout.shard(x, rank) for x in theirs]
        said.append([farthest([x.double() for x in got], exact) for got in (ours, theirs)])
    q, k, v, d_out = (layout.shard(x, rank) for x in drawn(6, 2, 13, 1, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, *grads = with_gradients(lambda *x: ring_attention(*x, layout), q, k, v, d_out.bfloat16())
        same = ring_attention(*(x.bfloat16() for x in (q, k, v)), layout)
    assert out.dtype == torch.bfloat16 and torch.equal(out, same) and {x.dtype for x in grads} == {torch.float32}
    return said


def with_nan(rank, size):
    """Which positions are NaN in the output, of a causal call, and of one with documents."""
    layout = zigzag(24, size)
    q, k, v, _ = drawn(6, 2, 24, 1)
    k[:, :, 10], v[:, :, 17] = torch.nan, torch.inf
    found = []
    for options in ({"causal": True}, {"documents": (8, 4, 12)}):
        out = ring_attention(*(layout.shard(x, rank) for x in (q, k, v)), layout, **options)
        found.append(layout.positions(rank)[~out.isfinite().all((0, 1, 3))].tolist())
    return found


def refusals(rank, size):
    q, k, v, _ = (contiguous(8, size).shard(x, rank) for x in drawn(6, 2, 8, 1))
    first = rank == 0

    def call(*changed, layout=zigzag, **options):
        return ring_attention(*(changed or (q, k, v)), layout, **options)

    def twice():
        x = q.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(call(x, k, v).sum(), x, create_graph=True)
        gradient.sum().backward()

    return [
        message_of(lambda: torch.testing.assert_close(call(window=3), call(window=3, causal=True))),
        message_of(lambda: call(window=0, causal=True)),
        message_of(lambda: call(window=2.5, causal=True)),
        message_of(lambda: call(documents=(3, 4))),
        message_of(lambda: call(documents=(1,) * 7 + (3, -2))),
        message_of(lambda: call(documents=8)),
        message_of(lambda: call(documents=(3, 5) if first else (5, 3))),
        message_of(lambda: call(q, k, v[:, :1] if first else v)),
        message_of(lambda: call(q, k.float(), v)),
        message_of(lambda: call(layout=contiguous(9, size))),
        message_of(lambda: call(layout=contiguous(8, size + 1))),
        message_of(lambda: call(impl="triton")),
        message_of(lambda: call(impl="sdpa")),
        message_of(lambda: call(q, k.detach().requires_grad_(first), v.detach().requires_grad_(not first))),
        message_of(lambda: call(q, k.detach().requires_grad_(first), v)),
        message_of(lambda: RingAttention(zigzag)(q, k, v, mask=torch.ones(4, 4, dtype=torch.bool))),
        message_of(lambda: torch.func.jvp(call, (q, k, v), (q, k, v))),
        message_of(lambda: torch.func.vmap(call)(*(x[None] for x in (q, k, v)))),
        message_of(twice),
        call().isfinite().all().item(),  # and the group goes on
    ]


def module(rank, size, compiled=False):
    """MultiHeadAttention over rows beside the same module on one device, at two lengths."""
    torch.manual_seed(0)
    plain = MultiHeadAttention(24, 6, n_kv_heads=2, causal=True).double()
    ours = MultiHeadAttention(24, 6, n_kv_heads=2, causal=True, op=RingAttention(zigzag)).double()
    ours.load_state_dict(plain.state_dict())
    form = torch.compile(ours, backend="eager", dynamic=True) if compiled else ours
    differences = []
    for length in (13, 9):
        x = torch.randn(2, length, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
        layout = zigzag(length, size)
        rows = layout.shard(x, rank).requires_grad_()
        x.requires_grad_()
        out, expected = form(rows), plain(x)
        (gradient,) = torch.autograd.grad(out.square().sum(), rows)
        (whole,) = torch.autograd.grad(expected.square().sum(), x)
        theirs = [layout.shard(y.detach(), rank) for y in (expected, whole)]
        differences.append(farthest([out.detach(), gradient], theirs))
    return differences


def with_a_rank_lost(rank, size):
    """Of three ranks one dies in the forward pass, of four one before the backward pass."""
    when = "forward" if size == 3 else "backward"
    layout = of_lengths([3, 4, 5, 0][:size])
    q, k, v, d_out = (layout.shard(x, rank) for x in drawn(6, 2, 12, 1))
    q.requires_grad_()
    if rank == 1 and when == "forward":
        rounds.add_ = lambda *_: os._exit(0)  # in the first step, with its own block on the way
    said = message_of(lambda: ring_attention(q, k, v, layout))
    if when == "backward" and not said:
        out = ring_attention(q, k.requires_grad_(), v, layout)
        if rank == 1:
            os._exit(0)
        said = message_of(lambda: out.backward(d_out))
    return said


# --- tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(in_ranks):
    """What `all_at_once` found: said[P][rank][name]."""
    return in_ranks(all_at_once, timeout=150)


def test_output_gradients_and_bytes_are_those_of_one_device_and_of_the_formula(said):
    for size, ranks in said.items():
        for rank, of_rank in enumerate(ranks):
            for name, (difference, forward, backward, forward_due, backward_due) in of_rank["laws"].items():
                assert difference < 1e-13, (size, rank, name)
                assert (forward, backward) == (forward_due, backward_due), (size, rank, name)


def test_narrow_dtypes_are_as_exact_as_on_one_device(said):
    for of_rank in said[2]:
        for ours, theirs in of_rank["half"]:
            assert ours <= 2 * theirs


def test_nan_reaches_those_who_see_it_and_none_before_it_or_in_another_document(said):
    found = [of_rank["nan"] for of_rank in said[3]]
    causal, documents = (sorted(i for of_rank in found for i in of_rank[case]) for case in range(2))
    assert set(range(10, 24)) <= set(causal) <= set(range(8, 24))  # the piece of position 10 begins at 8
    assert documents == list(range(8, 24))


def test_what_does_not_fit_is_one_error_on_every_rank(said):
    alike = [
        "",
        "ValueError: window must be an integer of 1 or more (the query's own key counts) or None, got 0",
        "ValueError: window must be an integer of 1 or more (the query's own key counts) or None, got 2.5",
        "ValueError: documents must sum to the 8 positions of the layout, got 7: [3, 4]",
        "ValueError: documents must be lengths, integers of 0 or more, got [1, 1, 1, 1, 1, 1, 1, 3, …]",
        "TypeError: documents must be a sequence of lengths or None, got int",
        "ValueError: ring_attention must have the same documents (a checksum) on every rank, got [",
        None,
        "ValueError: k must have q's dtype and device, torch.float64 on cpu, got torch.float32 on cpu",
        "ValueError: ring_attention: the ranks must hold the layout's [5, 4] rows, got [4, 4] on ranks 0 to 1",
        "ValueError: ring_attention: the ranks must hold the layout's [3, 3, 2] rows, got [4, 4] on ranks 0 to 1",
        "ValueError: q must be float16, bfloat16 or float32 for impl='triton', got torch.float64",
        "ValueError: impl='sdpa' keeps its log-sum-exp",
        "",
        "ValueError: ring_attention must have the same need of gradients",
        "ValueError: mask must be None for RingAttention, which knows causal and window",
        "RuntimeError: ring_attention has no forward-mode derivative",
        "RuntimeError: ring_attention cannot be transformed by torch.func (vmap, grad, vjp, jacrev)",
        "RuntimeError: ring_attention has no second derivative",
    ]
    refused = [of_rank["refusals"] for of_rank in said[2]]
    for texts in refused:
        assert texts[-1] is True and len(texts) == len(alike) + 1
        for text, expected in zip(texts, alike):
            assert expected is None or (text.startswith(expected) if expected else not text)
    heads = "v must have k's batch, heads and length (2, 2, 4), got (2, 1, 4)"
    assert [texts[7] for texts in refused] == [f"ValueError: {heads}", f"ValueError: ring_attention on rank 0: {heads}"]


def test_a_module_with_it_and_compiled(said):
    assert max(said[1][0]["compiled"]) < 1e-13
    assert max(max(of_rank["module"]) for of_rank in said[3]) < 1e-13


def test_a_rank_that_dies_on_the_way_is_named_by_the_others(in_ranks):
    for size, ranks in in_ranks(with_a_rank_lost, sizes=(3, 4), dying=(1,), timeout=120).items():
        for rank in set(range(size)) - {1}:
            assert re.match(
                rf"RuntimeError: ring_attention: rank 1 does not answer \(rank {rank} of {size}", ranks[rank]
            )


def test_without_a_group_the_error_says_how_to_make_one():
    q, k, v, _ = drawn(6, 2, 8, 1)
    with pytest.raises(RuntimeError, match="a process group must be made first"):
        ring_attention(q, k, v, zigzag)
    assert flash_attention(q, k, v).shape == (B, 6, 8, DV)
