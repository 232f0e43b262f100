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


def induction(
    batch: int, length: int, *, vocabulary: int = 32, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b answers"]]:
    """A random row of tokens, no two alike, comes twice; of the second time each next token is asked.

        ids      c a d b c a d      answers      a d b      at the last three places

    What follows a token can be known only from what followed it the first time. Source: Olsson et al. 2022
    (2209.11895), "repeated random tokens". Where we differ: no token comes twice in a row, so every answer is certain.

    Args:
        batch: B.
        length: how many tokens the row has.
        vocabulary: how many kinds of tokens there are.
        generator: where the randomness comes from.

    Returns:
        (ids (B, 2 · length - 1), answers (B, length - 1)). The answers belong to the last length - 1 places.

    Raises:
        ValueError: a length below 2 or above the vocabulary.
    """
    if not 2 <= length <= vocabulary:
        raise ValueError(f"length must be between 2 and the vocabulary, {vocabulary}, got {length}")
    row = torch.rand(batch, vocabulary, generator=generator).argsort(1)[:, :length]
    return torch.cat([row, row[:, :-1]], 1), row[:, 1:]


def conjunction(
    batch: int,
    rows: int,
    columns: int,
    *,
    features: int = 8,
    values: int = 8,
    questions: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b n"], Int[Tensor, "b questions"]]:
    """Items with two features and a value are shown; then two features come, and the value of the item with both.

        first       2 5 2 5 | 5 2        rows = 2, columns = 2
        second      0 0 3 3 | 3 3
        values      c a b d | ? ?        answers      d b

    The items are all pairs of some first features, one a row, with some second features, one a column, in random order.
    So each feature of a question is had by other items too, and either of them alone leaves `columns` or `rows` items
    to guess among. Source: Golovneva et al. 2025 (2504.00927), section 4.1, who ask for the block of letters that holds
    several letters at once.

    Args:
        batch: B.
        rows: how many first features an example has.
        columns: how many second features it has.
        features: how many kinds there are, of first features and of second ones.
        values: how many kinds of values there are.
        questions: Q, how many items are asked for.
        generator: where the randomness comes from.

    Returns:
        (first (B, rows · columns + Q), second, values, answers (B, Q)). The value at a question is `values`.

    Raises:
        ValueError: rows or columns below 2 or above `features`.
    """
    if not 2 <= min(rows, columns) <= max(rows, columns) <= features:
        raise ValueError(f"rows and columns must be between 2 and features, {features}, got {rows} and {columns}")
    items = rows * columns
    order = torch.rand(batch, items, generator=generator).argsort(1)
    firsts, seconds = (torch.rand(batch, features, generator=generator).argsort(1) for _ in range(2))
    first, second = firsts.gather(1, order // columns), seconds.gather(1, order % columns)
    held = torch.randint(values, (batch, items), generator=generator)
    which = torch.randint(items, (batch, questions), generator=generator)
    asked = torch.full((batch, questions), values)
    first, second = (torch.cat([each, each.gather(1, which)], 1) for each in (first, second))
    return first, second, torch.cat([held, asked], 1), held.gather(1, which)


def successors(
    batch: int, ring: int, *, characters: int = 16, questions: int = 8, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b questions"]]:
    """Some characters stand in a random ring, which is shown as pairs; then who follows a character is asked.

        ids      c a  d c  a d  c? a?        answers      a d        the ring c a d, and back to c

    Each character comes once as the first of a pair and once as the second, so that only direction tells the one who
    follows from the one who precedes.

    Args:
        batch: B.
        ring: how many characters stand in the ring.
        characters: how many kinds of characters there are.
        questions: Q, how many are asked.
        generator: where the randomness comes from.

    Returns:
        (ids (B, 2 · ring + Q), answers (B, Q)). A character c has the id c where it is shown, and `characters` + c
        where it is asked.

    Raises:
        ValueError: a ring of fewer than 3, in which both neighbours are one, or of more than `characters`.
    """
    if not 3 <= ring <= characters:
        raise ValueError(f"ring must be between 3 and the number of characters, {characters}, got {ring}")
    stands = torch.rand(batch, characters, generator=generator).argsort(1)[:, :ring]
    pairs = torch.stack([stands, stands.roll(-1, 1)], -1)  # (B, ring, 2)
    order = torch.rand(batch, ring, generator=generator).argsort(1)
    shown = pairs.gather(1, order[..., None].expand(-1, -1, 2)).flatten(1)
    which = torch.randint(ring, (batch, questions), generator=generator)
    return torch.cat([shown, characters + stands.gather(1, which)], 1), pairs[..., 1].gather(1, which)
