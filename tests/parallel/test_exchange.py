"""What ranks tell and send one another: it arrives, is counted, and fails on every rank alike and never for ever."""

import os
import re

import pytest
import torch
from refusals import message_of

from nondual.parallel import ranks_of, traffic
from nondual.parallel.exchange import MOST, compared, exchange

dist = torch.distributed


# --- in every rank -------------------------------------------------------------------------------------------------


def round_the_ring(rank, size):
    ranks = ranks_of()
    arrived = []
    with traffic() as count:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
            own = torch.full((2, rank), rank, dtype=dtype)
            before = (rank - 1) % size
            into = torch.empty((2, before), dtype=dtype)
            (got,) = exchange(ranks, [((rank + 1) % size, own)], [(before, into)], "rows").arrived()
            arrived.append(bool((got == before).all()) and got.shape == (2, before))
    return arrived, count.bytes, count.messages


def telling(rank, size):
    ranks = ranks_of()

    def refuses():
        if rank == 1:
            raise ValueError("x must be a matrix, got 3 dimensions")
        return {"width": 4}

    def with_width(width):
        return lambda: {"width": width, "length": rank}

    sizes = compared(ranks, "call", with_width(4), "cpu", may_differ=("length",))
    return [
        [one["length"] for one in sizes],
        message_of(lambda: compared(ranks, "call", with_width(4 + (rank == 2)), "cpu", may_differ=("length",))),
        message_of(lambda: compared(ranks, "call", refuses, "cpu")),
        message_of(lambda: compared(ranks, "this" if rank else "that", with_width(4), "cpu", ("length",))),
        message_of(lambda: compared(ranks, "call", lambda: {str(i): i for i in range(MOST + 1)}, "cpu")),
        [one["length"] for one in compared(ranks, "call", with_width(4), "cpu", may_differ=("length",))],
    ]


def with_one_rank_gone(rank, size, kind):
    ranks = ranks_of()
    dist.barrier()
    if rank == 1:
        os._exit(0)
    if kind == "compared":
        return message_of(lambda: compared(ranks, "ring_attention", lambda: {"width": 4}, "cpu"))
    into = torch.empty(1000)
    sends, receives = [((rank + 1) % size, torch.ones(1000))], [((rank - 1) % size, into)]
    return message_of(lambda: exchange(ranks, sends, receives, "ring_attention").arrived())


def groups(rank, size):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    other = dist.new_group([0, 1])
    return [
        list(ranks_of(mesh["sequence"])[1:]),
        list(ranks_of()[1:]),
        message_of(lambda: ranks_of(mesh)),
        message_of(lambda: ranks_of("gloo")),
        message_of(lambda: ranks_of(other)),
    ]


# --- tests ---------------------------------------------------------------------------------------------------------


def test_what_is_sent_arrives_and_is_counted(in_ranks):
    said = in_ranks(round_the_ring)
    for size, ranks in said.items():
        for rank, (arrived, sent, messages) in enumerate(ranks):
            assert arrived == [True] * 5
            none = size == 1 or rank == 0  # nothing to send, or to another
            assert (sent, messages) == ((0, 0) if none else (2 * rank * (8 + 4 + 2 + 2 + 8), 5))


def test_sizes_are_told_and_what_does_not_fit_is_one_error_on_every_rank(in_ranks):
    (ranks,) = in_ranks(telling, sizes=(3,)).values()
    for rank, (lengths, differs, refused, other, many, after) in enumerate(ranks):
        assert lengths == after == [0, 1, 2]
        assert differs == "ValueError: call must have the same width on every rank, got [4, 4, 5] on ranks 0 to 2"
        own = "ValueError: x must be a matrix, got 3 dimensions"
        assert refused == (own if rank == 1 else own.replace(": ", ": call on rank 1: ", 1))
        assert re.search("every rank must call (this|that) with arguments of the same kinds", other)
        assert many == f"ValueError: a rank must tell at most {MOST} sizes, got {MOST + 1}"


@pytest.mark.parametrize("kind", ["compared", "exchange"])
def test_a_rank_that_dies_is_named_by_those_that_live(in_ranks, kind):
    (ranks,) = in_ranks(with_one_rank_gone, kind, sizes=(3,), dying=(1,)).values()
    for rank in (0, 2):
        said = f"RuntimeError: ring_attention: rank 1 does not answer (rank {rank} of 3 was told: "
        assert ranks[rank].startswith(said) or (kind, rank, ranks[rank]) == ("exchange", 0, "")


def test_groups_and_meshes(in_ranks):
    (ranks,) = in_ranks(groups, sizes=(4,)).values()
    for rank, (of_mesh, of_all, two, text, foreign) in enumerate(ranks):
        assert of_mesh == [rank % 2, 2] and of_all == [rank, 4]
        assert two.startswith("ValueError: group must be a mesh of one dimension, got one of 2, ('data', 'sequence')")
        assert text == "TypeError: group must be a ProcessGroup, a DeviceMesh or None, got str"
        assert foreign == (
            "" if rank < 2 else "ValueError: group must be one that this process belongs to, got one of others"
        )


def test_without_a_group_the_error_says_how_to_make_one():
    with pytest.raises(RuntimeError, match="start the program with torchrun, and call"):
        ranks_of()
