"""The sentences are as many of each sense, all different, and have their word once."""

import re

import pytest

from nondual.data import SENSES


def test_five_words_in_two_senses_of_twelve_sentences_each():
    assert sorted(SENSES) == ["bat", "crane", "match", "plant", "seal"]
    assert [len(sentences) for senses in SENSES.values() for sentences in senses.values()] == [12] * 10
    every = [sentence for senses in SENSES.values() for sentences in senses.values() for sentence in sentences]
    assert len(set(every)) == 120


@pytest.mark.parametrize("word", SENSES)
def test_the_word_stands_once_in_each(word):
    for sentences in SENSES[word].values():
        for sentence in sentences:
            assert len(re.findall(rf"\b{word}\b", sentence, re.IGNORECASE)) == 1, sentence
            assert sentence[0].isupper() and sentence.endswith(".")


@pytest.mark.parametrize("word", SENSES)
def test_in_either_sense_it_stands_early_and_late(word):
    for sentences in SENSES[word].values():
        places = [sentence.lower().rstrip(".").split().index(word) for sentence in sentences]
        assert min(places) <= 3 and max(places) >= 6
