"""Bytes, characters and words as tokens, and bits per byte, by which models over any of them compare.

A tokenizer cuts a text into pieces that give the text when they are put together again. Where it knows every piece,
`decode(encode(text))` is the text. Where it does not, the piece gets one id that stands for all that is unknown, and
its spelling is lost to the model: `bits_per_byte` charges for it. UTF-8: RFC 3629.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from nondual.ops.checks import check_sizes, check_tensors

REPLACEMENT = "\ufffd"
"""What an unknown token is decoded to."""


class Tokenizer(Protocol):
    """Cuts a text into pieces and numbers them.

    Attributes:
        vocabulary: how many ids there are; each is below it.
        unknown: the id of every piece that has none of its own; None where there is no such piece.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def unknown(self) -> int | None: ...

    def pieces(self, text: str) -> list[bytes]:
        """The pieces in UTF-8, one for each id of `encode`; put together they are the text."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Bytes:
    """The 256 bytes. No text has an unknown token. Ids that are not UTF-8 are decoded to U+FFFD, as Python does it."""

    vocabulary: int = 256
    unknown: int | None = None

    def pieces(self, text: str) -> list[bytes]:
        """One byte each.

        Raises:
            UnicodeEncodeError: a lone surrogate, which UTF-8 does not have; so too in `encode`.
        """
        return [bytes([byte]) for byte in text.encode()]

    def encode(self, text: str) -> list[int]:
        """The bytes of the text in UTF-8."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text whose UTF-8 these are.

        Raises:
            ValueError: an id that is no byte.
        """
        return bytes(ids).decode(errors="replace")


class _Listed:
    """Pieces by a list: id 0 is unknown, and id i the piece i - 1 of the list."""

    unknown: int | None = 0
    known: list[str]
    _ids: dict[str, int]

    def __init__(self, known: Sequence[str]):
        if len(set(known)) != len(known) or "" in known:
            raise ValueError("known must be pieces that are not empty, each of them once")
        self.known = list(known)
        self._ids = {piece: i for i, piece in enumerate(known, 1)}

    @property
    def vocabulary(self) -> int:
        """How many pieces are known, and one more for all others."""
        return len(self.known) + 1

    def _cut(self, text: str) -> Iterable[str]:
        raise NotImplementedError

    def pieces(self, text: str) -> list[bytes]:
        """The pieces in UTF-8, the unknown ones too: put together they are the text."""
        return [piece.encode() for piece in self._cut(text)]

    def encode(self, text: str) -> list[int]:
        """One id a piece, 0 for each that is not known."""
        return [self._ids.get(piece, 0) for piece in self._cut(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text, with U+FFFD in place of each unknown piece.

        Raises:
            ValueError: an id that the list does not have.
        """
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise ValueError(f"ids must lie in 0 to {self.vocabulary - 1}, got {wrong[0]}")
        return "".join(self.known[i - 1] if i else REPLACEMENT for i in ids)


class Characters(_Listed):
    """One token a code point, as far as they are known; id 0 stands for every other.

    Args:
        known: the code points, each of them once.

    Raises:
        ValueError: a piece that is empty, longer than one code point, or there twice.
    """

    def __init__(self, known: Sequence[str]):
        super().__init__(known)
        if long := [piece for piece in known if len(piece) != 1]:
            raise ValueError(f"known must be single code points, got {long[0]!r}")

    @classmethod
    def of(cls, text: str) -> "Characters":
        """All code points of a text."""
        return cls(sorted(set(text)))

    def _cut(self, text: str) -> Iterable[str]:
        return text


class Words(_Listed):
    """One token a word (see `words_of`), as far as they are known; id 0 stands for every other.

    Args:
        known: the words, each of them once, a space before it included.

    Raises:
        ValueError: a piece that is empty, or there twice.
    """

    @classmethod
    def of(cls, text: str, most: int | None = None, at_least: int = 2) -> "Words":
        """The words of a text that are there `at_least` times, the most frequent first.

        A model learns the unknown token from the words that are left out: with at_least=1 it never meets one.

        Args:
            text: what they are taken from.
            most: how many at most; all where left out.
            at_least: how often a word must be there.

        Raises:
            ValueError: most or at_least below 1.
        """
        check_sizes(most=1 if most is None else most, at_least=at_least)
        counts = sorted(Counter(words_of(text)).items(), key=lambda each: (-each[1], each[0]))
        return cls([word for word, count in counts if count >= at_least][:most])

    def _cut(self, text: str) -> Iterable[str]:
        return words_of(text)


def words_of(text: str) -> list[str]:
    """The words of a text, in order; put together they are the text.

    A run of letters is a word, and so is a run of anything else but white space. A space goes with the word after it;
    other white space, and a space before white space, stands by itself. The marks of a script count as letters, so that
    vowel signs do not end a word of Devanagari.

        "one two,\\nthree"  ->  "one", " two", ",", "\\n", "three"
    """
    words: list[str] = []
    for kind, run in groupby(text, _kind):
        joined = "".join(run)
        if kind == "space":
            words += joined
        elif words and words[-1] == " ":
            words[-1] += joined
        else:
            words.append(joined)
    return words


def _kind(character: str) -> str:
    if character.isspace():
        return "space"
    return "letter" if unicodedata.category(character)[0] in "LM" else "other"


def bits_per_byte(
    nats: Float[Tensor, " n"],
    ids: Sequence[int],
    pieces: Sequence[bytes],
    unknown: int | None = None,
) -> float:
    """What a text costs under a model, in bits for each of its bytes in UTF-8.

    All tokens' nats are added up and divided by the number of bytes, not of tokens: so models compare whose tokens are
    of different lengths. An unknown token says that a piece is not known, and not which: its spelling costs
    `spelling_bits` more. So the number is the length of a code from which the text can be read again.

    Args:
        nats: -log p of each token given those before it (N,), in nats.
        ids: the N tokens.
        pieces: what each of them stands for, in UTF-8, from the tokenizer's `pieces`.
        unknown: the tokenizer's id for what it does not know.

    Raises:
        TypeError: nats that are not a Tensor.
        ValueError: lengths that differ, or no byte at all.
    """
    check_tensors({"nats": nats})
    if not tuple(nats.shape) == (len(ids),) == (len(pieces),):
        raise ValueError(f"nats, ids and pieces must be N each, got {tuple(nats.shape)}, {len(ids)} and {len(pieces)}")
    if not any(pieces):
        raise ValueError("pieces must have a byte or more, got none")
    bits = nats.double().sum().item() / math.log(2)
    bits += sum(spelling_bits(piece) for i, piece in zip(ids, pieces) if i == unknown)
    return bits / sum(map(len, pieces))


def spelling_bits(piece: bytes) -> float:
    """What it costs to spell a piece: log₂ 257 bits for each byte, and for the sign that ends it."""
    return (len(piece) + 1) * math.log2(257)
