"""A whole encoder and decoder of 2014: read a sequence in both directions, then write another, looking back each time.

    source -> embeddings -> GRU in both directions -> h (B, M, 2E)
    target so far -> embeddings -> decoder, which reads h through an attention -> scores of the next token

Source: Bahdanau, Cho and Bengio 2014 (1409.0473), sections 3 and A.2. The encoder is `nondual.recurrent.GRU`; search is
`nondual.search`. Symbols: source (B, M) and target (B, N) token ids, E width, V tokens that can be written.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nondual.attention_mechanism.attention import AdditiveAttention, Attention
from nondual.attention_mechanism.decoders import BahdanauDecoder, LuongDecoder, Memory
from nondual.losses import check_smoothing, token_loss
from nondual.ops import masks
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.recurrent import GRU
from nondual.search import Found, check_request, find
from nondual.token_ids import check_ids, has_values


def additive(d_state: int, d_memory: int) -> AdditiveAttention:
    """Additive attention that compares in the width of the decoder's state, as the paper does."""
    return AdditiveAttention(d_state, d_memory, d_state)


class Seq2Seq(nn.Module):
    """Token ids to token ids, by recurrent networks and an attention (RNNsearch, where the attention is additive).

        Seq2Seq(28, 41, 128)                               # RNNsearch
        Seq2Seq(28, 41, 128, attention=LastState)          # its twin with one fixed vector for the whole source
        Seq2Seq(28, 41, 128, attention=UniformAttention)   # its twin whose weights are all equal

    Args:
        source_vocabulary: how many different tokens can be read.
        target_vocabulary: V, how many can be written, the first and the last one of a target included.
        d_model: width E of the encoder's states in each direction, and of the decoder's.
        d_embedding: width of the embeddings; d_model where left out.
        d_output: width of the decoder's output before the scores; half of d_model where left out, as in the paper.
        attention: makes what reads the encoder's states, from the widths (E, 2E): a class such as `GeneralAttention`,
            or any function that makes an `Attention`.
        decoder: makes the decoder, from (d_embedding, attention, d_output): `BahdanauDecoder` or `LuongDecoder`.
        dropout: probability of dropping a unit of the embeddings and of the decoder's output while training.

    Raises:
        ValueError: a size below 1.
    """

    source_vocabulary: int
    target_vocabulary: int
    source_embeddings: nn.Embedding
    target_embeddings: nn.Embedding
    encoder: GRU
    decoder: BahdanauDecoder | LuongDecoder
    head: nn.Linear
    dropout: nn.Dropout

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        d_model: int,
        *,
        d_embedding: int | None = None,
        d_output: int | None = None,
        attention: Callable[[int, int], Attention] = additive,
        decoder: Callable[[int, Attention, int], BahdanauDecoder | LuongDecoder] = BahdanauDecoder,
        dropout: float = 0.0,
    ):
        super().__init__()
        d_embedding = d_model if d_embedding is None else d_embedding
        d_output = max(1, d_model // 2) if d_output is None else d_output
        check_sizes(
            source_vocabulary=source_vocabulary,
            target_vocabulary=target_vocabulary,
            d_model=d_model,
            d_embedding=d_embedding,
            d_output=d_output,
        )
        self.source_vocabulary, self.target_vocabulary = source_vocabulary, target_vocabulary
        self.source_embeddings = nn.Embedding(source_vocabulary, d_embedding)
        self.target_embeddings = nn.Embedding(target_vocabulary, d_embedding)
        self.encoder = GRU(d_embedding, d_model, bidirectional=True)
        self.decoder = decoder(d_embedding, attention(d_model, 2 * d_model), d_output)
        self.head = nn.Linear(d_output, target_vocabulary)
        self.dropout = nn.Dropout(dropout)

    # --8<-- [start:encode]
    def encode(self, source: Integer[Tensor, "b m"], *, source_lengths: Integer[Tensor, " b"] | None = None) -> Memory:
        """What the decoder reads: a state for each position of the source, and its projection, made once.

        Args:
            source: (B, M) token ids; what lies beyond a row's length may be any token.
            source_lengths: (B,), 1 to M; M for every row where left out.

        Returns:
            The memory, with a mask (B, 1, M).

        Raises:
            TypeError, ValueError: ids out of range or of another rank, a length below 1 or above M.
        """
        source = check_ids("source", source, self.source_vocabulary)
        lengths = _lengths("source_lengths", source_lengths, source, at_least=1)
        h, _ = self.encoder(self.dropout(self.source_embeddings(source)), lengths=lengths)
        return self.decoder.memory(h, masks.padding(lengths, source.shape[1])[:, 0])

    # --8<-- [end:encode]

    def forward(
        self,
        source: Integer[Tensor, "b m"],
        target: Integer[Tensor, "b n"],
        *,
        source_lengths: Integer[Tensor, " b"] | None = None,
    ) -> tuple[Float[Tensor, "b n v"], Float[Tensor, "b n m"]]:
        """Scores of the token after each of the target's, and the weights with which the source was read for it.

        Args:
            source: (B, M) token ids.
            target: (B, N) token ids, the true ones (teacher forcing), the start token first.
            source_lengths: (B,), 1 to M; M for every row where left out.

        Returns:
            (scores (B, N, V), weights (B, N, M)).

        Raises:
            TypeError, ValueError: ids out of range or of another rank, two batches, a length that does not fit.
        """
        target = check_ids("target", target, self.target_vocabulary)
        _check_batch(source, target)
        memory = self.encode(source, source_lengths=source_lengths)
        y = self.dropout(self.target_embeddings(target))
        out, weights = self.decoder(y, memory.h, memory.mask)
        return self.head(self.dropout(out)), weights

    def loss(
        self,
        source: Integer[Tensor, "b m"],
        target: Integer[Tensor, "b n"],
        *,
        source_lengths: Integer[Tensor, " b"] | None = None,
        target_lengths: Integer[Tensor, " b"] | None = None,
        label_smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy in nats of each token of the target but the first, from those before it.

        Args:
            source: (B, M) token ids.
            target: (B, N) token ids with their start token first and their end token last.
            source_lengths: (B,), 1 to M.
            target_lengths: (B,), 2 to N, start and end token counted; N for every row where left out.
            label_smoothing: the share of the target's probability that is spread over all tokens, in [0, 1).

        Raises:
            TypeError, ValueError: as `forward`; a target of fewer than 2 tokens, a label_smoothing out of range.
        """
        check_smoothing(label_smoothing)
        target = check_ids("target", target, self.target_vocabulary)
        lengths = _lengths("target_lengths", target_lengths, target, at_least=2)
        scores, _ = self(source, target[:, :-1], source_lengths=source_lengths)
        real = torch.arange(1, target.shape[1], device=target.device) < lengths[:, None]
        return token_loss(scores, target[:, 1:], real=real, label_smoothing=label_smoothing)

    @torch.no_grad()
    def generate(
        self,
        source: Integer[Tensor, "b m"],
        max_len: int,
        *,
        bos: int,
        eos: int | None = None,
        source_lengths: Integer[Tensor, " b"] | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Found:
        """Write a target for each source: the best of a beam search, or one drawn sequence. Dropout is off meanwhile.

        Args:
            source: (B, M) token ids.
            max_len: how many tokens to write at most, eos included.
            bos: the token that every target begins with; it is not part of what is returned.
            eos: the token that ends a target; every target has max_len tokens where left out.
            source_lengths: (B,), 1 to M.
            beams: how many sequences to follow at once; 1 is greedy search.
            length_penalty: as in `nondual.search.beam_search`.
            temperature: scores are divided by it and tokens are drawn, with one beam; the likeliest are searched for
                where left out.
            top_k: draw among the k likeliest only.
            top_p: of those, draw among the fewest whose probabilities sum to top_p or more.
            generator: where the randomness comes from.

        Returns:
            tokens (B, beams, N), scores and lengths (B, beams), the best first.

        Raises:
            TypeError, ValueError: as `forward`, `nondual.search.beam_search` and `nondual.search.sample`; a bos or eos
                that is not in the vocabulary; several beams with a temperature.
        """
        asked: dict[str, Any] = {"max_len": max_len, "beams": beams, "temperature": temperature}
        asked |= {"top_k": top_k, "top_p": top_p}
        check_request(self.target_vocabulary, bos, eos, **asked)
        training = self.training
        try:
            self.eval()
            memory = self.encode(source, source_lengths=source_lengths)
            state = (memory, self.decoder.start(memory))
            first = torch.full((len(source),), bos, device=source.device)
            return find(self.step, first, state, eos=eos, length_penalty=length_penalty, generator=generator, **asked)
        finally:
            self.train(training)

    # --8<-- [start:step]
    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The last tokens (R,) and (memory, the decoder's state) to log-probabilities (R, V) and the new state."""
        memory, before = state
        out, after, _ = self.decoder.step(self.target_embeddings(tokens), before, memory)
        return at_least_float32(self.head(out)).log_softmax(-1), (memory, after)

    # --8<-- [end:step]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self, source: Tensor, target: Tensor, *, source_lengths: Tensor | None = None
        ) -> tuple[Tensor, Tensor]: ...


def _check_batch(source: object, target: Tensor) -> None:
    check_tensors({"source": source})
    assert isinstance(source, Tensor)
    if source.ndim == 2 and source.shape[0] != target.shape[0]:
        raise ValueError(f"source and target must have one batch, got {source.shape[0]} and {target.shape[0]}")


def _lengths(name: str, lengths: Tensor | None, ids: Tensor, at_least: int) -> Tensor:
    """The lengths of the rows of ids (B, N), each from `at_least` to N."""
    batch, longest = ids.shape
    if longest < at_least:
        raise ValueError(f"{name.removesuffix('_lengths')} must hold {at_least} tokens or more a row, got {longest}")
    if lengths is None:
        return torch.full((batch,), longest, device=ids.device)
    check_tensors({name: lengths})
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"{name} must be integers (B,) = ({batch},), got {lengths.dtype} {tuple(lengths.shape)}")
    if has_values(lengths) and batch and not at_least <= int(lengths.min()) <= int(lengths.max()) <= longest:
        low, high = int(lengths.min()), int(lengths.max())
        raise ValueError(f"{name} must lie in {at_least} to {longest}, got {low} to {high}")
    return lengths.to(ids.device)
