"""The network of `nondual.pretrained.hama` in our own classes, and the speller that runs it.

Its mathematics and the names of its parameters stand in `nondual.pretrained.hama`. How the letters are scored can be
exchanged: `spell` takes two functions, one for the learned scores and one for the fixed pull, so that a reader can
leave out a part of either and see what becomes of the spelling.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from nondual.attention_mechanism import LocationAttention, attend
from nondual.recurrent import GRU

LONGEST = 32  # phonemes, after which a word ends in any case
SOS, EOS = 1, 2  # the phonemes' signs for the beginning and the end of a word


class Memory(NamedTuple):
    """A batch of words that were read.

    Attributes:
        h: the letters' states (B, M, 192), 0 beyond a word's end.
        projected: W_h h (B, M, 96).
        mask: True at the letters of each word (B, M).
        state: the writer's first state (2, B, 96).
    """

    h: Float[Tensor, "b m 192"]
    projected: Float[Tensor, "b m 96"]
    mask: Bool[Tensor, "b m"]
    state: Float[Tensor, "2 b 96"]


Scores = Callable[[LocationAttention, Tensor, Memory, Tensor], Tensor]
"""How letters are scored: (attention, s (B, 1, 96), memory, the weights of the step before (B, M)) -> (B, 1, M)."""

Pull = Callable[[Tensor], Tensor]
"""What is added to the scores: the weights of the step before (B, M) -> (B, M)."""


def learned_scores(
    attention: LocationAttention, s: Float[Tensor, "b 1 96"], memory: Memory, past: Float[Tensor, "b m"]
) -> Float[Tensor, "b 1 m"]:
    """The scores as trained: v · tanh(W_s s + W_h h_j + W_f f_j)."""
    return attention.scores(s, memory.h, projected=memory.projected, past=past)


def fixed_pull(past: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """-0.1 times each letter's distance from where the step before looked on average."""
    positions = torch.arange(past.shape[1], dtype=past.dtype, device=past.device)
    return -0.1 * (positions - (past @ positions)[:, None]).abs()


class HamaNetwork(nn.Module):
    """From letters to phonemes: a reader, a writer, and additive attention between them.

    Args:
        n_letters: how many letters and signs it knows.
        n_phonemes: how many phonemes, the signs for padding, beginning, end and unknown among them.
    """

    embedding: nn.Embedding
    frontend: nn.Sequential
    frontend_norm: nn.LayerNorm
    encoder: GRU
    encoder_skip: nn.Linear
    encoder_norm: nn.LayerNorm
    bridge: nn.Linear
    decoder_embedding: nn.Embedding
    decoder: GRU
    decoder_skip: nn.Linear
    decoder_norm: nn.LayerNorm
    attention: LocationAttention
    context_norm: nn.LayerNorm
    fusion: nn.Linear
    fusion_norm: nn.LayerNorm
    output: nn.Sequential

    def __init__(self, n_letters: int, n_phonemes: int):
        super().__init__()
        self.embedding = nn.Embedding(n_letters, 80)
        self.frontend = nn.Sequential(
            nn.Conv1d(80, 80, 5, padding=2, groups=80, bias=False),
            nn.Conv1d(80, 80, 1, bias=False),
        )
        self.frontend_norm = nn.LayerNorm(80)
        self.encoder = GRU(80, 96, 2, bidirectional=True)
        self.encoder_skip = nn.Linear(80, 192, bias=False)
        self.encoder_norm = nn.LayerNorm(192)
        self.bridge = nn.Linear(192, 96)
        self.decoder_embedding = nn.Embedding(n_phonemes, 80)
        self.decoder = GRU(80, 96, 2)
        self.decoder_skip = nn.Linear(80, 96, bias=False)
        self.decoder_norm = nn.LayerNorm(96)
        self.attention = LocationAttention(96, 192, 96, 16, 11, bias=False)
        self.context_norm = nn.LayerNorm(192)
        self.fusion = nn.Linear(288, 96)
        self.fusion_norm = nn.LayerNorm(96)
        self.output = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, n_phonemes, bias=False))

    # --8<-- [start:read]
    def read(
        self,
        letters: Int64[Tensor, "b m"],
        lengths: Int64[Tensor, " b"],
    ) -> Memory:
        """Read a batch of words, once each.

        Args:
            letters: their letters' numbers (B, M); any number beyond a word's end.
            lengths: how many letters each word has (B,), at least 1.
        """
        mask = torch.arange(letters.shape[1], device=letters.device) < lengths[:, None]
        e = self.embedding(letters) * mask[..., None]  # 0 beyond the word's end
        x = self.frontend_norm(e + self.frontend(e.mT).mT)
        g, ends = self.encoder(x, lengths=lengths)
        h = self.encoder_norm(g + self.encoder_skip(x)) * mask[..., None]
        both_ways = torch.cat([ends[0::2], ends[1::2]], dim=-1)  # (layers, B, 2 · 96)
        state = torch.tanh(self.bridge(both_ways))
        return Memory(h, self.attention.project(h), mask, state)

    # --8<-- [end:read]

    # --8<-- [start:step]
    def step(
        self,
        phonemes: Int64[Tensor, " b"],
        memory: Memory,
        state: Float[Tensor, "2 b 96"],
        past: Float[Tensor, "b m"],
        *,
        scores: Scores = learned_scores,
        pull: Pull = fixed_pull,
    ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "2 b 96"], Float[Tensor, "b m"]]:
        """Write one phoneme of each word.

        Args:
            phonemes: the numbers of the phonemes before (B,).
            memory: the words, from `read`.
            state: the writer's state (2, B, 96); at first `memory.state`.
            past: the weights of the step before (B, M); at first alike for every letter of the word.
            scores: how the letters are scored; as trained where left out.
            pull: what is added to the scores for a letter's place; as trained where left out.

        Returns:
            (the scores of the next phonemes (B, P), the state (2, B, 96), the weights (B, M)).
        """
        y = self.decoder_embedding(phonemes)[:, None]
        written, state = self.decoder(y, state)
        s = self.decoder_norm(written + self.decoder_skip(y))
        u = scores(self.attention, s, memory, past) + pull(past)[:, None]
        context, weights = attend(u, memory.h, memory.mask[:, None])
        x = torch.tanh(self.fusion(torch.cat([s, self.context_norm(context)], dim=-1)))
        return self.output(self.fusion_norm(x))[:, 0], state, weights[:, 0]

    # --8<-- [end:step]


