"""No question and no answer of a relation comes twice, and every word is written without stray characters."""

import pytest

from nondual.data import WORD_PAIRS


def test_five_relations_of_47_pairs_or_more():
    assert {name: len(pairs) for name, pairs in WORD_PAIRS.items()} == {
        "French": 60,
        "opposite": 52,
        "capital": 50,
        "plural": 47,
        "past": 53,
    }


@pytest.mark.parametrize("name", WORD_PAIRS)
def test_questions_and_answers_are_all_different(name):
    for column in zip(*WORD_PAIRS[name]):
        assert len(set(column)) == len(column)
        assert all(word == word.strip() and "_" not in word and "-" not in word for word in column)
    assert all(question != answer for question, answer in WORD_PAIRS[name])


def test_some_by_hand():
    assert ("dog", "chien") in WORD_PAIRS["French"] and ("star", "étoile") in WORD_PAIRS["French"]
    assert ("India", "New Delhi") in WORD_PAIRS["capital"] and ("mouse", "mice") in WORD_PAIRS["plural"]
    assert ("go", "went") in WORD_PAIRS["past"] and ("love", "hate") in WORD_PAIRS["opposite"]
