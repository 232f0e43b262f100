"""The tasks say what they mean."""

import pytest
import torch

from nondual.tasks import PAIRS, RING, conjunction, copying, induction, recall, relation, selective_copying, successors


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


def test_copying_asks_for_all_tokens_after_the_gap():
    ids, answers = copying(19, 7, vocabulary=5, gap=3, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (19, 17) and torch.equal(ids[:, :7], answers) and answers.unique().tolist() == [0, 1, 2, 3, 4]
    assert (ids[:, 7:10] == 5).all() and (ids[:, 10:] == 6).all()
    again, latest = copying(19, 7, vocabulary=5, gap=3, latest_first=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, ids) and torch.equal(latest, answers.flip(1))
    with pytest.raises(ValueError, match="length must be 1 or more and gap 0 or more, got 0 and 2"):
        copying(2, 0, gap=2)


def test_recall_asks_for_the_value_that_stood_with_the_key():
    keys, values, answers = recall(23, 6, keys=11, values=5, questions=9, generator=torch.Generator().manual_seed(0))
    assert keys.shape == values.shape == (23, 15) and answers.shape == (23, 9)
    for key, value, answer in zip(keys.tolist(), values.tolist(), answers.tolist()):
        held = dict(zip(key[:6], value[:6]))
        assert len(held) == 6 and max(held) < 11 and max(held.values()) < 5, "six keys, no two alike"
        assert value[6:] == [5] * 9 and answer == [held[k] for k in key[6:]]
    with pytest.raises(ValueError, match="pairs must be between 1 and the number of keys, 4, got 5"):
        recall(2, 5, keys=4)


def test_induction_asks_for_what_followed_the_first_time():
    ids, answers = induction(17, 7, vocabulary=11, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (17, 13) and answers.shape == (17, 6)
    for row, answer in zip(ids.tolist(), answers.tolist()):
        assert len(set(row[:7])) == 7 and max(row) < 11 and row[7:] == row[:6]
        assert answer == [row[row.index(token) + 1] for token in row[7:]]
    with pytest.raises(ValueError, match="length must be between 2 and the vocabulary, 5, got 6"):
        induction(2, 6, vocabulary=5)


def test_conjunction_asks_for_the_item_with_both_features_which_others_have_one_by_one():
    drawn = conjunction(19, 3, 2, features=7, values=5, questions=11, generator=torch.Generator().manual_seed(0))
    assert [each.shape for each in drawn] == [(19, 17)] * 3 + [(19, 11)]
    for first, second, value, answer in zip(*(each.tolist() for each in drawn)):
        held = dict(zip(zip(first[:6], second[:6]), value[:6]))
        assert len(held) == 6 and max(*first, *second) < 7 and max(value[:6]) < 5 and value[6:] == [5] * 11
        assert answer == [held[pair] for pair in zip(first[6:], second[6:])]
        assert all(first[:6].count(a) == 2 and second[:6].count(b) == 3 for a, b in held)
    with pytest.raises(ValueError, match="rows and columns must be between 2 and features, 4, got 1 and 3"):
        conjunction(2, 1, 3, features=4)
    with pytest.raises(ValueError, match="got 3 and 5"):
        conjunction(2, 3, 5, features=4)


def test_successors_asks_for_the_one_who_follows_in_the_ring():
    ids, answers = successors(23, 5, characters=7, questions=9, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (23, 19) and answers.shape == (23, 9)
    for row, answer in zip(ids.tolist(), answers.tolist()):
        follows = dict(zip(row[:10:2], row[1:10:2]))
        assert sorted(follows) == sorted(follows.values()) and len(follows) == 5
        seen, at = [], row[0]
        while at not in seen:
            seen.append(at)
            at = follows[at]
        assert len(seen) == 5, "one ring, not several"
        assert answer == [follows[asked - 7] for asked in row[10:]]
    assert any(ids[i, 1] != ids[j, 1] for i in range(23) for j in range(i) if ids[i, 0] == ids[j, 0])
    with pytest.raises(ValueError, match="ring must be between 3 and the number of characters, 16, got 2"):
        successors(2, 2)
