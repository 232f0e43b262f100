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


def copying(
    batch: int,
    length: int,
    *,
    vocabulary: int = 8,
    gap: int = 0,
    latest_first: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b length"]]:
    """A row of random tokens must be named again, in order or from the last to the first.

        ids      c a b a . . ? ? ? ?      answers      c a b a      latest first      a b a c

    Nothing is left out and nothing can be guessed: the answers hold length · log2(vocabulary) bits, and whatever is
    carried to the first question must hold them all. Source: Hochreiter and Schmidhuber 1997, "Long short-term memory",
    section 5, for what is kept over a gap; Arjovsky, Shah and Bengio 2016 (1511.06464), section 4.1, for copying.

    Args:
        batch: B.
        length: how many tokens there are.
        vocabulary: how many kinds of tokens there are.
        gap: how many blanks stand between the tokens and the first question.
        latest_first: ask for the last token first.
        generator: where the randomness comes from.

    Returns:
        (ids (B, length + gap + length), answers (B, length)). Among the ids 0 to vocabulary - 1 are tokens,
        `vocabulary` is the blank and `vocabulary + 1` asks for the next answer.

    Raises:
        ValueError: a length below 1 or a gap below 0.
    """
    if length < 1 or gap < 0:
        raise ValueError(f"length must be 1 or more and gap 0 or more, got {length} and {gap}")
    tokens = torch.randint(vocabulary, (batch, length), generator=generator)
    blanks = torch.full((batch, gap), vocabulary)
    questions = torch.full((batch, length), vocabulary + 1)
    return torch.cat([tokens, blanks, questions], 1), tokens.flip(1) if latest_first else tokens


def recall(
    batch: int,
    pairs: int,
    *,
    keys: int = 32,
    values: int = 8,
    questions: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b questions"]]:
    """Pairs of a key and a value are shown one after another; then some keys come again, and their values are asked.

        keys        7 2 5 | 2 7 2 5        pairs = 3
        values      c a a | ? ? ? ?        answers      a c a a

    Every key is shown once, in random order; any of them may be asked, more than once. Source: Arora et al. 2023
    (2312.04927), section 4, multi-query associative recall. Where we differ: key and value stand at one position, not
    at two, so that a model need not first learn which value follows which key.

    Args:
        batch: B.
        pairs: m, how many pairs are shown.
        keys: how many kinds of keys there are.
        values: how many kinds of values there are.
        questions: Q, how many keys are asked.
        generator: where the randomness comes from.

    Returns:
        (keys (B, m + Q), values (B, m + Q), answers (B, Q)). The value at a question is `values`.

    Raises:
        ValueError: more pairs than keys, or no pair.
    """
    if not 1 <= pairs <= keys:
        raise ValueError(f"pairs must be between 1 and the number of keys, {keys}, got {pairs}")
    shown = torch.rand(batch, keys, generator=generator).argsort(1)[:, :pairs]
    held = torch.randint(values, (batch, pairs), generator=generator)
    which = torch.randint(pairs, (batch, questions), generator=generator)
    asked = torch.full((batch, questions), values)
    return torch.cat([shown, shown.gather(1, which)], 1), torch.cat([held, asked], 1), held.gather(1, which)
