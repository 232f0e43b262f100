"""Where a model of learned pieces cuts: beside spaces, the units of the script, and the borders of characters."""

import unicodedata
from typing import Any, cast

import torch

from nondual.data.gita import transliterate
from nondual.language_models.bytes import HNet
from nondual.language_models.causal import CausalLM
from nondual.tokenization import aksharas

VOWELS = set("aeiouāīūṛṝAEIOU")


def kinds_of(text: str, units: list[str] | None = None) -> dict[str, torch.Tensor]:
    """For each byte of a text, by name, whether it is of a kind (bytes,); a piece that begins at it would begin so.

    Args:
        text: in any script.
        units: what the script builds (aksharas), which put together are the text.
    """
    space = [c.isspace() for c in text]
    vowel_sign = [
        unicodedata.category(c)[0] == "M" and unicodedata.name(c).startswith("DEVANAGARI VOWEL") for c in text
    ]
    virama = [c == "\u094d" for c in text]
    letter = [unicodedata.category(c)[0] == "L" for c in text]
    by_character = {
        "space": space,
        "first letter of a word": [not here and before for here, before in zip(space, [True, *space])],
        "vowel sign": vowel_sign,
        "virama": virama,
        "vowel": [c in VOWELS for c in text],
        "other letter": [
            is_letter and c not in VOWELS and not before for c, is_letter, before in zip(text, letter, [True, *space])
        ],
    }
    if units is not None:
        starts = [i == 0 for unit in units for i in range(len(unit))]
        by_character["unit of the script"] = [start and not s for start, s in zip(starts, space)]
    lengths = [len(c.encode()) for c in text]
    found = {
        name: torch.tensor([kind and i == 0 for kind, n in zip(kinds, lengths) for i in range(n)])
        for name, kinds in by_character.items()
        if any(kinds)
    }
    for place in range(1, max(lengths)):
        found[f"byte {place + 1} of a character"] = torch.tensor([i == place for n in lengths for i in range(n)])
    found["first byte of a character"] = torch.tensor([i == 0 for n in lengths for i in range(n)])
    return found


def units_of(name: str, text: str, devanagari: str | None = None) -> list[str] | None:
    """The aksharas of a text in Devanagari; in IAST those of the same text in Devanagari, written in Latin letters."""
    if name == "Devanagari":
        return aksharas(text)
    return None if devanagari is None else [transliterate(unit) for unit in aksharas(devanagari)]


@torch.no_grad()
def cut_at(model: CausalLM, text: str, length: int = 384) -> torch.Tensor:
    """Whether a piece begins at each byte of a text (bytes,). It is read in segments of about `length` bytes that end
    at white space; the first byte of each is left out of the count by the caller, by `True` in the second row.

    Returns:
        (2, bytes): the cuts, and the bytes that a segment begins with.
    """
    data, cuts, begins, at = text.encode(), [], [], 0
    begin = cast(int, model.vocabulary) - 1
    while at < len(data):
        end = next((i for i in range(at + length, len(data)) if data[i] in b" \n"), len(data))
        segment = list(data[at:end])
        cuts.append(cast(HNet, model).cuts(torch.tensor([[begin, *segment]])).cut[0, 1:])
        begins.append(torch.arange(len(segment)) == 0)
        at = end
    return torch.stack([torch.cat(cuts), torch.cat(begins)])


def where_it_cuts(model: CausalLM, name: str, text: str, devanagari: str | None = None) -> dict[str, Any]:
    """By kind of place: the share of its bytes that are cut, the share of cuts that are there, and that of all bytes.

    The last is what cuts at random would have there, however many they are.
    """
    cut, begins = cut_at(model, text)
    counts = ~begins
    kinds = {}
    for kind, there in kinds_of(text, units_of(name, text, devanagari)).items():
        kinds[kind] = {
            "cut": round((cut & there & counts).sum().item() / max((there & counts).sum().item(), 1), 4),
            "of_cuts": round((cut & there & counts).sum().item() / max((cut & counts).sum().item(), 1), 4),
            "of_bytes": round((there & counts).sum().item() / counts.sum().item(), 4),
        }
    end = text.find("\n", 120)
    sample = text if end < 0 else text[:end]
    return {
        "rate": round(cut[counts].float().mean().item(), 4),
        "kinds": kinds,
        "sample": sample,
        "sample_cuts": cut[: len(sample.encode())].nonzero().flatten().tolist(),
    }
