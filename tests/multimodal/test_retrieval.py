"""Recall at k: by hand, against ranks, and with ties counted as chance has it."""

import itertools
import math

import pytest
import torch

from nondual.multimodal.retrieval import Recall, found, recall

N = 23


def scores(rows=N, columns=N, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    """Image 0 finds its text first, image 1 second, image 2 third; text 2 comes third for all but itself."""
    s = torch.tensor([[9.0, 1.0, 0.0], [8.0, 7.0, 1.0], [6.0, 5.0, 4.0]])
    assert found(s, 1).tolist() == [1, 0, 0] and found(s, 2).tolist() == [1, 1, 0] and found(s, 3).tolist() == [1, 1, 1]
    assert recall(s, k=(1, 2)) == Recall({1: 1 / 3, 2: 2 / 3}, {1: 1.0, 2: 1.0})


@pytest.mark.parametrize("k", [1, 5, N, 100])
def test_without_ties_it_is_whether_the_rank_is_below_k(k):
    s = scores()
    rank = s.argsort(1, descending=True).argsort(1).diag()
    assert torch.equal(found(s, k), (rank < k).double())
    columns = s.argsort(0, descending=True).argsort(0).diag()
    assert recall(s, k=[k]).text_to_image[k] == float((columns < k).double().mean())


def test_one_score_for_all_has_the_recall_of_chance():
    for value in (0.0, -math.inf):
        whole = recall(torch.full((N, N), value), k=(1, 5, N))
        for direction in whole:
            assert direction == pytest.approx({1: 1 / N, 5: 5 / N, N: 1.0}, abs=1e-12)


def test_ties_are_counted_as_all_orders_of_the_tied_would_be():
    """Against every way to break the ties, with one right item and with several."""
    s = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0, 2.0, 1.0])
    orders = [
        sorted(range(7), key=lambda i, o=order: (-float(s[i]), o[i])) for order in itertools.permutations(range(7))
    ]
    for right in ([1], [0], [3], [1, 2], [1, 3], [4, 2, 6], [0, 5]):
        relevant = torch.zeros(1, 7, dtype=torch.bool)
        relevant[0, right] = True
        for k in range(1, 8):
            hits = sum(not set(right).isdisjoint(order[:k]) for order in orders)
            got = float(found(s[None], k, relevant=relevant))
            assert math.isclose(got, hits / len(orders), abs_tol=1e-12), (right, k)


def test_several_right_items_and_another_number_of_items_than_queries():
    s, relevant = scores(4, 7), torch.zeros(4, 7, dtype=torch.bool)
    for text in range(7):
        relevant[text % 4, text] = True
    for k in (1, 2, 7):
        best = [bool(relevant[i, s[i].topk(k).indices].any()) for i in range(4)]
        assert found(s, k, relevant=relevant).tolist() == best
        images = [bool(relevant[s[:, t].topk(min(k, 4)).indices, t].any()) for t in range(7)]
        whole = recall(s, k=[k], relevant=relevant)
        assert whole.image_to_text[k] == sum(best) / 4 and whole.text_to_image[k] == pytest.approx(sum(images) / 7)


def test_halves_integers_of_scores_and_large_ties_are_exact():
    s = torch.zeros(2000, 2000, dtype=torch.float16)
    assert recall(s, k=[1]).image_to_text[1] == pytest.approx(1 / 2000, rel=1e-9)
    s.fill_diagonal_(1)
    assert recall(s, k=[1]) == Recall({1: 1.0}, {1: 1.0})


NAN = scores(3, 3).masked_fill(torch.eye(3, dtype=torch.bool), math.nan)
EYE = torch.eye(3, dtype=torch.bool)
REFUSED = [
    (([[1.0]],), {}, TypeError, r"scores must be a Tensor, got list"),
    ((scores(3, 4),), {}, ValueError, r"relevant must be given where scores are not square, got \(3, 4\)"),
    ((scores(0, 0),), {}, ValueError, r"scores must be floating point \(Q, M\), both 1 or more, .* \(0, 0\)"),
    ((scores(3, 3).long(),), {}, ValueError, r"scores must be floating point \(Q, M\), .*got torch.int64 \(3, 3\)"),
    ((NAN,), {}, ValueError, r"scores must not have NaN, which has no place in an order"),
    (
        (scores(3, 3),),
        {"relevant": EYE[:2]},
        ValueError,
        r"relevant must be boolean \(3, 3\), as scores, got .* \(2, 3\)",
    ),
    ((scores(3, 3),), {"relevant": EYE.int()}, ValueError, r"relevant must be boolean \(3, 3\), .*got torch.int32"),
    (
        (scores(3, 3),),
        {"relevant": EYE & (torch.arange(3) != 1)},
        ValueError,
        r"relevant must have a right item in each row, got none in row 1",
    ),
]


@pytest.mark.parametrize("inputs, options, error, says", REFUSED, ids=[case[3][:45] for case in REFUSED])
def test_what_has_no_order_is_refused(inputs, options, error, says):
    with pytest.raises(error, match=says):
        found(*inputs, 1, **options)
    with pytest.raises(error, match=says):
        recall(*inputs, k=[1], **options)


@pytest.mark.parametrize("k", [0, -3, 1.0, True])
def test_a_k_that_is_no_count_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be an integer of 1 or more, got {k}"):
        found(scores(), k)
