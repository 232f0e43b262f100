"""64 made-up words, none twice, none in this library's word lists."""

from nondual.data import INVENTED_WORDS, WORD_CLASSES, WORD_PAIRS


def test_64_different_words_of_small_letters():
    assert len(INVENTED_WORDS) == len(set(INVENTED_WORDS)) == 64
    assert all(word.isascii() and word.isalpha() and word.islower() for word in INVENTED_WORDS)


def test_none_is_a_word_of_the_other_lists():
    pairs = {word for pairs in WORD_PAIRS.values() for pair in pairs for word in pair}
    classes = {word for of in WORD_CLASSES.values() for words in of.values() for word in words}
    assert not set(INVENTED_WORDS) & (pairs | classes)
