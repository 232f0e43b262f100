"""Words with their pronunciations, one alphabet for two spellers' sounds, and intervals.

The dictionary and g2p-en write ARPAbet, hama the International Phonetic Alphabet. Both are brought to ARPAbet without
stress. Where the two do not answer to each other one to one:

    ER            hama writes ɝ or ə ɹ, the dictionary ER or AH R: all become AH R
    AH            the dictionary has one sign for the vowels of "cut" and of "about", hama has ʌ and ə: both become AH
    AO and AA     speakers differ whether "caught" sounds like "cot"; hama's ɔ and ɑ do not always stand where the
                  dictionary's AO and AA do: counted as one (merged), and apart (strict)
    IH and AH     a weak vowel is often IH in one dictionary and AH in another: counted as one in the reading `lenient`
    the space     hama writes spaces between sounds where it reads a word as one of another language: left out, but
                  counted. Other signs of such readings have no answer in ARPAbet and stay as they are: such a word is
                  then wrong.
"""

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from nondual.data.pronunciations import CMUDICT, parsed
from nondual.store import read

Sounds = tuple[str, ...]

IPA = {
    **{"ɑ": "AA", "æ": "AE", "ə": "AH", "ʌ": "AH", "ɔ": "AO", "aʊ": "AW", "aɪ": "AY", "ɛ": "EH", "eɪ": "EY"},
    **{"ɪ": "IH", "i": "IY", "oʊ": "OW", "ɔɪ": "OY", "ʊ": "UH", "u": "UW", "ɝ": "ER", "ɚ": "ER"},
    **{"b": "B", "t͡ʃ": "CH", "d": "D", "ð": "DH", "f": "F", "g": "G", "ɡ": "G", "h": "HH", "d͡ʒ": "JH", "k": "K"},
    **{"l": "L", "m": "M", "n": "N", "ŋ": "NG", "p": "P", "ɹ": "R", "s": "S", "ʃ": "SH", "t": "T", "θ": "TH"},
    **{"v": "V", "w": "W", "j": "Y", "z": "Z", "ʒ": "ZH"},
}
READINGS = {"strict": {}, "merged": {"AO": "AA"}, "lenient": {"AO": "AA", "IH": "AH"}}
"""Which sounds are counted as one."""

LENGTHS = (4, 6, 8, 10, 12, 14, 15)  # the last stands for 15 and more


def arpabet(sounds: Sequence[str], reading: str = "merged") -> Sounds:
    """Sounds of the dictionary, of g2p-en or of hama in the one alphabet."""
    same, out = READINGS[reading], []
    for sound in sounds:
        sound = IPA.get(sound, re.sub(r"(?<=[A-Z])\d$", "", sound))
        if sound != " ":
            out += ["AH", "R"] if sound == "ER" else [same.get(sound, sound)]
    return tuple(out)


def dictionary() -> dict[str, list[Sounds]]:
    """Every word of the letters a to z, with all its pronunciations."""
    found: dict[str, list[Sounds]] = defaultdict(list)
    for entry, sounds in parsed(read(CMUDICT, "cmudict/data/cmudict.dict").decode()):
        word = re.sub(r"\(\d+\)$", "", entry)  # a variant's entry ends in its number
        if re.fullmatch("[a-z]+", word):
            found[word].append(sounds)
    return dict(found)


def sample(words: dict[str, list[Sounds]], lengths: Sequence[int], count: int, seed: int) -> dict[int, list[str]]:
    """`count` words of each length, or all where there are fewer; the last of LENGTHS stands for it and longer ones."""
    draw, by_length = random.Random(seed), defaultdict(list)
    for word in sorted(words):
        by_length[min(len(word), LENGTHS[-1])].append(word)
    return {n: draw.sample(by_length[n], min(count, len(by_length[n]))) for n in lengths}


def is_right(written: Sequence[str], listed: list[Sounds], reading: str = "merged") -> bool:
    """Whether a word was written as one of its listed pronunciations."""
    return arpabet(written, reading) in {arpabet(sounds, reading) for sounds in listed}


def matched(written: Sounds, listed: Sounds) -> tuple[int, list[bool]]:
    """The fewest changes that make one of the other, and which sounds of `written` stay (Levenshtein)."""
    rows = [list(range(len(listed) + 1))]
    for i, sound in enumerate(written, 1):
        row = [i]
        for j, other in enumerate(listed, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (sound != other)))
        rows.append(row)
    i, j, stays = len(written), len(listed), [False] * len(written)
    while i and j:
        if rows[i][j] == rows[i - 1][j - 1] + (written[i - 1] != listed[j - 1]):
            i, j = i - 1, j - 1
            stays[i] = written[i] == listed[j]
        elif rows[i][j] == rows[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return rows[-1][-1], stays


def wilson(right: int, of: int) -> list[float]:
    """A share and its 95 percent interval by Wilson's formula."""
    z, p = 1.96, right / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)
    return [round(x, 3) for x in (p, max(low, 0.0), min(high, 1.0))]


def spread(each: Tensor, draws: int = 1000) -> list[float]:
    """A mean over words and its 95 percent interval, by a bootstrap over words."""
    each = each.double()
    picked = torch.randint(len(each), (draws, len(each)), generator=torch.Generator().manual_seed(0))
    edges = each[picked].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(x, 3) for x in (float(each.mean()), *edges.tolist())]
