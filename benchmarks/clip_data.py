"""Pictures with captions for benchmarks/clip.py: which are held out, and how pictures and captions are varied.

A *concept* is what several people drew, under one name. Concepts that differ in who a person is ("farmer", "man
farmer", "woman farmer"), or in which way one faces, are one *family*. What is held out is held out with its whole
family, in all styles, since a model that met it in another style would have read its captions; and no two test concepts
are of one family.

    train    the rest
    tune     100 concepts, on which rates and losses are chosen
    test     150 concepts, which are drawn in all four complete styles

One style is held out as well. A caption is a vector of the sentence encoder MiniLM, which is not trained: of the name,
of the name with its tags, or of one tag.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.data import emoji
from nondual.data.clipart import clipart
from nondual.pretrained import SentenceEncoder, minilm

HELD_STYLE = "fluent-emoji-flat"
COMPLETE = ("noto", "twemoji", "openmoji")
"""Styles of the training that draw every concept: each is tested on its own."""

TUNE, TEST, SPLIT_SEED = 100, 150, 0

JOINER, SELECTOR, FACING = "200D", "FE0F", "27A1"
WHO = {"2640", "2642", "1F468", "1F469", "1F9D1", "1F466", "1F467", "1F9D2", "1F474", "1F475", "1F9D3"}
"""Code points of women, men, girls, boys, children and people."""


class Pairs(NamedTuple):
    """P pictures of C concepts, and the captions of each concept.

    Attributes:
        pictures: (P, 3, 32, 32) uint8.
        concept, style: (P,) int64, of each picture.
        styles: their names.
        names, tags, groups, families: of the C concepts.
        captions: (C, K, 384), of each concept the name, the name with its tags, then its tags one by one; 0 beyond.
        n_captions: (C,) int64, how many there are.
        train, tune, test: (…,) int64, concepts.
    """

    pictures: Tensor
    concept: Tensor
    style: Tensor
    styles: tuple[str, ...]
    names: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    families: tuple[str, ...]
    captions: Tensor
    n_captions: Tensor
    train: Tensor
    tune: Tensor
    test: Tensor

    def of(self, concepts: Tensor, style: str) -> Tensor:
        """The pictures (…, 3, 32, 32) of concepts in one style, which must draw them all."""
        here = self.style == self.styles.index(style)
        place = torch.full((len(self.names),), -1)
        place[self.concept[here]] = here.nonzero()[:, 0]
        assert (place[concepts] >= 0).all(), f"{style} does not draw all of these"
        return self.pictures[place[concepts]]


# --- emoji ---------------------------------------------------------------------------------------------------------


def emoji_pairs() -> Pairs:
    """Seven styles of emoji, split by concept."""
    found = emoji()
    styles = tuple(found.pictures)
    rows = [(i, s) for s, style in enumerate(styles) for i in found.has[style].nonzero()[:, 0].tolist()]
    concept, style = (torch.tensor(column) for column in zip(*rows))
    pictures = torch.cat([found.pictures[name][found.has[name]] for name in styles])
    names = tuple(each.name for each in found.concepts)
    tags = tuple(each.tags for each in found.concepts)
    captions, counts = vectors_of(names, tags)
    drawn = torch.stack([found.has[name] for name in (*COMPLETE, HELD_STYLE)]).all(0)
    families = tuple(family(each.hexcode) for each in found.concepts)
    groups = tuple(each.group for each in found.concepts)
    held = split(families, drawn)
    return Pairs(pictures, concept, style, styles, names, tags, groups, families, captions, counts, *held)


def clipart_pairs() -> Pairs:
    """Drawings of openclipart. A concept is a title; titles that differ in digits and endings alone are one family."""
    found = clipart()
    titles: dict[str, int] = {}
    concept = torch.tensor([titles.setdefault(each.title.strip().lower(), len(titles)) for each in found.drawings])
    names, first = tuple(titles), {}
    for drawing, i in zip(found.drawings, concept.tolist()):
        first.setdefault(i, drawing)
    tags = tuple(first[i].keywords for i in range(len(names)))
    captions, counts = vectors_of(names, tags)
    families = tuple(re.sub(r"[^a-z]+|s\b", "", name) or name for name in names)
    held = split(families, torch.ones(len(names), dtype=torch.bool))
    groups = tuple(first[i].folder for i in range(len(names)))
    style = torch.zeros_like(concept)
    return Pairs(
        found.pictures, concept, style, ("openclipart",), names, tags, groups, families, captions, counts, *held
    )


# --- the split -----------------------------------------------------------------------------------------------------


def family(hexcode: str) -> str:
    """Its code points without those that say who a person is and which way one faces; "person" where none is left."""
    codes = hexcode.upper().split("-")
    extra = {JOINER, SELECTOR, *WHO} | ({FACING} if JOINER in codes else set())  # alone, the arrow is a concept
    codes = [code for code in codes if code not in extra]
    return "-".join(codes) or "person"


def split(families: tuple[str, ...], drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Concepts to train, to tune and to test on. Of a held-out family the first that is drawn is used, no other."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(families):
        members[name].append(i)
    named = [name for name in members if name != "person"]
    held: list[int] = []
    unused: set[int] = set()
    for place in torch.randperm(len(named), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist():
        first = next((i for i in members[named[place]] if drawn[i]), None)
        if first is not None and len(held) < TEST + TUNE:
            held.append(first)
            unused.update(members[named[place]])
    train = [i for i in range(len(families)) if i not in unused]
    return torch.tensor(train), torch.tensor(held[TEST:]), torch.tensor(held[:TEST])


def one_a_family(pairs: Pairs, count: int) -> Tensor:
    """Concepts of the training, each of another family and drawn in all complete styles, as the test concepts are."""
    held = torch.isin(pairs.concept, pairs.train)
    drawn = torch.stack([
        torch.zeros(len(pairs.names), dtype=torch.bool).index_fill_(
            0, pairs.concept[held & (pairs.style == pairs.styles.index(style))], True
        )
        for style in (*COMPLETE, HELD_STYLE)
    ]).all(0)  # fmt: skip
    firsts: dict[str, int] = {}
    for i in pairs.train[drawn[pairs.train]].tolist():
        firsts.setdefault(pairs.families[i], i)
    kept = torch.tensor(list(firsts.values()))
    return kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]]


# --- captions ------------------------------------------------------------------------------------------------------


def vectors_of(names: tuple[str, ...], tags: tuple[tuple[str, ...], ...]) -> tuple[Tensor, Tensor]:
    """The captions of each concept as vectors (C, K, 384), and how many there are (C,)."""
    encoder = minilm()
    single = sorted({tag for each in tags for tag in each})
    place = {tag: i for i, tag in enumerate(single)}
    of_tag = encoded(encoder, single) if single else torch.zeros(0, 384)
    of_name = encoded(encoder, list(names))
    of_both = encoded(encoder, [", ".join([name, *each[:8]]) for name, each in zip(names, tags)])
    most = max((len(each) for each in tags), default=0)
    captions, counts = torch.zeros(len(names), 2 + most, of_name.shape[1]), torch.zeros(len(names), dtype=torch.long)
    for i, each in enumerate(tags):
        own = [of_name[i], of_both[i], *(of_tag[place[tag]] for tag in each)]
        captions[i, : len(own)], counts[i] = torch.stack(own), len(own)
    return captions, counts


def encoded(encoder: SentenceEncoder, texts: list[str]) -> Tensor:
    """Unit vectors (T, 384)."""
    with torch.no_grad():
        return F.normalize(encoder.encode(texts, batch_size=64), dim=-1)


# --- batches -------------------------------------------------------------------------------------------------------


class Draw:
    """Batches of pairs: concepts that differ, a picture and a caption of each by chance, the picture varied.

    Args:
        pairs: what there is.
        styles: which of their styles are used.
        batch: how many concepts a batch has.
        shuffled: the captions are another concept's, the same one throughout: the control without any meaning.
    """

    def __init__(self, pairs: Pairs, styles: tuple[str, ...], batch: int, *, shuffled: bool = False):
        numbers = torch.tensor([pairs.styles.index(style) for style in styles])
        usable = torch.isin(pairs.style, numbers) & torch.isin(pairs.concept, pairs.train)
        rows = usable.nonzero()[:, 0]
        self.rows = rows[pairs.concept[rows].argsort(stable=True)]
        self.concepts, self.counts = pairs.concept[self.rows].unique_consecutive(return_counts=True)
        self.starts = self.counts.cumsum(0) - self.counts
        self.pairs, self.batch = pairs, min(batch, len(self.concepts))
        order = torch.randperm(len(self.concepts), generator=torch.Generator().manual_seed(SPLIT_SEED))
        self.captioned = self.concepts[order] if shuffled else self.concepts

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, 32, 32), floats from 0 to 255, and captions (B, 384)."""

        def chance(n: int = self.batch) -> Tensor:
            return torch.rand(n, generator=generator)

        chosen = torch.randperm(len(self.concepts), generator=generator)[: self.batch]
        drawing = self.rows[self.starts[chosen] + (chance() * self.counts[chosen]).long()]
        concept, kind = self.captioned[chosen], chance()
        tag = 2 + (chance() * (self.pairs.n_captions[concept] - 2)).long()
        which = torch.where(kind < 0.4, 0, torch.where((kind < 0.7) | (tag >= self.pairs.n_captions[concept]), 1, tag))
        return varied(self.pairs.pictures[drawing], generator), self.pairs.captions[concept, which]


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture on white, turned, scaled, shifted, perhaps mirrored, with other colours, a few of them grey."""
    n = len(pictures)

    def chance(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    turn, mirror = (chance() - 0.5) * 0.5, torch.where(chance() < 0.5, -1.0, 1.0)
    width = 1 + (chance() - 0.4) * 0.4
    height = width * (1 + (chance() - 0.5) * 0.2)
    place = torch.zeros(n, 2, 3)
    place[:, 0, 0], place[:, 0, 1] = width * mirror * turn.cos(), -height * turn.sin()
    place[:, 1, 0], place[:, 1, 1] = width * mirror * turn.sin(), height * turn.cos()
    place[:, :, 2] = (chance(2) - 0.5) * 0.3
    ink = 255 - pictures.float()  # so that what comes in from outside is white
    ink = F.grid_sample(ink, F.affine_grid(place, list(ink.shape), align_corners=False), align_corners=False)
    mixed = torch.eye(3) + 0.15 * torch.randn(n, 3, 3, generator=generator)
    ink = torch.einsum("bij,bjhw->bihw", mixed, ink)
    grey = chance(1, 1, 1) < 0.15
    return 255 - torch.where(grey, ink.mean(1, keepdim=True), ink)
