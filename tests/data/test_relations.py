"""The annotated sentences: every index is a word, each relation has pairs enough, at several distances."""

from collections import Counter

import pytest

from nondual.data.relations import ALIKE, NAMES, RELATIONS, _parse

DETERMINERS = "the a an this that those every each some no which what whose many more".split()
PRONOUNS = "he she it they him her his its their them itself themselves".split()


def pairs(relation):
    return [(s, i, j) for s in RELATIONS for name, i, j in s.pairs if name == relation]


def test_sixty_sentences_or_more_all_different():
    assert len(RELATIONS) >= 60 and len({s.text for s in RELATIONS}) == len(RELATIONS)
    for s in RELATIONS:
        assert s.text[0].isupper() and s.text[-1] in ".?" and len(s.words) < 25, s.text


def test_every_index_is_a_word_and_no_pair_stands_twice():
    for s in RELATIONS:
        assert len(set(s.pairs)) == len(s.pairs) > 0, s.text
        for name, i, j in s.pairs:
            assert name in NAMES.values() and i != j and 0 <= i < len(s.words) and 0 <= j < len(s.words), (s.text, i, j)


@pytest.mark.parametrize("relation", NAMES.values())
def test_each_relation_has_forty_pairs_and_no_fixed_distance_finds_three_quarters_of_them(relation):
    offsets = Counter(j - i for _, i, j in pairs(relation))
    assert sum(offsets.values()) >= 40 and sum(count >= 2 for count in offsets.values()) >= 3
    assert max(offsets.values()) < 0.75 * sum(offsets.values())


@pytest.mark.parametrize("relation, words", [("determiner", DETERMINERS), ("pronoun", PRONOUNS)])
def test_what_is_annotated_as_a_determiner_or_a_pronoun_is_one(relation, words):
    assert {s.words[i].lower() for s, i, _ in pairs(relation)} <= set(words)


def test_a_word_has_one_head_in_a_relation():
    for name in ("determiner", "adjective", "pronoun", "preposition", "object"):
        for s in RELATIONS:
            heads = Counter(i for relation, i, _ in s.pairs if relation == name)
            assert not heads or max(heads.values()) == 1, (s.text, name)


def test_a_number_after_a_word_counts_its_occurrences():
    (read,) = _parse("The dog saw the red cat.\nd the-dog the#2-cat | a red-cat | o cat-saw\n")
    assert read.words == ("The", "dog", "saw", "the", "red", "cat")
    assert read.pairs == (("determiner", 0, 1), ("determiner", 3, 5), ("adjective", 4, 5), ("object", 5, 2))
    with pytest.raises(ValueError, match=r"the#3 must be a word of the sentence 'The dog saw the red cat.'"):
        _parse("The dog saw the red cat.\nd the#3-cat\n")


def test_the_words_alike_in_meaning_are_all_different():
    words = [word for pair in ALIKE for word in pair]
    assert len(ALIKE) == 48 and len(set(words)) == 96 and all(word.isalpha() and word.islower() for word in words)
