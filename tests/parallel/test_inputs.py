"""Rows that do not fit, on one rank or between ranks, are one error on every rank, before anything is sent."""

import pytest
import torch
from refusals import message_of

from nondual.parallel import of_lengths, zigzag
from nondual.parallel.inputs import checked_rows, refuse_options


def refusals(rank, size):
    layout = of_lengths([5, 4])

    def rows(b=2, h=6, g=3, n=5, d=7, dv=11, dtype=torch.float64):
        return [torch.zeros(b, heads, n, width, dtype=dtype) for heads, width in ((h, d), (g, d), (g, dv))]

    def call(q, k, v, layout=layout, causal=True, window=None, scale=None):
        options = {"causal": causal, "window": window, "scale": scale}
        return checked_rows("op", q, k, v, layout, None, options=options)

    n = 5 - rank
    first = rank == 0
    whole = call(*rows(n=n), zigzag).layout
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = str(call(*rows(n=n, dtype=torch.float32)).q.dtype)
    return [
        whole == zigzag(9, 2),
        cast,
        message_of(lambda: call(*rows(n=n))),
        message_of(lambda: call(*rows(n=n, h=6 if first else 3))),
        message_of(lambda: call(*rows(n=n), causal=first)),
        message_of(lambda: call(*rows(n=n), scale=0.5 if first else None)),
        message_of(lambda: call(*rows(n=n, g=3 if first else 4))),
        message_of(lambda: call(*rows(n=5))),
        message_of(lambda: call(*rows(n=n), of_lengths([3, 3, 3]))),
        message_of(lambda: call(*rows(n=n), zigzag if first else layout)),
        message_of(lambda: call(*rows(n=n), layout="zigzag")),
        message_of(lambda: call(rows()[0], *rows(n=4)[1:])),
        message_of(lambda: call(None if first else rows(n=n)[0], *rows(n=n)[1:])),
        message_of(lambda: call(rows(n=n)[0].requires_grad_(first), *rows(n=n)[1:])),
    ]


def test_what_does_not_fit_is_one_error_on_every_rank(in_ranks):
    (said,) = in_ranks(refusals, sizes=(2,)).values()
    alike = [
        True,
        "torch.bfloat16",
        "",
        "ValueError: op must have the same number of query heads on every rank, got [6, 3] on ranks 0 to 1",
        "ValueError: op must have the same causal on every rank, got [1, 0] on ranks 0 to 1",
        None,
        None,
        "ValueError: op: the ranks must hold the layout's [5, 4] rows, got [5, 5] on ranks 0 to 1; layout.shard(x, "
        "rank) cuts them",
        "ValueError: op: the ranks must hold the layout's [3, 3, 3] rows, got [5, 4] on ranks 0 to 1; layout.shard(x, "
        "rank) cuts them",
        None,
        "TypeError: layout must be a Layout or a function such as zigzag, got str",
        "ValueError: k and v must have q's 5 rows, those of this rank, got 4",
        None,
        "ValueError: op must have the same need of gradients on every rank, got [1, 0] on ranks 0 to 1",
    ]
    for rank in range(2):
        for i, text in enumerate(alike):
            assert text is None or said[rank][i] == text
        assert "must have the same scale on every rank" in said[rank][5]
        assert "must have the same layout (a checksum) on every rank" in said[rank][9]
    heads = "q's heads must be a multiple of k's, got 6 and 4"
    assert [of_rank[6] for of_rank in said] == [f"ValueError: op on rank 1: {heads}", f"ValueError: {heads}"]
    none = "q must be a Tensor, got NoneType; use torch.tensor(q)"
    assert [of_rank[12] for of_rank in said] == [f"TypeError: {none}", f"ValueError: op on rank 0: {none}"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((torch.ones(3, 3), 0.0, False), "mask must be None for op, which knows causal and window"),
        ((None, 0.5, False), "dropout must be 0 for op, which keeps no weights to drop, got 0.5"),
        ((None, 0.0, True), "return_weights must be False for op, which never forms the weights"),
    ],
)
def test_what_an_op_over_ranks_does_not_take(asked, said):
    with pytest.raises(ValueError, match=said):
        refuse_options("op", *asked)
    refuse_options("op", None, 0.0, False)
