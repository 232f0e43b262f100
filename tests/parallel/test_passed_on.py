"""States passed along ranks: what one process computes in a loop, by either way; gradients, bytes, and a rank lost."""

import os
import re

import pytest
import torch
from refusals import message_of

from nondual.parallel import passed_on as of_module
from nondual.parallel import ranks_of, traffic
from nondual.parallel.passed_on import Line, Step, by_doubling, direct, doubled, pass_on

dist = torch.distributed

STATE = (2, 3, 5)
DECAYS = {"whole": (2, 3, 5), "of each channel": (1, 3, 1), "matrix": (2, 3, 3)}
PRODUCT = {"whole": torch.mul, "of each channel": torch.mul, "matrix": torch.matmul}


def steps(size, kind, dtype=torch.float64):
    """What each rank adds, its decay, and the initial state: the same on every rank."""
    draw = torch.Generator().manual_seed(size)
    added = torch.randn(size, *STATE, generator=draw, dtype=dtype)
    decay = torch.rand(size, *DECAYS[kind], generator=draw, dtype=dtype)
    return added, decay, torch.randn(STATE, generator=draw, dtype=dtype)


def in_a_loop(added, decay, initial, product):
    """The states before each rank and after it."""
    before, h = [], torch.zeros(STATE, dtype=added.dtype) if initial is None else initial
    for S, D in zip(added, decay):
        before.append(h)
        h = product(D, h) + S
    return torch.stack(before), torch.stack([*before[1:], h])


# --- in every rank -------------------------------------------------------------------------------------------------


