"""The units that the Devanagari script builds: one or more consonants with their vowel sign, or a vowel.

Source: The Unicode Standard, chapter 12.1, "Devanagari" (orthographic syllables), for the signs of Sanskrit that
`nondual.data.gita` has.
"""

import re

_CONSONANT, _VOWEL, _SIGN, _VIRAMA, _AFTER = "[क-ह]", "[अ-औॐॠॡ]", "[ा-ौॢॣ]", "्", "[ँंः]"
_AKSHARA = re.compile(
    f"{_CONSONANT}(?:{_VIRAMA}{_CONSONANT})*(?:{_SIGN}|{_VIRAMA})?{_AFTER}*|{_VOWEL}{_AFTER}*|.", re.DOTALL
)


def aksharas(text: str) -> list[str]:
    """The units of a text in Devanagari, in order; put together they are the text. Any other sign stands by itself.

    A virama joins a consonant to the next. At the end of a word it belongs to the consonant before it.

    >>> aksharas("धर्मक्षेत्रे")
    ['ध', 'र्म', 'क्षे', 'त्रे']
    """
    return _AKSHARA.findall(text)
