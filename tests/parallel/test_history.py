"""The rows before a rank's first one: those of the whole sequence, across short and empty ranks, with gradients."""

import os

import pytest
import torch
from refusals import message_of

from nondual.ops.causal_conv1d import causal_conv1d
from nondual.parallel import of_lengths, traffic
from nondual.parallel.history import rows_before

dist = torch.distributed

B, D, K = 2, 3, 5
LENGTHS = [[7, 5, 6, 4], [1, 0, 2, 1], [0, 3, 1, 0], [0, 0, 0, 0], [2, 0, 0, 9]]


def drawn(length):
    """The same on every rank: x, weight, bias, a history, resets, and the gradient of the output."""
    draw = torch.Generator().manual_seed(length)
    shapes = [(B, length, D), (D, K), (D,), (B, K - 1, D), (B, length, D), (B, K - 1, D)]
    x, weight, bias, history, *gradients = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return x, weight, bias, history, torch.rand(B, length, generator=draw) < 0.15, gradients


# --- in every rank -------------------------------------------------------------------------------------------------


def convolved(rank, size):
    """A convolution over ranks: the greatest difference from one device's, in outputs, history and gradients."""
    errors = []
    for of_each in LENGTHS:
        layout = of_lengths(of_each[:size])
        span = slice(layout.pieces[rank][0].start, layout.pieces[rank][0].stop)
        for packed in (False, True):
            for with_history in (False, True):
                x, weight, bias, history, marks, (d_y, d_after) = drawn(layout.length)
                whole = [v.requires_grad_() for v in (x, weight, bias, history)]
                options = {"reset": marks if packed else None}
                y, after = causal_conv1d(*whole[:3], whole[3] if with_history else None, **options)
                loss = (y * d_y).sum() + (after * d_after).sum() + 0 * sum(v.sum() for v in whole)
                expected = torch.autograd.grad(loss, whole, materialize_grads=True)

                own = [v.detach().clone().requires_grad_() for v in (x[:, span], weight, bias, history)]
                given = own[3] if with_history and rank == 0 else None
                options = {"reset": marks[:, span] if packed else None}
                before, rows = rows_before(own[0], K - 1, history=given, **options)
                got, last = causal_conv1d(rows, *own[1:3], before, **options)
                loss = (got * d_y[:, span]).sum() + ((last * d_after).sum() if rank == size - 1 else 0)
                grads = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
                pairs = [(got, y[:, span]), (grads[0], expected[0][:, span])]
                if rank == size - 1:
                    pairs.append((last, after))
                if given is not None:
                    pairs.append((grads[3], expected[3]))
                for i in (1, 2):
                    total = grads[i].clone()
                    dist.all_reduce(total)
                    pairs.append((total, expected[i]))
                errors += [float((a - b).detach().abs().max()) for a, b in pairs if a.numel()]
    return max(errors)


def counted(rank, size):
    """Bytes forward and backward, with parts that are long enough, and with resets."""
    said = []
    for packed in (False, True):
        x = torch.zeros(B, 6 + rank, D, requires_grad=True)
        marks = torch.zeros(B, 6 + rank, dtype=torch.bool) if packed else None
        with traffic() as forward:
            before, rows = rows_before(x, K - 1, reset=marks)
        with traffic() as backward:
            (before.sum() + rows.sum()).backward()
        said += [forward.bytes, backward.bytes, forward.messages]
    return said


def with_nan(rank, size):
    """A NaN before a reset does not come through, nor does one in its gradient."""
    x = torch.ones(1, 3, 2, requires_grad=True)
    with torch.no_grad():
        x[0, 0] = float("nan")
    marks = torch.tensor([[False, True, False]])
    before, _ = rows_before(x, 4, reset=marks)
    return [before.isfinite().all().item(), before[0, :, 0].tolist()]


def refused(rank, size):
    x = torch.zeros(2, 3, 4)
    return [
        message_of(lambda: rows_before(x[..., : 4 - (rank == 1)], 2)),
        message_of(lambda: rows_before(x, 2 + rank)),
        message_of(lambda: rows_before(x, -1 if rank == 0 else 2)),
        message_of(lambda: rows_before(x, 2, history=None if rank == 0 else x[:, :2])),
        message_of(lambda: rows_before(x, 2, history=x)),
        message_of(lambda: rows_before(x, 2)),
    ]


def everything(rank, size):
    """All that needs ranks and leaves them alive, since starting them takes longer."""
    said = {"convolved": convolved(rank, size), "bytes": counted(rank, size), "nan": with_nan(rank, size)}
    return said | ({"refused": refused(rank, size)} if size == 3 else {})


@pytest.fixture(scope="module")
def said(in_ranks):
    return in_ranks(everything, timeout=180)


def with_one_rank_gone(rank, size):
    dist.barrier()
    if rank == 1:
        os._exit(0)
    return message_of(lambda: rows_before(torch.zeros(1, 3, 2), 2))


# --- tests ---------------------------------------------------------------------------------------------------------


def test_a_convolution_over_ranks_is_that_of_one_device(said):
    assert max(of_rank["convolved"] for ranks in said.values() for of_rank in ranks) < 1e-12


def test_each_rank_sends_its_last_rows_to_the_next_one_alone(said):
    for size, ranks in said.items():
        for rank, of_rank in enumerate(ranks):
            forward, backward, messages, with_marks, again, _ = of_rank["bytes"]
            rows = 4 * B * (K - 1)
            assert (forward, messages) == ((rows * D, 1) if rank < size - 1 else (0, 0))
            assert with_marks == (rows * (D + 1) if rank < size - 1 else 0)
            assert backward == again == (rows * D if rank else 0)


def test_rows_before_a_reset_are_zeros_a_nan_too(said):
    for rank, of_rank in enumerate(said[3]):
        assert of_rank["nan"] == [True, [0.0, 0.0, 1.0, 1.0] if rank else [0.0] * 4]


def test_what_does_not_fit_is_one_error_on_every_rank(said):
    for of_rank in said[3]:
        width, rows, negative, first, shape, fine = of_rank["refused"]
        assert width == "ValueError: rows_before must have the same width on every rank, got [4, 3, 4] on ranks 0 to 2"
        assert "must have the same number of rows on every rank, got [2, 3, 4]" in rows
        assert negative.endswith("rows must be an integer of 0 or more, got -1")
        assert "rows_before: history must be given on rank 0, which holds the start of the sequence" in first
        assert shape == "ValueError: history must be (B, R, D) = (2, 2, 4), got (2, 3, 4)"
        assert fine == ""


def test_a_rank_that_dies_is_named_by_those_that_live(in_ranks):
    (ranks,) = in_ranks(with_one_rank_gone, sizes=(3,), dying=(1,), timeout=120).values()
    for rank in (0, 2):
        assert ranks[rank].startswith(f"RuntimeError: rows_before: rank 1 does not answer (rank {rank} of 3 was told")