def against_a_loop(rank, size):
    """Greatest difference of results and gradients, with the count of bytes forward and backward, for each case."""
    said = {}
    for kind in DECAYS:
        for way in ("direct", "doubled"):
            of_module.ROUND = 2**40 if way == "direct" else -(2**40)  # a round that costs much, or less than nothing
            for with_initial in (True, False):
                added, decay, initial = steps(size, kind)
                weights = torch.randn(2, size, *STATE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
                product = PRODUCT[kind]
                whole = [x.clone().requires_grad_() for x in (added, decay, initial)]
                before, after = in_a_loop(*whole[:2], whole[2] if with_initial else None, product)
                loss = (before * weights[0]).sum() + (after * weights[1]).sum()
                expected = torch.autograd.grad(loss, whole, allow_unused=True)

                own = [x.clone().requires_grad_() for x in (added[rank], decay[rank], initial)]
                first = own[2] if with_initial and rank == 0 else None
                with traffic() as forward:
                    got = pass_on(*own[:2], first, product=product)
                with traffic() as backward:
                    loss = (got[0] * weights[0, rank]).sum() + (got[1] * weights[1, rank]).sum()
                    grads = torch.autograd.grad(loss, own, allow_unused=True)
                pairs = [(got[0], before[rank]), (got[1], after[rank])]
                pairs += [(grads[i], expected[i][rank]) for i in range(2)]
                if first is not None:
                    pairs.append((grads[2], expected[2]))
                errors = [float((one - two).abs().max()) for one, two in pairs]
                said[f"{kind}, {way}, {with_initial}"] = [max(errors), forward.bytes, backward.bytes]
    of_module.ROUND = 2**19
    return said


def both_ways(rank, size):
    """Exclusive scans of any size by both ways, in both directions: the greatest difference from a loop."""
    errors = []
    for kind, product in PRODUCT.items():
        added, decay, _ = steps(size, kind)
        for reverse in (False, True):
            order = torch.arange(size).flip(0) if reverse else torch.arange(size)
            before, _ = in_a_loop(added[order], decay[order], None, product)
            for way in (direct, doubled):
                line = Line(ranks_of(), "scan", reverse)
                got = way(line, Step(added[rank], decay[rank]), product)
                assert (got is None) == (line.place == 0)
                errors.append(0.0 if got is None else float((got - before[line.place]).abs().max()))
    return max(errors)


def what_a_reset_forgets(rank, size):
    """Rank 0 leads to NaN, rank 1 forgets it, rank 2's decay overflowed and meets a state of zero."""
    of_module.ROUND = -(2**40) if size == 4 else 2**19
    nan, inf = float("nan"), float("inf")
    added = torch.tensor([nan, 0.0, 3.0, 0.0])[rank].expand(STATE).requires_grad_()
    decay = torch.tensor([1.0, 0.0, inf, 0.5])[rank].expand(STATE).requires_grad_()
    before, after = pass_on(added, decay)
    grads = torch.autograd.grad((before.sum() if rank else 0) + after.sum(), [added])
    matrix = torch.tensor([1.0, 0.0, 2.0, 0.5])[rank] * torch.eye(3)
    of_matrix, _ = pass_on(added.detach(), matrix.expand(2, 3, 3), product=torch.matmul)
    return [str(before.flatten()[0].item()), str(of_matrix.flatten()[0].item()), bool(grads[0].isfinite().all())]


def refused(rank, size):
    x = torch.zeros(2, 3)
    a = torch.ones(2, 1)
    return [
        message_of(lambda: pass_on(torch.zeros(2, 3 + (rank == 1)), a)),
        message_of(lambda: pass_on(x, a if rank else [1.0])),
        message_of(lambda: pass_on(x, torch.ones(2, 2) if rank else a)),
        message_of(lambda: pass_on(x, a, x if rank == 1 else None)),
        message_of(lambda: pass_on(x, a, product=torch.add)),
        message_of(lambda: pass_on(x, torch.ones(3, 3), product=torch.matmul)),
        message_of(lambda: pass_on(x, a, torch.zeros(2))),
        message_of(lambda: pass_on(x.clone().requires_grad_(rank == 0), a)),
        message_of(lambda: pass_on(x, a.double())),
        message_of(lambda: pass_on(x, a)),
    ]


def everything(rank, size):
    """All that needs ranks and leaves them alive, since starting them takes longer."""
    said = {"both ways": both_ways(rank, size)}
    if size <= 4:
        said["loop"] = against_a_loop(rank, size)
    if size in (3, 4):
        said["forgets"] = what_a_reset_forgets(rank, size)
    if size == 3:
        said["refused"] = refused(rank, size)
    return said


@pytest.fixture(scope="module")
def said(in_ranks):
    return in_ranks(everything, sizes=(1, 2, 3, 4, 7), timeout=180)


def with_one_rank_gone(rank, size):
    ranks = ranks_of()
    dist.barrier()
    if rank == 1:
        os._exit(0)
    line = Line(ranks, "pass_on")
    step = Step(torch.zeros(5), torch.ones(5))
    return [
        message_of(lambda: pass_on(torch.zeros(5), torch.ones(5))),
        message_of(lambda: direct(line, step, torch.mul)),
    ]


# --- tests ---------------------------------------------------------------------------------------------------------


def bytes_of_a_pass(size, rank, state, decay, way):
    """What the rank at this place sends in one pass, forward or, counted from the other end, backward."""
    if way == "direct":
        return (size - 1 - rank) * (state + decay * (rank > 0))
    spans = [2**k for k in range((size - 1).bit_length()) if rank + 2**k < size]
    return sum(state + decay * (rank >= span) for span in spans)


def test_states_gradients_and_bytes_are_those_of_a_loop(said):
    for size in (1, 2, 3, 4):
        for rank, of_rank in enumerate(said[size]):
            cases = of_rank["loop"]
            for case, (error, forward, backward) in cases.items():
                kind, way, _ = case.split(", ")
                state, decay = (8 * torch.Size(shape).numel() for shape in (STATE, DECAYS[kind]))
                assert error < 1e-13, (size, rank, case)
                assert forward == bytes_of_a_pass(size, rank, state, decay, way), (size, rank, case)
                assert backward == bytes_of_a_pass(size, size - 1 - rank, state, decay, way), (size, rank, case)


def test_both_ways_are_right_for_any_number_of_ranks(said):
    assert max(of_rank["both ways"] for ranks in said.values() for of_rank in ranks) < 1e-13


def test_a_decay_of_zero_forgets_even_a_nan(said):
    for size in (3, 4):
        cases = [of_rank["forgets"] for of_rank in said[size]]
        assert [before for before, _, _ in cases] == ["0.0", "nan", "0.0", "3.0"][:size]
        assert [before for _, before, _ in cases] == ["0.0", "nan", "0.0", "3.0"][:size]
        assert all(finite for _, _, finite in cases[2:])


def test_what_does_not_fit_is_one_error_on_every_rank(said):
    for rank, of_rank in enumerate(said[3]):
        shape, kind, decay, initial, product, matrix, short, learning, dtype, fine = of_rank["refused"]
        assert shape == (
            "ValueError: pass_on must have the same size of dimension 1 of added on every rank, got [3, 4, 3] on "
            "ranks 0 to 2"
        )
        own = "decay must be a Tensor, got list; use torch.tensor(decay)"
        assert kind == (f"TypeError: {own}" if rank == 0 else f"ValueError: pass_on on rank 0: {own}")
        assert "decay must be (2, 3), or 1 in place of a size, got (2, 2)" in decay
        assert initial == (
            "ValueError: pass_on: initial must be given on rank 0, which holds the start of the sequence, got it on "
            "ranks [1]"
        )
        assert product.startswith("ValueError: product must be torch.mul or torch.matmul, got <built-in method add")
        assert matrix.startswith("ValueError: decay must be (2, 2), or 1 in place of a size, before its last two, got")
        assert short == "ValueError: initial must be the shape of added = (2, 3), got (2,)"
        assert "must have the same need of gradients on every rank, got [1, 0, 0]" in learning
        assert dtype.startswith("ValueError: decay must have the dtype of added, torch.float32, got torch.float64")
        assert fine == ""


def test_a_rank_that_dies_is_named_by_those_that_live(in_ranks):
    (ranks,) = in_ranks(with_one_rank_gone, sizes=(3,), dying=(1,), timeout=120).values()
    for rank in (0, 2):
        assert ranks[rank][0].startswith(f"RuntimeError: pass_on: rank 1 does not answer (rank {rank} of 3 was told")
    assert re.match("RuntimeError: pass_on: rank 1 does not answer", ranks[2][1])


@pytest.mark.parametrize(
    ("size", "state", "decay", "doubling"),
    [
        (1, 2**30, 0, False),
        (2, 2**30, 2**30, False),  # the same messages
        (3, 2**30, 2**30, False),  # the same bytes
        (4, 2**20, 2**20, True),  # one round more, one state and one decay less
        (4, 2**17, 2**17, False),
        (64, 2**20, 2**10, True),
        (64, 2**10, 2**10, False),  # so little that a round is not worth it
    ],
)
def test_the_cheaper_way_is_taken(size, state, decay, doubling):
    assert by_doubling(size, state, decay) is doubling
