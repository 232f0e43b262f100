"""Emoji: some 1,600 concepts, each drawn in up to seven styles and named in English and in Hindi.

The drawings come from the sets of `nondual.data.emoji_styles`, which names authors and licences. Names, tags, groups
and the Hindi names come from emojibase-data 17.0.0 (MIT, Miles Johnson), which takes them from Unicode's CLDR (Unicode
License v3). The packages are fetched once and checked by their hashes; the drawings are made on this machine, and kept.

Of the 1,949 emoji that emojibase-data lists, these are left out: 270 flags, 26 regional indicators (the letters that
flags are spelled with), 9 components (skin tones and hair), 13 keycaps and 39 letters and words in boxes. The 2,030
variants that differ from one of them in skin tone alone are left out as well.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from nondual.data.emoji_styles import NAMES, PACKAGES, STYLES, drawing, plain
from nondual.data.svg import drawn, kept, renderer
from nondual.store import Package, read

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

EMOJIBASE = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    size=6_711_091,
    root="package/",
    files={
        "en/data.json": "ed014f1049bd370c5794f815850156196ac382850f51c3e9f6a9e83553fb3f01",
        "hi/data.json": "4a0cb9f58cfde6ab08460e7b0b175fb37fa5c2d90566393284ffeafc8028d1c9",
        "meta/groups.json": "3ce4f0a8e5890ed9d746b12e0056b170340928c1936be35cf92bb3e6d83a71e1",
        "meta/unicode-names.json": "e095fc79ab9811afb75d9142c6505a775e131550b25543e786ac27dbc435614e",
        "LICENSE": "5c4e1582dcae9429a5d00ec0a64185c3a711f9757b2308fdf275d90b120f6149",
    },
    holds="names of emoji",
    source="npm",
)

LEFT_OUT = {"flags", "component"}
"""Groups that are left out."""

LETTERS = {"keycap", "alphanum"}
"""Subgroups that are left out."""

VERSION = 4  # of how drawings are made here: it is part of the names of the files in which they are kept


class Concept(NamedTuple):
    """What an emoji shows, whoever draws it.

    Attributes:
        hexcode: its code points, "1F436" or "1F468-200D-1F33E".
        name: in English, "dog face" (CLDR's short name).
        tags: English keywords, in alphabetical order.
        group: one of eight, as "animals-nature".
        subgroup: a finer one, as "animal-mammal".
        hindi: its name in Hindi, in Devanagari; for "trombone", the one that CLDR did not translate, the English.
    """

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    hindi: str


class Emoji(NamedTuple):
    """C concepts, drawn in several styles.

    Attributes:
        concepts: the C concepts, in Unicode's order.
        pictures: by style, (C, 3, size, size) uint8, RGB on white; all white where the style has no such drawing.
        has: by style, (C,) bool: whether the style has a drawing of the concept.
    """

    concepts: tuple[Concept, ...]
    pictures: "dict[str, Tensor]"
    has: "dict[str, Tensor]"


def emoji(styles: Sequence[str] = STYLES, size: int = 32) -> Emoji:
    """Every concept in every style that is asked for.

    The first call for a style and a size draws them, in some seconds a style; later ones read what was kept.

    Args:
        styles: of `STYLES`.
        size: height and width, in pixels.

    Raises:
        ValueError: a style is unknown, or the size is not between 8 and 512.
        WeightsMissing: the packages were not fetched yet; the message says how.
        ImportError: resvg-py or Pillow is not installed.
    """
    import torch

    _check(styles, size)
    pictures: dict[str, Tensor] = {}
    has: dict[str, Tensor] = {}
    for style in styles:
        inputs = [PACKAGES[style].sha256, EMOJIBASE.sha256, NAMES.get(style), renderer(), size, VERSION]
        key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]

        def draw(style: str = style) -> "dict[str, np.ndarray]":
            found = [_picture(concept, style, size) for concept in concepts()]
            blank = torch.full((3, size, size), 255, dtype=torch.uint8)
            stacked = torch.stack([blank if picture is None else picture for picture in found])
            there = torch.tensor([picture is not None for picture in found])
            return {"pictures": stacked.numpy(), "has": there.numpy()}

        arrays = kept(f"emoji-{style}-{size}-{key}", draw)
        pictures[style], has[style] = torch.from_numpy(arrays["pictures"]), torch.from_numpy(arrays["has"])
    return Emoji(concepts(), pictures, has)


def emoji_picture(hexcode: str, style: str = "noto", size: int = 64) -> "Tensor":
    """One concept in one style, (3, size, size) uint8, RGB on white, without drawing the others.

    Args:
        hexcode: its code points, "1F436"; the selector FE0F makes no difference.
        style: one of `STYLES`.
        size: height and width, in pixels.

    Raises:
        ValueError: there is no such concept, the style is unknown or has no drawing of it, or the size is not between
            8 and 512.
        WeightsMissing: the packages were not fetched yet; the message says how.
        ImportError: resvg-py or Pillow is not installed.
    """
    _check([style], size)
    concept = _by_code().get(plain(hexcode))
    if concept is None:
        raise ValueError(f'hexcode must be the code points of a concept, as "1F436", got {hexcode!r}')
    picture = _picture(concept, style, size)
    if picture is None:
        raise ValueError(f"{style} has no drawing of {concept.name!r} ({hexcode}): choose another style")
    return picture


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All concepts, in Unicode's order, whether or not a style draws them.

    Raises:
        WeightsMissing: emojibase-data was not fetched yet; the message says how.
    """
    groups = json.loads(read(EMOJIBASE, "meta/groups.json"))
    hindi = {entry["hexcode"]: entry["label"] for entry in json.loads(read(EMOJIBASE, "hi/data.json"))}
    found: list[Concept] = []
    listed = [entry for entry in json.loads(read(EMOJIBASE, "en/data.json")) if "group" in entry]
    for entry in sorted(listed, key=lambda entry: entry["order"]):
        group, subgroup = groups["groups"][str(entry["group"])], groups["subgroups"][str(entry["subgroup"])]
        if group not in LEFT_OUT and subgroup not in LETTERS:
            code, tags = entry["hexcode"], tuple(sorted(entry.get("tags", ())))
            found.append(Concept(code, entry["label"], tags, group, subgroup, hindi[code]))
    return tuple(found)


@lru_cache(maxsize=1)
def _by_code() -> dict[str, Concept]:
    return {plain(concept.hexcode): concept for concept in concepts()}


@lru_cache(maxsize=1)
def _unicode_names() -> dict[str, str]:
    """Unicode's own name of a character, as "DOG FACE", by its code point."""
    return {plain(code): name for code, name in json.loads(read(EMOJIBASE, "meta/unicode-names.json")).items()}


def _picture(concept: Concept, style: str, size: int) -> "Tensor | None":
    names = (concept.name, _unicode_names().get(plain(concept.hexcode), ""))
    svg = drawing(style, concept.hexcode, tuple(name for name in names if name))
    return None if svg is None else drawn(svg, size)


def _check(styles: Sequence[str], size: int) -> None:
    if unknown := [style for style in styles if style not in STYLES]:
        raise ValueError(f"a style must be one of {', '.join(STYLES)}, got {unknown[0]!r}")
    if not 8 <= size <= 512:
        raise ValueError(f"size must be between 8 and 512 pixels, got {size}")
