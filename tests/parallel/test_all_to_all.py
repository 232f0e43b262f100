"""All-to-all attention gives what one device gives, output and gradients, whatever ranks, heads, lengths and layout."""

import math
import os

import pytest
import torch
from refusals import message_of
from torch.utils.checkpoint import checkpoint

from nondual.ops.flash_attention import flash_attention
from nondual.parallel import AllToAllAttention, Layout, all_to_all_attention, contiguous, of_lengths, traffic, zigzag
from nondual.self_attention import MultiHeadAttention

dist = torch.distributed
D, DV, B = 5, 3, 2


def layouts(size):
    """Even and uneven lengths, ranks without a row, pieces in any order, and nothing at all."""
    backwards = Layout(tuple((range(3 * r + 2, 3 * r + 3), range(3 * r, 3 * r + 2)) for r in reversed(range(size))))
    return {
        "zigzag": zigzag(4 * size, size),
        "uneven zigzag": zigzag(13, size),
        "contiguous": contiguous(11, size),
        "one has all": of_lengths([0] * (size - 1) + [7]),
        "most are empty": contiguous(1, size),
        "backwards": backwards,
        "nothing": contiguous(0, size),
    }


def whole(heads, kv_heads, length, seed, dtype=torch.float64):
    """The same q, k, v and gradient of the output on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, heads, length, D), (B, kv_heads, length, D), (B, kv_heads, length, DV), (B, heads, length, DV)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(call, q, k, v, gradient):
    """The output, and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), gradient)]


def farthest(ours, theirs) -> float:
    """The largest difference of two lists of tensors of the same shapes."""
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max((float((x - y).abs().max()) for x, y in zip(ours, theirs) if x.numel()), default=0.0)


# --- in every rank -------------------------------------------------------------------------------------------------


def against_one_device(rank, size):
    """Differences and bytes of every case; what one device gives is worked out beside it."""
    said = {}
    heads = 12
    for name, layout in layouts(size).items():
        for kv_heads in (12, 4, 2, 1) if "zigzag" in name else (3,):
            every = kv_heads in (3, 4)
            for options in ({"causal": True}, {}, {"window": 3}, {"causal": True, "scale": 0.3})[: 4 if every else 1]:
                given = whole(heads, kv_heads, layout.length, seed=len(said))
                expected = with_gradients(lambda q, k, v, o=options: flash_attention(q, k, v, **o), *given)
                rows = [layout.shard(x, rank) for x in given]
                if not len(said) % 3:  # rows with gaps between them
                    rows = [x.mT.contiguous().mT for x in rows]
                with traffic() as count:
                    ours = with_gradients(
                        lambda q, k, v, o=options, to=layout: all_to_all_attention(q, k, v, to, **o), *rows
                    )
                difference = farthest(ours, [layout.shard(x, rank) for x in expected])
                said[f"{name} {kv_heads} {options}"] = [difference, count.bytes, bytes_of(layout, rank, kv_heads)]
    return said


def bytes_of(layout, rank, kv_heads, heads=12, itemsize=8):
    """What a rank sends, forward and backward, by the formula."""
    size, n, others = layout.size, layout.lengths[rank], layout.length - layout.lengths[rank]
    sent_heads = kv_heads * size // math.gcd(kv_heads, size)
    there, back = B * (heads * D + sent_heads * (D + DV)), B * heads * DV
    return (n * (size - 1) * (there + back) + others * (there + back)) * itemsize // size


