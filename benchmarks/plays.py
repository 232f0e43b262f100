"""Shakespeare's plays in numbers, one a character, some of them kept apart from training."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from nondual.data import shakespeare


class Plays(NamedTuple):
    """Every play by its name, and those to train on one after the other; both (characters,) int64."""

    alphabet: list[str]
    of: dict[str, Tensor]
    train: Tensor


def in_numbers(apart: Collection[str]) -> Plays:
    """All plays; those named are not trained on."""
    plays = shakespeare()
    alphabet = sorted(set("".join(plays.values())))
    number = {character: i for i, character in enumerate(alphabet)}
    of = {name: torch.tensor([number[c] for c in play]) for name, play in plays.items()}
    return Plays(alphabet, of, torch.cat([ids for name, ids in of.items() if name not in apart]))


def windows(ids: Tensor, length: int, most: int | None = None) -> Tensor:
    """The first windows of a play (count, length + 1), each beginning with the last character of the one before."""
    return ids.unfold(0, length + 1, length)[:most]


def drawn(ids: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Windows (batch, length + 1) that begin anywhere."""
    starts = torch.randint(len(ids) - length, (batch, 1), generator=generator)
    return ids[starts + torch.arange(length + 1)]
