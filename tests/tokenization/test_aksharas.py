"""nondual.tokenization.aksharas: by hand, and on every word of the Gītā."""

from nondual.data import gita
from nondual.data.gita import SIGNS, VIRAMA, transliterate
from nondual.tokenization import aksharas


def test_by_hand():
    assert aksharas("धर्मक्षेत्रे") == ["ध", "र्म", "क्षे", "त्रे"]
    assert aksharas("तत् त्वम्") == ["त", "त्", " ", "त्व", "म्"]
    assert aksharas("सञ्जय उवाच\nॐ तेऽपि") == ["स", "ञ्ज", "य", " ", "उ", "वा", "च", "\n", "ॐ", " ", "ते", "ऽ", "पि"]
    assert aksharas("अंशः abc") == ["अं", "शः", " ", "a", "b", "c"] and aksharas("") == []


def test_put_together_they_are_the_text_in_either_script():
    text = "\n".join(" ".join(verse.devanagari) for verse in gita())
    units = aksharas(text)
    assert "".join(units) == text
    assert "".join(transliterate(unit) for unit in units) == transliterate(text)
    assert not any(unit[0] in SIGNS or unit[0] == VIRAMA for unit in units)
