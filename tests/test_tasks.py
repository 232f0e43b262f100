"""The tasks say what they mean."""

import pytest
import torch

from nondual.tasks import PAIRS, RING, relation


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
