"""The network of `nondual.pretrained.g2p_en` in our own classes, and the speller that runs it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nondual.recurrent import GRU

WIDTH = 256  # of embeddings and states
LONGEST = 20  # phonemes, after which a word ends in any case
END_OF_LETTERS, SOS, EOS = 2, 2, 3  # the signs at a word's end, before its phonemes, and at their end


class G2PNetwork(nn.Module):
    """A GRU reads, a GRU writes, and the last state of the first is all that the second is given.

    Args:
        n_letters: how many letters and signs it knows.
        n_phonemes: how many phonemes and signs.
    """

    embedding: nn.Embedding
    encoder: GRU
    decoder_embedding: nn.Embedding
    decoder: GRU
    output: nn.Linear

    def __init__(self, n_letters: int, n_phonemes: int):
        super().__init__()
        self.embedding = nn.Embedding(n_letters, WIDTH)
        self.encoder = GRU(WIDTH, WIDTH)
        self.decoder_embedding = nn.Embedding(n_phonemes, WIDTH)
        self.decoder = GRU(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, n_phonemes)

    def read(self, letters: Int64[Tensor, "b m"], lengths: Int64[Tensor, " b"]) -> Float[Tensor, "1 b 256"]:
        """The state after the last letter of each word.

        Args:
            letters: their letters' numbers (B, M), the sign of the end among them.
            lengths: how many each word has (B,).
        """
        return self.encoder(self.embedding(letters), lengths=lengths)[1]

    def step(
        self, phonemes: Int64[Tensor, " b"], state: Float[Tensor, "1 b 256"]
    ) -> tuple[Float[Tensor, "b p"], Float[Tensor, "1 b 256"]]:
        """Write one phoneme of each word: (the scores of the next phonemes (B, P), the state (1, B, 256)).

        Args:
            phonemes: the numbers of the phonemes before (B,).
            state: of the writer; at first what `read` gave.
        """
        written, state = self.decoder(self.decoder_embedding(phonemes)[:, None], state)
        return self.output(written[:, 0]), state


class LastStateSpeller:
    """The network with its letters and phonemes.

    Attributes:
        model: the network, in evaluation mode.
        letters: the number of each letter.
        phonemes: the phonemes in the order of their numbers, in ARPAbet with stress.
    """

    model: G2PNetwork
    letters: dict[str, int]
    phonemes: list[str]

    def __init__(self, model: G2PNetwork, letters: dict[str, int], phonemes: list[str]):
        self.model, self.letters, self.phonemes = model, letters, phonemes

    def numbers(self, word: str) -> list[int]:
        """The numbers of a word's letters and of the sign of its end; capital letters are read as small ones.

        Raises:
            TypeError: it is not a str.
            ValueError: it has no letter, or others than a to z.
        """
        if not isinstance(word, str):
            raise TypeError(f"word must be a str, got {type(word).__name__}")
        unknown = sorted({letter for letter in word.lower() if letter not in self.letters})
        if unknown or not word:
            found = f"{word!r} with {', '.join(map(repr, unknown))}" if unknown else "no letter"
            raise ValueError(f"word must be written with one or more of the letters a to z, got {found}")
        return [*(self.letters[letter] for letter in word.lower()), END_OF_LETTERS]

    def spell(self, word: str) -> list[str]:
        """The phonemes of a word, ["N", "AY1", "T"].

        Raises:
            TypeError: it is not a str.
            ValueError: it has no letter, or others than a to z.
        """
        return self.spell_all([word])[0]

    @torch.no_grad()
    def spell_all(self, words: Sequence[str]) -> list[list[str]]:
        """What `spell` gives for each of several words, read as one batch.

        Raises:
            TypeError: words is one str, or one of them is not a str.
            ValueError: one of them has no letter, or others than a to z.
        """
        if isinstance(words, str):
            raise TypeError(f"words must be a list of words, got the one word {words!r}: use spell")
        if not words:
            return []
        device, numbers = self.model.output.weight.device, [self.numbers(word) for word in words]
        lengths = torch.tensor([len(one) for one in numbers], device=device)
        rows = [torch.tensor(one, device=device) for one in numbers]
        state = self.model.read(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths)
        last, written = torch.full_like(lengths, SOS), []
        while len(written) < LONGEST:
            scores, state = self.model.step(last, state)
            last = scores.argmax(-1)
            written.append(last)
        ids = torch.stack(written, 1).tolist()
        ends = [of_word.index(EOS) if EOS in of_word else LONGEST for of_word in ids]
        return [[self.phonemes[i] for i in of_word[:end]] for of_word, end in zip(ids, ends)]
