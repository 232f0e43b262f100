"""The transformer whole: an encoder reads a source, a decoder writes a target and looks at what was read.

    source ids -> embeddings √E + positions -> encoder -> memory
    target ids -> embeddings √E + positions -> decoder, reading the memory -> scores

Source: Vaswani et al. 2017 (1706.03762), section 3 and figure 1; shared embeddings: section 3.4 and Press and Wolf 2017
(1608.05859). Symbols: source (B, M), target (B, N), E width, H heads, F the feed-forward width, V tokens.

Where it differs from the paper: dropout also acts on the attention weights and on the hidden units of the feed-forward
networks, as in torch's nn.Transformer.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.decoder import Decoder
from nondual.feed_forward import FeedForward
from nondual.kv_cache import ProjectedMemory
from nondual.losses import check_smoothing, token_loss
from nondual.mixers import as_before_if_raised
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.positional_encoding import AddedPositions, Sinusoidal
from nondual.search import Found, check_request, find, select_rows
from nondual.token_ids import check_ids, has_values
from nondual.transformer import Encoder
from nondual.weights import tied_scores


class EncoderDecoder(nn.Module):
    """Source ids and target ids to scores for the token after each of the target.

        model = EncoderDecoder(1000, 64, 4, 256, 2, dropout=0.1)
        loss = model.loss(source, target, target_lengths=lengths, label_smoothing=0.1)
        found = model.eval().generate(source, 20, bos=1, eos=2, beams=4)

    A target begins with a token that says so, bos, and ends with eos: `loss` scores each token after the first, and
    `generate` is given bos and gives what follows it.

    It starts with embeddings of standard deviation 1/√E, or 1 once multiplied by √E; every matrix is drawn by the rule
    of Glorot and Bengio 2010 (uniform), and every bias is 0.

    Tied scores use the embeddings as those of `CausalLM` do, also where an adapter stands in their place.

    Args:
        vocabulary: V, of source and target alike, which then share one table of embeddings; or of the source alone.
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: how many layers the encoder has, and the decoder.
        n_decoder_layers: how many the decoder has, where not as many.
        target_vocabulary: how many tokens the target has, where it has a vocabulary and embeddings of its own.
        positions: what is added to the embeddings, such as `LearnedPositions(max_len, d_model)`; `Sinusoidal(d_model)`
            where left out.
        target_positions: those of the target, where they are others.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        norm_first: pre-norm if True; a last norm then follows each stack. Without it there is none, as in the paper;
            nn.Transformer has one there too (pytorch issue 50086), so see `from_torch`.
        activation: of the feed-forward networks.
        eps: added to the variance or mean square in the norms.
        dropout: of the sums of embeddings and positions, of the attention weights and of all branches.
        n_kv_heads: key/value heads, a divisor of H; H where left out.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.
        norm: the norms, called as nn.LayerNorm and nn.RMSNorm are.
        feed_forward: makes the feed-forward networks, called as `FeedForward` and `GatedFeedForward` are.

    Raises:
        TypeError: positions that are not added to embeddings.
        ValueError: sizes below 1, positions of another width, or heads that do not divide E.
    """

    vocabulary: int
    target_vocabulary: int
    d_model: int
    embeddings: nn.Embedding
    source_embeddings: nn.Embedding | None
    positions: AddedPositions
    target_positions: AddedPositions | None
    encoder: Encoder
    decoder: Decoder
    lm_head: nn.Linear | None
    dropout: nn.Dropout

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        *,
        n_decoder_layers: int | None = None,
        target_vocabulary: int | None = None,
        positions: AddedPositions | None = None,
        target_positions: AddedPositions | None = None,
        tied: bool = True,
        norm_first: bool = False,
        activation: Callable[[Tensor], Tensor] = F.relu,
        eps: float = 1e-5,
        dropout: float = 0.0,
        n_kv_heads: int | None = None,
        op: Callable[..., Any] = attention,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        feed_forward: Callable[..., nn.Module] = FeedForward,
    ):
        super().__init__()
        n_decoder_layers = n_layers if n_decoder_layers is None else n_decoder_layers
        n_tokens = vocabulary if target_vocabulary is None else target_vocabulary
        check_sizes(vocabulary=vocabulary, target_vocabulary=n_tokens, d_model=d_model, d_ff=d_ff)
        check_sizes(n_layers=n_layers, n_decoder_layers=n_decoder_layers)
        positions = Sinusoidal(d_model) if positions is None else positions
        for name, given in (("positions", positions), ("target_positions", target_positions)):
            if given is not None:
                _check_positions(name, given, d_model)
        options: dict[str, Any] = {
            "norm_first": norm_first,
            "activation": activation,
            "eps": eps,
            "dropout": dropout,
            "n_kv_heads": n_kv_heads,
            "op": op,
            "norm": norm,
            "feed_forward": feed_forward,
        }
        self.vocabulary, self.target_vocabulary, self.d_model = vocabulary, n_tokens, d_model
        self.embeddings = nn.Embedding(n_tokens, d_model)
        self.source_embeddings = None if target_vocabulary is None else nn.Embedding(vocabulary, d_model)
        self.positions, self.target_positions = positions, target_positions
        self.encoder = Encoder(d_model, n_heads, d_ff, n_layers, **options)
        self.decoder = Decoder(d_model, n_heads, d_ff, n_decoder_layers, **options)
        self.lm_head = None if tied else nn.Linear(d_model, n_tokens, bias=False)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        for table in (self.embeddings, self.source_embeddings):
            if table is not None:
                nn.init.normal_(table.weight, std=table.embedding_dim**-0.5)

    def forward(
        self,
        source: Int[Tensor, "b m"],
        target: Int[Tensor, "b n"],
        *,
        source_lengths: Int[Tensor, " b"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n v"] | tuple[Float[Tensor, "b n v"], Float[Tensor, "layers b h n m"]]:
        """source (B, M), target (B, N) -> scores (B, N, V) for the token after each of the target.

        No score depends on a later token of the target, so that what follows a target as padding changes nothing.

        Args:
            source: (B, M), of any integer dtype, M of 1 or more.
            target: (B, N), of any integer dtype.
            source_lengths: (B,), how many tokens of each source are real, where it is padded at its end.
            return_weights: also return the decoder's weights over the source (layers, B, H, N, M).

        Raises:
            TypeError: ids or lengths that are not tensors.
            ValueError: ids that are not integers (B, length) or not in the vocabulary; batches that differ; an empty
                source, or a length that is not 1 to M; more tokens than there are positions.
        """
        memory = self.encode(source, source_lengths=source_lengths)
        return self.decode(target, memory, source_lengths=source_lengths, return_weights=return_weights)

    def encode(
        self, source: Int[Tensor, "b m"], *, source_lengths: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b m e"]:
        """source (B, M) -> memory (B, M, E). Where the source is padding the memory is too.

        Args:
            source: (B, M), of any integer dtype, M of 1 or more.
            source_lengths: (B,), as in `forward`.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        source = check_ids("source", source, self.vocabulary)
        if not source.shape[1]:
            raise ValueError(f"source must hold a token or more a row, got {tuple(source.shape)}")
        mask = _padding("source_lengths", source_lengths, *source.shape)
        table = self.embeddings if self.source_embeddings is None else self.source_embeddings
        return self.encoder(self._embedded(table, source, self.positions.of_sequences(source)), mask=mask)

    def decode(
        self,
        target: Int[Tensor, "b n"],
        memory: Float[Tensor, "b m e"] | list[ProjectedMemory],
        *,
        source_lengths: Int[Tensor, " b"] | None = None,
        cache: list[Any] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n v"] | tuple[Float[Tensor, "b n v"], Float[Tensor, "layers b h n m"]]:
        """target (B, N), memory (B, M, E) -> scores (B, N, V) for the token after each of the target.

        Args:
            target: (B, N), of any integer dtype.
            memory: what `encode` gave, or `decoder.project` of it where it is read more than once.
            source_lengths: (B,), as in `forward`.
            cache: of the target's tokens before these, from `new_cache`; whatever this call raises, it is then as it
                was before.
            return_weights: as in `forward`.

        Raises:
            TypeError, ValueError: as in `forward`; a cache or a memory that does not fit.
        """
        target = check_ids("target", target, self.target_vocabulary)
        batch, m = _size_of(memory)
        if batch != len(target):
            raise ValueError(f"source and target must have one batch, got {batch} and {len(target)}")
        mask, caches = _padding("source_lengths", source_lengths, batch, m), list(cache or ())
        if cache is not None and len(cache) != len(self.decoder.layers) + 1:
            raise ValueError(
                f"cache must have one for the positions and one for each of {len(self.decoder.layers)} layers, "
                f"got {len(cache)}"
            )
        with as_before_if_raised(*caches):
            positions = self.positions if self.target_positions is None else self.target_positions
            where = positions.of_sequences(target, cache=caches[0] if caches else None)
            x = self._embedded(self.embeddings, target, where)
            out: Any = self.decoder(
                x, memory, memory_mask=mask, cache=caches[1:] if caches else None, return_weights=return_weights
            )
            weights: Any = None
            if return_weights:
                out, weights = out
            if self.lm_head is None:
                scores = tied_scores(self.embeddings, out, self.target_vocabulary)
            else:
                scores = self.lm_head(out)
        return (scores, weights) if return_weights else scores

    def loss(
        self,
        source: Int[Tensor, "b m"],
        target: Int[Tensor, "b n"],
        *,
        source_lengths: Int[Tensor, " b"] | None = None,
        target_lengths: Int[Tensor, " b"] | None = None,
        label_smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """The mean cross-entropy, in nats, of each token of the target given the source and the tokens before it.

        Args:
            source: (B, M), as in `forward`.
            target: (B, N), N of 2 or more: bos, the tokens, and eos; nothing is asked of the first.
            source_lengths: (B,), as in `forward`.
            target_lengths: (B,), how many tokens of each target are real, bos and eos among them, where it is padded at
                its end: 2 or more.
            label_smoothing: as in `nondual.losses.token_loss`; 0.1 in the paper.

        Returns:
            A number, in float32 or better.

        Raises:
            TypeError, ValueError: as in `forward`; fewer than two tokens, or a label_smoothing outside [0, 1).
        """
        check_smoothing(label_smoothing)
        target = check_ids("target", target, self.target_vocabulary)
        batch, n = target.shape
        if n < 2:
            raise ValueError(f"target must have 2 tokens or more a row for a loss, got {tuple(target.shape)}")
        real = _padding("target_lengths", target_lengths, batch, n, least=2)
        scores = self(source, target[:, :-1], source_lengths=source_lengths)
        real = None if real is None else real[:, 0, 0, 1:]
        return token_loss(scores, target[:, 1:], real=real, label_smoothing=label_smoothing)

    @torch.no_grad()
    def generate(
        self,
        source: Int[Tensor, "b m"],
        max_len: int,
        *,
        bos: int,
        eos: int | None = None,
        source_lengths: Int[Tensor, " b"] | None = None,
        beams: int = 1,
        length_penalty: float = 0.0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        cached: bool = True,
    ) -> Found:
        """What the model writes for each source: the best of a beam search, or one drawn sequence.

        Args:
            source: (B, M), as in `forward`.
            max_len: how many tokens are written at most.
            bos: the token that every target begins with; it is not part of what is returned.
            eos: the token that ends a target; every target has max_len tokens where left out.
            source_lengths: (B,), as in `forward`.
            beams: how many sequences the search keeps; one for greedy search.
            length_penalty: as in `nondual.search.beam_search`.
            temperature: scores are divided by it and tokens are drawn, with one beam; the likeliest are searched for
                where left out.
            top_k: draw among the k likeliest only.
            top_p: of those, draw among the fewest whose probabilities sum to top_p or more.
            generator: where the randomness comes from.
            cached: read each token once, and project the memory once. Otherwise both are done again for every token,
                which gives the same.

        Returns:
            tokens (B, beams, N), scores and lengths (B, beams), the best first.

        Raises:
            TypeError, ValueError: as in `forward`, `nondual.search.beam_search` and `nondual.search.sample`; a bos that
                is not in the vocabulary; more tokens than there are positions; several beams with a temperature.
        """
        asked: dict[str, Any] = {"max_len": max_len, "beams": beams, "temperature": temperature}
        asked |= {"top_k": top_k, "top_p": top_p}
        check_request(self.target_vocabulary, bos, eos, **asked)
        state = self.start(source, max_len, source_lengths=source_lengths, cached=cached)
        start = torch.full((len(source),), bos, device=source.device)
        return find(self.step, start, state, eos=eos, length_penalty=length_penalty, generator=generator, **asked)

    @torch.no_grad()
    def start(
        self,
        source: Int[Tensor, "b m"],
        max_len: int,
        *,
        source_lengths: Int[Tensor, " b"] | None = None,
        cached: bool = True,
    ) -> "Writing":
        """The state before the first token, for `step` and for the functions of `nondual.search`.

        Args:
            source: (B, M), as in `forward`.
            max_len: how many tokens will be read at most.
            source_lengths: (B,), as in `forward`.
            cached: as in `generate`.

        Raises:
            TypeError, ValueError: as in `forward`; more tokens than there are positions.
        """
        positions = self.positions if self.target_positions is None else self.target_positions
        if positions.longest is not None and max_len > positions.longest:
            raise ValueError(
                f"max_len must be {positions.longest} or less, as many positions as there are, got {max_len}"
            )
        memory = self.encode(source, source_lengths=source_lengths)
        rows = torch.arange(len(source), device=source.device)
        if not cached:
            return Writing(memory, source_lengths, rows, None, source.new_empty(len(source), 0))
        return Writing(self.decoder.project(memory), source_lengths, rows, self.new_cache(len(source), max_len), None)

    @torch.no_grad()
    def step(self, tokens: Int[Tensor, " r"], state: "Writing") -> tuple[Float[Tensor, "r v"], "Writing"]:
        """The last token of each row and the state -> log-probabilities (R, V) of the next, and the new state.

        The state that is given must not be used again: its caches are brought up to date in place.

        Args:
            tokens: (R,), of any integer dtype.
            state: from `start`, or from the call before.

        Raises:
            TypeError, ValueError: as in `decode`. The state is then as it was before.
        """
        check_tensors({"tokens": tokens})
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be (R,), one a row, got {tuple(tokens.shape)}")
        unread = tokens[:, None] if state.tokens is None else torch.cat([state.tokens, tokens[:, None]], 1)
        scores: Any = self.decode(unread, state.memory, source_lengths=state.source_lengths, cache=state.cache)
        log_probs = at_least_float32(scores[:, -1]).log_softmax(-1)
        tokens_read = None if state.tokens is None else unread
        return log_probs, Writing(state.memory, state.source_lengths, state.rows, state.cache, tokens_read)

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for the decoder's own positions: one of where it stands, and one for each layer.

        Args:
            batch: B.
            max_len: how many tokens it will hold; as many as there are positions where left out, if there is an end.

        Raises:
            ValueError: no max_len where the positions have no end.
        """
        positions = self.positions if self.target_positions is None else self.target_positions
        max_len = positions.longest if max_len is None else max_len
        return [positions.new_cache(), *self.decoder.new_cache(batch, max_len)]

    def _embedded(self, table: nn.Embedding, ids: Tensor, where: Tensor) -> Tensor:
        """What a stack is given: embeddings times √E, so that they are of the size of the positions, and these."""
        x = table(ids) * math.sqrt(self.d_model)
        return self.dropout((x + where).to(x.dtype))  # a fixed code is in float32

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            source: Tensor,
            target: Tensor,
            *,
            source_lengths: Tensor | None = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            source: Tensor,
            target: Tensor,
            *,
            source_lengths: Tensor | None = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            source: Tensor,
            target: Tensor,
            *,
            source_lengths: Tensor | None = None,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Writing:
    """What a decoder knows while it writes: the memory, and what it has written so far.

    Attributes:
        memory: each layer's keys and values of the memory, or the memory itself (R, M, E) without a cache.
        source_lengths: (R,), or None.
        rows: (R,), which source each row writes for.
        cache: the decoder's, or None.
        tokens: (R, n), all tokens so far where there is no cache, or None.
    """

    memory: list[ProjectedMemory] | Tensor
    source_lengths: Tensor | None
    rows: Tensor
    cache: list[Any] | None
    tokens: Tensor | None

    def __init__(
        self,
        memory: list[ProjectedMemory] | Tensor,
        source_lengths: Tensor | None,
        rows: Tensor,
        cache: list[Any] | None,
        tokens: Tensor | None,
    ):
        self.memory, self.source_lengths, self.rows = memory, source_lengths, rows
        self.cache, self.tokens = cache, tokens

    def select(self, rows: Int[Tensor, " r"]) -> "Writing":
        """These rows, in this order. Rows that write for the same sources as before keep the same memory.

        Args:
            rows: (R,) int64.
        """
        sources = self.rows[rows]
        memory, lengths = self.memory, self.source_lengths
        if not torch.equal(sources, self.rows):
            memory, lengths = select_rows(memory, rows), select_rows(lengths, rows)
        return Writing(memory, lengths, sources, select_rows(self.cache, rows), select_rows(self.tokens, rows))


def from_torch(theirs: nn.Transformer) -> tuple[Encoder, Decoder]:
    """torch's nn.Transformer as our two stacks, with copies of its weights: the same outputs and gradients.

    nn.Transformer ends each stack with one more norm, also where each layer has already normalised its output
    (norm_first=False; pytorch issue 50086). The paper has none there. The stacks made here have it, as the `norm` of
    each; for the paper's own, set `encoder.norm = decoder.norm = nn.Identity()`.

        encoder, decoder = from_torch(theirs)
        decoder(y, encoder(x))           # theirs(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(N))

    Args:
        theirs: made with or without batch_first; ours has the batch first.

    Raises:
        TypeError: not an nn.Transformer, or one with an encoder or decoder of another class.
        ValueError: one without biases.
    """
    if not isinstance(theirs, nn.Transformer):
        raise TypeError(f"theirs must be an nn.Transformer, got {type(theirs).__name__}")
    stacks = []
    for name, kind, ours in (
        ("encoder", nn.TransformerEncoder, Encoder),
        ("decoder", nn.TransformerDecoder, Decoder),
    ):
        stack = getattr(theirs, name)
        if not isinstance(stack, kind):
            raise TypeError(f"theirs.{name} must be an nn.{kind.__name__}, got {type(stack).__name__}")
        layer: Any = stack.layers[0]
        if layer.linear1.bias is None:
            raise ValueError("theirs must have biases, as ours does, got an nn.Transformer with bias=False")
        made: Any = ours(
            theirs.d_model,
            theirs.nhead,
            layer.linear1.out_features,
            len(stack.layers),
            norm_first=layer.norm_first,
            activation=layer.activation,
            eps=layer.norm1.eps,
            dropout=layer.dropout.p,
        )
        last: Any = stack.norm
        made.norm = nn.Identity() if last is None else nn.LayerNorm(theirs.d_model, eps=last.eps)
        made.to(layer.linear1.weight).load_state_dict(
            {_our_name(theirs_name): tensor for theirs_name, tensor in stack.state_dict().items()}
        )
        stacks.append(made.train(theirs.training))
    return stacks[0], stacks[1]


def _our_name(name: str) -> str:
    for theirs, ours in (
        ("self_attn", "mixer"),
        ("multihead_attn", "cross"),
        ("linear1", "feed_forward.linear1"),
        ("linear2", "feed_forward.linear2"),
    ):
        name = name.replace(theirs, ours)
    return name


def _check_positions(name: str, positions: object, d_model: int) -> None:
    if not isinstance(positions, AddedPositions):
        raise TypeError(
            f"{name} must be LearnedPositions, Sinusoidal or another of AddedPositions, got {type(positions).__name__}"
        )
    if positions.d_model != d_model:
        raise ValueError(f"{name} must be of the width d_model={d_model}, got {positions.d_model}")


def _padding(name: str, lengths: Tensor | None, batch: int, longest: int, least: int = 1) -> Tensor | None:
    """The mask of a batch padded at its end (B, 1, 1, longest); refuses lengths that leave less than `least`."""
    if lengths is None:
        return None
    mask = masks.padding(lengths, longest)
    if len(lengths) != batch:
        raise ValueError(f"{name} must be (B,) = ({batch},), got {tuple(lengths.shape)}")
    if has_values(lengths) and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < least or high > longest:
            raise ValueError(f"{name} must lie in {least} to {longest}, got {low} to {high}")
    return mask


def _size_of(memory: object) -> tuple[int, int]:
    """B and M of a memory, projected or not."""
    if isinstance(memory, (list, tuple)):
        if not memory or not isinstance(memory[0], ProjectedMemory):
            raise TypeError("memory must be a Tensor (B, M, E), or a list from decoder.project, got another list")
        return memory[0].keys.shape[0], memory[0].keys.shape[2]
    check_tensors({"memory": memory})
    assert isinstance(memory, Tensor)
    if memory.ndim != 3:
        raise ValueError(f"memory must be (B, M, E), got {tuple(memory.shape)}")
    return memory.shape[0], memory.shape[1]
