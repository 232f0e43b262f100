"""The tasks say what they mean."""

import pytest
import torch

from nondual.tasks import PAIRS, RING, relation, selective_copying


@pytest.mark.parametrize("looks_at", [RING, PAIRS, (3, 0, 1, 2, 4)])
def test_the_answer_is_the_card_of_the_one_looked_at(looks_at):
    characters, cards, answers = relation(looks_at, 17, generator=torch.Generator().manual_seed(0))
    for row in range(17):
        holds = dict(zip(characters[row].tolist(), cards[row].tolist()))
        assert sorted(holds) == list(range(len(looks_at)))
        assert answers[row].tolist() == [holds[looks_at[c]] for c in characters[row].tolist()]


def test_the_ring_has_a_direction_and_the_pairs_have_none():
    assert all(RING[RING[i]] != i for i in range(3))
    assert all(PAIRS[PAIRS[i]] == i for i in range(4))


def test_selective_copying_asks_for_the_tokens_in_their_order():
    ids, answers = selective_copying(190, 23, tokens=5, vocabulary=7, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (190, 28) and answers.shape == (190, 5)
    for row, answer in zip(ids, answers):
        assert [i for i in row.tolist() if i < 7] == answer.tolist()
        assert row[23:].tolist() == [8] * 5 and (row[:23] == 7).sum() == 18
    assert (ids[:, :23] < 7).any(0).all(), "any place may hold a token"


def test_more_tokens_than_places_are_refused():
    with pytest.raises(ValueError, match="tokens must be at most length, 3, got 4"):
        selective_copying(2, 3)