def in_half(rank, size):
    """Half precision as it is, by autocast, and through a compiled module; the errors beside those of one device."""
    layout = zigzag(13, size)
    said = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = whole(12, 4, 13, 1, dtype)
        expected = with_gradients(lambda q, k, v: flash_attention(q, k, v, causal=True), *given)
        rows = [layout.shard(x, rank) for x in given]
        ours = with_gradients(lambda q, k, v: all_to_all_attention(q, k, v, zigzag, causal=True), *rows)
        wide = whole(12, 4, 13, 1)
        exact = with_gradients(
            lambda q, k, v: flash_attention(q, k, v, causal=True), *(x.to(dtype).double() for x in wide)
        )
        exact = [layout.shard(x, rank) for x in exact]
        said.append(
            [ours[0].dtype == dtype, farthest(ours, exact), farthest([layout.shard(x, rank) for x in expected], exact)]
        )
    q, k, v, _ = (layout.shard(x, rank) for x in whole(12, 4, 13, 1, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16), traffic() as count:
        out = all_to_all_attention(q, k, v, layout)
    return [*said, [str(out.dtype), count.bytes]]


def module(rank, size, how):
    """MultiHeadAttention over rows beside the same module on one device, at two lengths."""
    torch.manual_seed(0)
    plain = MultiHeadAttention(24, 12, n_kv_heads=4, causal=True).double()
    ours = MultiHeadAttention(24, 12, n_kv_heads=4, causal=True, op=AllToAllAttention(zigzag)).double()
    ours.load_state_dict(plain.state_dict())
    form = {
        "as it is": lambda: ours,
        "computed again in backward": lambda: lambda x: checkpoint(ours, x, use_reentrant=False),
        "compiled": lambda: torch.compile(ours, backend="eager", dynamic=True),
    }[how]()
    differences = []
    for length in (13, 8):
        layout = zigzag(length, size)
        x = torch.randn(B, length, 24, dtype=torch.float64)
        expected = plain(x)
        (expected**2).sum().backward()
        rows = layout.shard(x, rank, dim=1)
        out = form(rows)
        (out**2).sum().backward()
        gradients = []
        for parameter in ours.parameters():
            dist.all_reduce(parameter.grad)
            gradients.append(parameter.grad)
        differences.append(farthest([out.detach()], [layout.shard(expected.detach(), rank, dim=1)]))
        differences.append(farthest(gradients, [parameter.grad for parameter in plain.parameters()]))
        ours.zero_grad()
        plain.zero_grad()
    return differences


def with_one_rank_gone(rank, size):
    """Rank 1 goes after the forward pass; the others learn of it as they go backward."""
    q, k, v, _ = whole(6, 2, 7, 0)
    mine = [zigzag(7, size).shard(x, rank).requires_grad_() for x in (q, k, v)]
    out = all_to_all_attention(*mine, zigzag)
    dist.barrier()
    if rank == 1:
        os._exit(0)
    return message_of(lambda: out.sum().backward())


def refusals(rank, size):
    layout = zigzag(7, size)
    q, k, v, _ = (layout.shard(x, rank) for x in whole(4, 4, 7, 0))
    good = [layout.shard(x, rank) for x in whole(6, 2, 7, 0)]
    op = AllToAllAttention(layout)
    twice = good[0].clone().requires_grad_()
    return [
        message_of(lambda: all_to_all_attention(q, k, v, layout)),
        message_of(lambda: all_to_all_attention(*good[:3], layout, window=0)),
        message_of(lambda: op(*good[:3], dropout=0.5 if rank == 1 else 0.0)),
        message_of(lambda: op(*good[:3], mask=torch.ones(3, 3))),
        message_of(lambda: op(*good[:3], return_weights=True)),
        message_of(
            lambda: torch.autograd.grad(op(twice, *good[1:3]).sum(), twice, create_graph=True)[0].sum().backward()
        ),
        message_of(lambda: torch.func.vmap(op)(*(x[None] for x in good[:3]))),
        message_of(lambda: op(*good[:3])),
    ]


def the_rest(rank, size):
    """What one start of three processes serves."""
    return {
        "half": in_half(rank, size),
        "as it is": module(rank, size, "as it is"),
        "computed again in backward": module(rank, size, "computed again in backward"),
        "refusals": refusals(rank, size),
    }


@pytest.fixture(scope="module")
def of_three(in_ranks):
    """What each of three ranks says of `the_rest`."""
    return in_ranks(the_rest, sizes=(3,), timeout=150)[3]


# --- tests ---------------------------------------------------------------------------------------------------------


def test_outputs_gradients_and_bytes_are_those_of_one_device_and_of_the_formula(in_ranks):
    for size, ranks in in_ranks(against_one_device, timeout=150).items():  # of 1, 2, 3 and 4 ranks
        for said in ranks:
            assert len(said) == 2 * (4 + 3) + 5 * 4
            for case, (difference, sent, formula) in said.items():
                assert difference < 1e-12, (size, case)
                assert sent == formula, (size, case)


def test_half_precision_loses_no_more_than_on_one_device(of_three):
    layout = zigzag(13, 3)
    for rank, said in enumerate(of_three):
        *by_dtype, (dtype, sent) = said["half"]
        for same, ours, theirs in by_dtype:
            assert same and ours <= 2 * theirs
        assert dtype == "torch.bfloat16"
        n, others = layout.lengths[rank], 13 - layout.lengths[rank]
        there, back = 12 * D + 12 * (D + DV), 12 * DV  # of 4 key/value heads, each sent 3 times
        assert sent == 2 * B * (n * 2 * there + others * back) // 3


@pytest.mark.parametrize("how", ["as it is", "computed again in backward"])
def test_it_is_an_op_of_multi_head_attention(of_three, how):
    assert max(max(said[how]) for said in of_three) < 1e-12


def test_a_compiled_module_is_the_same(in_ranks):
    assert max(map(max, in_ranks(module, "compiled", sizes=(2,), timeout=150)[2])) < 1e-12


def test_a_rank_that_dies_is_named_by_those_that_live(in_ranks):
    (ranks,) = in_ranks(with_one_rank_gone, sizes=(3,), dying=(1,)).values()
    for rank in (0, 2):
        assert ranks[rank].startswith(f"RuntimeError: all-to-all: rank 1 does not answer (rank {rank} of 3 was told: ")


def test_what_it_does_not_take_is_one_error_on_every_rank(of_three):
    for rank, said in enumerate(of_three):
        heads, window, dropout, mask, weights, twice, mapped, after = said["refusals"]
        assert heads == (
            "ValueError: q must have a number of heads that the 3 ranks divide, got 4: use ring_attention, which takes "
            "any number, or a group of a size that divides it"
        )
        assert window == "ValueError: window must be an integer of 1 or more or None, got 0"
        on_one = "" if rank == 1 else "AllToAllAttention on rank 1: "
        assert dropout.startswith(f"ValueError: {on_one}dropout must be 0 for AllToAllAttention")
        assert mask.startswith("ValueError: mask must be None for AllToAllAttention")
        assert weights.startswith("ValueError: return_weights must be False for AllToAllAttention")
        assert twice.startswith("RuntimeError")
        assert mapped.startswith("RuntimeError: AllToAllAttention ") and "on one device" in mapped
        assert after == ""
