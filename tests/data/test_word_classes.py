"""Three pairs of classes, 24 words in each, no word in both of a pair."""

from nondual.data import WORD_CLASSES


def test_three_pairs_of_classes_of_24_words_and_no_word_in_two():
    assert [list(classes) for classes in WORD_CLASSES.values()] == [
        ["animal", "tool"],
        ["food", "garment"],
        ["place", "job"],
    ]
    every = [word for classes in WORD_CLASSES.values() for words in classes.values() for word in words]
    assert len(every) == len(set(every)) == 3 * 2 * 24


def test_some_by_hand():
    assert "camel" in WORD_CLASSES["animals and tools"]["animal"]
    assert "clamp" in WORD_CLASSES["animals and tools"]["tool"]
    assert "baker" in WORD_CLASSES["places and jobs"]["job"]
