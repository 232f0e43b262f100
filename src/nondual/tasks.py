"""Small real tasks: each asks a mechanism one question that it can get right or wrong."""

import torch
from jaxtyping import Int
from torch import Tensor

RING = (1, 2, 0)
"""Who looks at whom among rock, scissors and paper: 0 at 1, 1 at 2, 2 at 0, and nobody back."""

PAIRS = (1, 0, 3, 2)
"""Who looks at whom among two couples: 0 and 1 at each other, 2 and 3 at each other."""


def relation(
    looks_at: tuple[int, ...], batch: int, *, payloads: int = 8, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Everyone stands in a random order holding a random card; each must name the card of the one it looks at.

    Order says nothing, so no positions are needed: who looks at whom is in the characters alone.

    Args:
        looks_at: for each of N characters, the character it looks at.
        batch: B.
        payloads: how many cards there are.
        generator: where the randomness comes from.

    Returns:
        (characters (B, N), cards (B, N), answers (B, N)), integers.
    """
    n = len(looks_at)
    characters = torch.rand(batch, n, generator=generator).argsort(1)
    cards = torch.randint(payloads, (batch, n), generator=generator)
    place = characters.argsort(1)  # where each character stands
    seen = torch.tensor(looks_at)[characters]  # whom each place looks at
    return characters, cards, cards.gather(1, place.gather(1, seen))


def selective_copying(
    batch: int, length: int, *, tokens: int = 4, vocabulary: int = 8, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b tokens"]]:
    """A few tokens lie scattered among blanks; at the end they must be named again, in order.

        ids      . c . . a . b . . . ? ? ?      answers      c a b

    Where they lie is drawn anew each time, so that to keep them one must know what they are and not when they came.
    Source: Gu and Dao 2023 (2312.00752), section 4.1.1.

    Args:
        batch: B.
        length: how many places the tokens and blanks take.
        tokens: how many of the places hold a token.
        vocabulary: how many kinds of tokens there are.
        generator: where the randomness comes from.

    Returns:
        (ids (B, length + tokens), answers (B, tokens)). Among the ids 0 to vocabulary - 1 are tokens, `vocabulary` is
        the blank and `vocabulary + 1` asks for the next token.

    Raises:
        ValueError: more tokens than places.
    """
    if tokens > length:
        raise ValueError(f"tokens must be at most length, {length}, got {tokens}")
    answers = torch.randint(vocabulary, (batch, tokens), generator=generator)
    places = torch.rand(batch, length, generator=generator).argsort(1)[:, :tokens].sort(1).values
    ids = torch.full((batch, length), vocabulary).scatter(1, places, answers)
    return torch.cat([ids, torch.full((batch, tokens), vocabulary + 1)], 1), answers
