"""Speech to text by an encoder and a decoder: Whisper's architecture out of our own classes, and how it writes.

    sound -> log-mel -> two convolutions + sinusoidal positions -> encoder -> memory, a vector for each 20 ms
    tokens written so far + learned positions -> decoder, which attends to the memory -> scores of the next token

Source: Radford et al. 2022 (2212.04356), sections 2.2 and 2.3. Symbols: B sounds, T frames of 10 ms, M = T / 2 moments
of 20 ms, N tokens, E width, V tokens in the vocabulary.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.decoder import Decoder
from nondual.kv_cache import ProjectedMemory
from nondual.language_models.gpt import FLASH
from nondual.mixers import as_before_if_raised
from nondual.ops.checks import check_tensors
from nondual.positional_encoding import LearnedPositions, Sinusoidal
from nondual.pretrained.log_mel import N_MELS, RATE, SECONDS, log_mel
from nondual.search import beam_search, greedy
from nondual.token_ids import check_ids
from nondual.transformer import Encoder
from nondual.weights import tied_scores

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class SpeechTransformer(nn.Module):
    """A spectrogram and the tokens so far to scores of the token after each, which are tied to the embeddings.

    The scores use the embeddings as tied ones of `CausalLM` do, also where an adapter stands in their place.

    Args:
        vocabulary: V.
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: of the encoder, and of the decoder.
        max_len: how many tokens it can write, two marks at the beginning included.
        n_mels: bands of the spectrogram.

    Raises:
        ValueError: an E that is odd or below 4, or that the heads do not divide.
    """

    vocabulary: int
    n_mels: int
    conv1: nn.Conv1d
    conv2: nn.Conv1d
    time: Sinusoidal
    encoder: Encoder
    token: nn.Embedding
    position: LearnedPositions
    decoder: Decoder

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        *,
        max_len: int,
        n_mels: int = N_MELS,
    ):
        super().__init__()
        if d_model < 4 or d_model % 2:
            raise ValueError(f"d_model must be even and 4 or more, got {d_model}")
        self.vocabulary, self.n_mels = vocabulary, n_mels
        self.conv1 = nn.Conv1d(n_mels, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        # Whisper's wavelengths go up to 10000 · 2π itself, where those of Vaswani et al. end one step before it
        self.time = Sinusoidal(d_model, base=10_000 ** (d_model / (d_model - 2)))
        self.encoder = Encoder(d_model, n_heads, d_ff, n_layers, norm_first=True, op=FLASH)
        self.token = nn.Embedding(vocabulary, d_model)
        self.position = LearnedPositions(max_len, d_model)
        self.decoder = Decoder(d_model, n_heads, d_ff, n_layers, norm_first=True)

    def encode(self, mel: Float[Tensor, "b mels t"]) -> Float[Tensor, "b m e"]:
        """The memory of a spectrogram: (B, 80, T) -> (B, M, E), a vector for each 20 ms.

        Raises:
            ValueError: not floating (B, 80, T), or no frame.
        """
        check_tensors({"mel": mel})
        if mel.ndim != 3 or mel.shape[1] != self.n_mels or not mel.shape[2]:
            raise ValueError(f"mel must be (B, {self.n_mels}, T), from log_mel, got {tuple(mel.shape)}")
        # --8<-- [start:encode]
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)  # (B, M, E)
        code = self.time(x.shape[1])
        code = torch.cat([code[:, 0::2], code[:, 1::2]], 1)  # all sines, then all cosines
        return self.encoder(x + code.to(x))
        # --8<-- [end:encode]

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        memory: Float[Tensor, "b m e"] | list[ProjectedMemory],
        *,
        cache: list[Any] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n v"] | tuple[Float[Tensor, "b n v"], Float[Tensor, "layers b h n m"]]:
        """ids (B, N), memory (B, M, E) -> scores (B, N, V) of the token after each.

        Args:
            ids: the tokens, or with a cache those that it has not read yet.
            memory: from `encode`; or what `decoder.project` made of it, where it is read more than once.
            cache: from `new_cache`, of the same memory; whatever this call raises, it is then as it was before.
            return_weights: also return every decoder layer's weights over the memory (layers, B, H, N, M).

        Raises:
            TypeError: ids or memory is not a tensor.
            ValueError: ids that are not integers (B, N) below V, or more than max_len; a memory or a cache that does
                not fit.
        """
        check_tensors({"ids": ids})
        ids = check_ids("ids", ids, self.vocabulary)
        where, layers = (None, None) if cache is None else (cache[0], cache[1:])
        with as_before_if_raised(*(cache or ())):
            x = self.token(ids) + self.position.of_sequences(ids, cache=where)
            if return_weights:
                x, weights = self.decoder(x, memory, cache=layers, return_weights=True)
                return tied_scores(self.token, x, self.vocabulary), weights
            return tied_scores(self.token, self.decoder(x, memory, cache=layers), self.vocabulary)

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for B texts of at most max_len tokens; of as many as there are positions where left out."""
        max_len = self.position.longest if max_len is None else max_len
        return [self.position.new_cache(), *self.decoder.new_cache(batch, max_len)]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            ids: Tensor,
            memory: Tensor | list[ProjectedMemory],
            *,
            cache: list[Any] | None = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            ids: Tensor,
            memory: Tensor | list[ProjectedMemory],
            *,
            cache: list[Any] | None = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class SpeechRecognizer:
    """A speech transformer with its tokens: a sound of up to 30 seconds to text, and what was attended to meanwhile.

    It writes as OpenAI's program does for a single window without timestamps, with two lists of tokens that it may not
    write: some never, as brackets and music notes, some not first, as the end. Left out are timestamps, sounds of more
    than one window, earlier text as a prompt, the test whether there is speech at all, and the second attempt at a
    higher temperature where a text repeats itself or is improbable. No gradients are computed.

    Args:
        model: the speech transformer.
        tokenizer: a `tokenizers.Tokenizer` with Whisper's marks.
        suppressed: tokens that are never written.
        suppressed_first: tokens that are not written first.
    """

    model: SpeechTransformer
    tokenizer: "Tokenizer"

    def __init__(
        self,
        model: SpeechTransformer,
        tokenizer: "Tokenizer",
        *,
        suppressed: list[int],
        suppressed_first: list[int],
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self._never, self._not_first = suppressed, suppressed_first
        marks = [tokenizer.token_to_id(f"<|{mark}|>") for mark in ("startoftranscript", "notimestamps", "endoftext")]
        *self._start, self._end = marks

    def transcribe(self, sound: Float[Tensor, " n"], rate: int = RATE, *, beams: int = 1) -> str:
        """What is said in a sound.

        Args:
            sound: (N,) samples between -1 and 1, of at most 30 seconds.
            rate: samples a second, 16,000.
            beams: how many texts are followed at once, and compared by log-probability / ((5 + n) / 6), n their tokens;
                with one, the likeliest token is taken at each step.

        Raises:
            TypeError: sound is not a tensor.
            ValueError: a sound that is not floating (N,), or empty, too long, not finite, or far outside -1 to 1;
                another rate; beams below 1.
        """
        return self.tokenizer.decode(self._write(self._hear(sound, rate), beams)).strip()

    @torch.no_grad()
    def attention(
        self, sound: Float[Tensor, " n"], rate: int = RATE, *, beams: int = 1
    ) -> tuple[list[str], Float[Tensor, "layers h n m"]]:
        """The N tokens that are written, and where every head of the decoder looked in the sound as it wrote each.

        Args:
            sound: as in `transcribe`.
            rate: as in `transcribe`.
            beams: as in `transcribe`.

        Returns:
            Tokens as text, a word's space before it, and weights (layers, H, N, M): M = 1500 moments of 20 ms, silence
            after the sound's end among them. Row n is of the step that wrote token n, which had read the tokens before.

        Raises:
            TypeError, ValueError: as in `transcribe`.
        """
        memory = self._hear(sound, rate)
        written = self._write(memory, beams)
        ids = torch.tensor([[*self._start, *written]], device=memory.device)[:, :-1]
        _, weights = self.model(ids, memory, return_weights=True)
        return [self.tokenizer.decode([token]) for token in written], weights[:, 0, :, len(self._start) - 1 :]

    @torch.no_grad()
    def _hear(self, sound: Tensor, rate: int) -> Tensor:
        """The memory of a sound (1, M, E)."""
        check_tensors({"sound": sound})
        if rate != RATE:
            raise ValueError(f"rate must be {RATE} samples a second, got {rate}: resample the sound first")
        longest = SECONDS * RATE
        if sound.ndim != 1 or not sound.is_floating_point() or not 0 < len(sound) <= longest:
            raise ValueError(
                f"sound must be floating (N,), N from 1 to {longest} ({SECONDS} s), got {sound.dtype} "
                f"{tuple(sound.shape)}: take the mean of channels, cut it, or divide 16-bit integers by 32768"
            )
        loudest = float(sound.abs().max())
        if not loudest <= 10:  # NaN too
            raise ValueError(f"sound must lie between -1 and 1, got {loudest}: 16-bit samples are divided by 32768")
        like = self.model.token.weight
        return self.model.encode(log_mel(sound[None].to(like.device)).to(like.dtype))

    @torch.no_grad()
    def _write(self, memory: Tensor, beams: int) -> list[int]:
        """The tokens of the text, without marks."""
        device, (first, last) = memory.device, self._start
        longest = self.model.position.longest // 2  # as in OpenAI's program: the other half is for earlier text
        never, not_first = (
            torch.tensor(x, dtype=torch.long, device=device) for x in (self._never, [*self._never, *self._not_first])
        )
        cache, keys = self.model.new_cache(1, longest + len(self._start)), self.model.decoder.project(memory)
        self.model(torch.tensor([[first]], device=device), keys, cache=cache)

        def step(tokens: Tensor, state: tuple[list[ProjectedMemory], list[Any]]) -> tuple[Tensor, Any]:
            keys, cache = state
            forbidden = never if cache[0].length > 1 else not_first
            scores = self.model(tokens[:, None], keys, cache=cache)[:, -1]
            return scores.index_fill(1, forbidden, -torch.inf).log_softmax(-1), state

        start = torch.tensor([last], device=device)
        if beams == 1:
            found = greedy(step, start, (keys, cache), max_len=longest, eos=self._end)
        else:
            found = beam_search(
                step, start, (keys, cache), max_len=longest, beams=beams, eos=self._end, length_penalty=1.0
            )
        written = found.tokens[0, 0, : int(found.lengths[0, 0])].tolist()
        return written[:-1] if written[-1] == self._end else written
