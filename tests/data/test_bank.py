"""The sentences are as many of either sense, all different, and have the word once."""

import re

from nondual.data import BANK


def test_twenty_four_sentences_of_each_sense():
    assert {sense: len(sentences) for sense, sentences in BANK.items()} == {"river": 24, "money": 24}
    assert len({*BANK["river"], *BANK["money"]}) == 48


def test_the_word_stands_once_in_each():
    for sentence in (*BANK["river"], *BANK["money"]):
        assert len(re.findall(r"\bbank\b", sentence, re.IGNORECASE)) == 1, sentence
        assert sentence[0].isupper() and sentence.endswith(".")
