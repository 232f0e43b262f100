"""Byte-pair encoding: subwords learned from a text, by joining the pair of neighbours that occurs most.

Sources: Gage 1994 (as compression); Sennrich et al. 2016 (1508.07909), section 3.2 and algorithm 1; over bytes, Radford
et al. 2019 (GPT-2), section 2.2. Ids 0 to 255 are the bytes, so that no text has an unknown token; id 256 + i is what
the merge i makes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

from nondual.tokenization.units import words_of

Pair = tuple[int, int]


class BPE:
    """Subwords over bytes; they do not reach beyond a word, as `words_of` has it.

    Args:
        merges: which two ids are joined, in the order in which they were learned; merge i makes id 256 + i.

    Raises:
        ValueError: a merge of an id that is not there yet, or one that is there twice.
    """

    unknown: int | None = None
    merges: list[Pair]

    def __init__(self, merges: Sequence[Pair]):
        self._bytes_of = [bytes([byte]) for byte in range(256)]
        for i, (left, right) in enumerate(merges):
            if not (0 <= left < 256 + i and 0 <= right < 256 + i):
                raise ValueError(f"merges must join ids that are there before them, got {(left, right)} as merge {i}")
            self._bytes_of.append(self._bytes_of[left] + self._bytes_of[right])
        self.merges = [(left, right) for left, right in merges]
        self._rank = {pair: i for i, pair in enumerate(self.merges)}
        if len(self._rank) != len(self.merges):
            raise ValueError("merges must be there once each, got one twice")
        self._of_word: dict[str, list[int]] = {}

    @property
    def vocabulary(self) -> int:
        """256 bytes, and one for each merge."""
        return len(self._bytes_of)

    @classmethod
    def train(cls, text: str, vocabulary: int) -> "BPE":
        """Learn the merges from a text; fewer than asked for where no pair is left that occurs twice.

        Of pairs that occur equally often the one with the lower ids is joined first.

        Args:
            text: what is counted.
            vocabulary: how many ids there are to be, 256 or more.

        Raises:
            ValueError: vocabulary below 256.
        """
        if vocabulary < 256:
            raise ValueError(f"vocabulary must be 256 or more, one for each byte, got {vocabulary}")
        frequency = Counter(words_of(text))
        words = [list(word.encode()) for word in frequency]
        times = list(frequency.values())
        count: Counter[Pair] = Counter()
        within: defaultdict[Pair, set[int]] = defaultdict(set)  # the words that hold a pair
        for w, ids in enumerate(words):
            for pair in pairwise(ids):
                count[pair] += times[w]
                within[pair].add(w)
        heap = [(-n, pair) for pair, n in count.items()]
        heapify(heap)
        merges: list[Pair] = []
        # --8<-- [start:train]
        while heap and len(merges) < vocabulary - 256:
            n, best = heappop(heap)
            if -n != count[best]:  # it was counted before some of its places were joined
                continue
            if count[best] < 2:
                break
            changed = set()
            for w in within.pop(best):
                for pair in pairwise(words[w]):
                    count[pair] -= times[w]
                    changed.add(pair)
                words[w] = joined(words[w], best, 256 + len(merges))
                for pair in pairwise(words[w]):
                    count[pair] += times[w]
                    within[pair].add(w)
                    changed.add(pair)
            for pair in changed:
                heappush(heap, (-count[pair], pair))
            merges.append(best)
        # --8<-- [end:train]
        return cls(merges)

    def pieces(self, text: str) -> list[bytes]:
        """What each token stands for. A piece may end inside a character.

        Raises:
            UnicodeEncodeError: a lone surrogate, which UTF-8 does not have; so too in `encode`.
        """
        return [self._bytes_of[i] for i in self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Each word by itself: of the pairs in it the one that was learned first is joined, until none is left."""
        return [i for word in words_of(text) for i in self._word(word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise ValueError(f"ids must lie in 0 to {self.vocabulary - 1}, got {wrong[0]}")
        return b"".join(self._bytes_of[i] for i in ids).decode(errors="replace")

    def _word(self, word: str) -> list[int]:
        if word not in self._of_word:
            ids, never = list(word.encode()), len(self.merges)
            while len(ids) > 1:
                first = min(pairwise(ids), key=lambda pair: self._rank.get(pair, never))
                if first not in self._rank:
                    break
                ids = joined(ids, first, 256 + self._rank[first])
            self._of_word[word] = ids
        return self._of_word[word]


def joined(ids: list[int], pair: Pair, into: int) -> list[int]:
    """ids with every occurrence of the pair replaced, from the first on: where they overlap, the earlier one."""
    out, i = [], 0
    while i < len(ids):
        together = tuple(ids[i : i + 2]) == pair
        out.append(into if together else ids[i])
        i += 2 if together else 1
    return out