class AttentiveSpeller:
    """The network with its letters and phonemes.

    Attributes:
        model: the network, in evaluation mode.
        letters: the number of each letter.
        phonemes: the phonemes in the order of their numbers, in the International Phonetic Alphabet.
    """

    model: HamaNetwork
    letters: dict[str, int]
    phonemes: list[str]

    def __init__(self, model: HamaNetwork, letters: dict[str, int], phonemes: list[str]):
        self.model, self.letters, self.phonemes = model, letters, phonemes

    def numbers(self, word: str) -> list[int]:
        """The numbers of a word's letters; capital letters are read as small ones.

        Raises:
            TypeError: it is not a str.
            ValueError: it has no letter, or one that the network does not know.
        """
        if not isinstance(word, str):
            raise TypeError(f"word must be a str, got {type(word).__name__}")
        unknown = sorted({letter for letter in word.lower() if letter not in self.letters})
        if unknown or not word:
            found = f"{word!r} with {', '.join(map(repr, unknown))}" if unknown else "no letter"
            raise ValueError(f"word must be written with one or more letters that the network knows, got {found}")
        return [self.letters[letter] for letter in word.lower()]

    def spell(
        self, word: str, *, scores: Scores = learned_scores, pull: Pull = fixed_pull
    ) -> tuple[list[str], Float[Tensor, "n m"]]:
        """The phonemes of a word, and for each the weights with which its letters were looked at (N, M).

        Args:
            word: one word, without spaces.
            scores: how the letters are scored; as trained where left out.
            pull: what is added to the scores for a letter's place; as trained where left out.

        Raises:
            TypeError: it is not a str.
            ValueError: it has no letter, or one that the network does not know.
        """
        return self.spell_all([word], scores=scores, pull=pull)[0]

    @torch.no_grad()
    def spell_all(
        self, words: Sequence[str], *, scores: Scores = learned_scores, pull: Pull = fixed_pull
    ) -> list[tuple[list[str], Float[Tensor, "n m"]]]:
        """What `spell` gives for each of several words, read as one batch.

        Raises:
            TypeError: words is one str, or one of them is not a str.
            ValueError: one of them has no letter, or one that the network does not know.
        """
        if isinstance(words, str):
            raise TypeError(f"words must be a list of words, got the one word {words!r}: use spell")
        if not words:
            return []
        device, numbers = self.model.bridge.weight.device, [self.numbers(word) for word in words]
        lengths = torch.tensor([len(one) for one in numbers], device=device)
        rows = [torch.tensor(one, device=device) for one in numbers]
        memory = self.model.read(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)
        state, weights = memory.state, memory.mask / lengths[:, None]
        last = torch.full_like(lengths, SOS)
        ended, written, looked = torch.zeros_like(memory.mask[:, 0]), [], []
        while len(written) < LONGEST and not ended.all():
            found, state, weights = self.model.step(last, memory, state, weights, scores=scores, pull=pull)
            last = found.argmax(-1)
            ended = ended | (last == EOS)
            written.append(last)
            looked.append(weights)
        ids, all_weights = torch.stack(written, 1).tolist(), torch.stack(looked, 1)
        spelled = []
        for row, (of_word, m) in enumerate(zip(ids, lengths.tolist())):
            n = of_word.index(EOS) if EOS in of_word else len(of_word)
            spelled.append(([self.phonemes[i] for i in of_word[:n]], all_weights[row, :n, :m]))
        return spelled
