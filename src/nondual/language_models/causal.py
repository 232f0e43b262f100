"""A causal language model over any mixer: token ids to scores for the token after each.

    embeddings (+ positions)  ->  layers, each a mixer or a mixer and a feed-forward network  ->  norm  ->  scores

It knows of a mixer what `nondual.mixers` says, and no more. Source: Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2, for the frame; tied scores: Press and Wolf 2017 (1608.05859). Symbols: ids
(B, N), E width, V tokens in the vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.connections import Connection, LayerCall, stream
from nondual.language_models.sampling import check_lengths, check_sampling, extend
from nondual.mixers import as_before_if_raised, check_reset, check_takes, new_caches
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.positional_encoding import AddedPositions, LearnedPositions
from nondual.token_ids import check_ids, has_values
from nondual.transformer_layer import normed
from nondual.weights import tied_scores

# The projections of the library's mixers and feed-forward networks, by name: their biases start at 0.
_PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2")


class CausalLM(nn.Module):
    """Token ids to scores for the token after each, by a stack of layers.

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(Mamba(64), 64))

    Every layer may be replaced or wrapped (LoRA, quantised layers), and may have hooks and parametrizations; see the
    mixer for its own. Tied scores use the weight of the embeddings. Where something that is not an nn.Embedding stands
    in their place, such as an adapter, they use the rows that it gives for all V ids, computed at every call: merge the
    adapter, or untie the scores, where that is too slow.

    It starts with small embeddings, without biases in the projections, and with the last projection of every branch
    divided by the root of the number of branches, so that their sum keeps its scale (Radford et al. 2019, section 2.3).

    Args:
        vocabulary: V.
        d_model: width E.
        n_layers: how many layers.
        layer: makes layer i, given i: a `MixerBlock`, a `TransformerLayer` with norm_first, or any module x -> x over
            (B, N, E) that has its mixer as `mixer` and hands `cache=` and `reset=` on to it.
        max_len: how many positions to learn, each added to the token's embedding: short for
            positions=LearnedPositions(max_len, d_model).
        positions: what is added to the tokens' embeddings, such as `Sinusoidal(d_model)`. Nothing where both are left
            out, for mixers that know the order by themselves.
        norm: the last norm, called as nn.RMSNorm and nn.LayerNorm are.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        eps: what the last norm adds to the mean square or variance.
        residual_in_fp32: keep what the layers add up in float32 where the weights are narrower. The layers must take an
            x wider than their weights, as `MixerBlock` does.
        connection: how the layers are joined, such as `DenseFormer(n_layers)` of `nondual.recent`; the plain residual
            stream where left out. A module is trained and saved with the model. See `nondual.connections`.

    Raises:
        TypeError: positions that are not added to embeddings; a connection that cannot be called, or is a class.
        ValueError: positions together with max_len, or of another width.
    """

    vocabulary: int
    d_model: int
    residual_in_fp32: bool
    embeddings: nn.Embedding
    positions: AddedPositions | None
    layers: nn.ModuleList
    norm_f: nn.Module
    lm_head: nn.Linear | None
    connection: Connection

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layers: int,
        *,
        layer: Callable[[int], nn.Module],
        max_len: int | None = None,
        positions: AddedPositions | None = None,
        norm: Callable[..., nn.Module] = nn.RMSNorm,
        tied: bool = True,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        connection: Connection = stream,
    ):
        super().__init__()
        if positions is not None:
            _check_positions(positions, max_len, d_model)
        elif max_len is not None:
            positions = LearnedPositions(max_len, d_model)
        _check_connection(connection)
        self.vocabulary, self.d_model, self.residual_in_fp32 = vocabulary, d_model, residual_in_fp32
        self.embeddings = nn.Embedding(vocabulary, d_model)
        self.positions = positions
        self.layers = nn.ModuleList(layer(i) for i in range(n_layers))
        self.norm_f = norm(d_model, eps=eps)
        self.lm_head = None if tied else nn.Linear(d_model, vocabulary, bias=False)
        self.connection = connection
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        nn.init.normal_(self.embeddings.weight, std=0.02)
        if isinstance(self.positions, LearnedPositions):
            nn.init.normal_(self.positions.table.weight, std=0.02)
        branches = [
            branch
            for layer in self.layers
            for branch in (layer.mixer, getattr(layer, "feed_forward", None))
            if branch is not None
        ]
        for branch in branches:
            for name in _PROJECTIONS:
                bias = getattr(getattr(branch, name, None), "bias", None)
                if bias is not None:
                    bias.zero_()
            last = getattr(branch, "out_proj", getattr(branch, "linear2", None))
            if last is not None:
                last.weight /= math.sqrt(len(branches))

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        cache: list[Any] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """ids (B, N) -> scores (B, N, V) for the token that follows each.

        Args:
            ids: (B, N), of any integer dtype.
            cache: what came before, from `new_cache`; all of it is brought up to date, or none where this call raises.
            reset: True where a packed sequence begins: nothing before it reaches what follows, and its positions count
                from 0. For a batch padded on the left, True at the first real token of each row.

        Raises:
            ValueError: ids that are not integers (B, N) or not in the vocabulary, or more than there are positions; a
                cache of another batch or depth; a reset that does not fit, or that a layer's mixer does not take.
            TypeError: ids that are not a Tensor, a cache that is not a list.
        """
        return self._next(self._checked(ids), cache, reset)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, ids: Tensor, *, cache: list[Any] | None = None, reset: Tensor | None = None) -> Tensor: ...

    def loss(self, ids: Int[Tensor, "b n"], *, reset: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        """The mean cross-entropy, in nats, of each token given those before it; of a packed sequence's first, none.

        Where nothing is left to predict (reset is True at every position, or the batch is empty) it is 0, and so are
        its gradients.

        Args:
            ids: (B, N), of any integer dtype, N of 2 or more.
            reset: (B, N), as in `forward`.

        Returns:
            A number, in float32 or better.

        Raises:
            ValueError: fewer than two tokens a row, or ids as in `forward`.
            TypeError: ids that are not a Tensor.
        """
        ids = self._checked(ids)
        if ids.shape[1] < 2:
            raise ValueError(f"ids must have 2 tokens or more a row for a loss, got {tuple(ids.shape)}")
        if reset is not None:
            check_reset(reset, ids)
        scores = self._next(ids[:, :-1], None, None if reset is None else reset[:, :-1])
        targets = ids[:, 1:]
        if reset is not None:
            targets = targets.masked_fill(reset[:, 1:], -100)
        return _mean_cross_entropy(scores, targets)

    @torch.no_grad()
    def generate(
        self,
        ids: Int[Tensor, "b n"],
        n_new: int,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        eos: int | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        cached: bool = True,
    ) -> Int[Tensor, "b m"]:
        """The prompt and up to n_new tokens after it.

        Args:
            ids: the prompt (B, N), of one token or more, of any integer dtype.
            n_new: how many tokens to add.
            temperature: scores are divided by it and a token is drawn; the likeliest is taken where left out.
            top_k: draw among the k likeliest only.
            top_p: of those, draw among the fewest whose probabilities sum to top_p or more.
            generator: where the randomness comes from.
            eos: the token after which a row is finished; it then repeats it until all are.
            reset: as in `forward`, for a prompt padded on the left.
            cached: read each token once and remember it in the mixers' caches. Otherwise the whole text is read again
                for every token, which needs no caches and gives the same tokens.

        Returns:
            (B, N + n_new), or shorter where every row met eos before; in the dtype of ids, or in int64 where that of
            ids does not hold every token of the vocabulary.

        Raises:
            ValueError: an empty prompt, a negative n_new, more tokens than there are positions, a temperature not above
                0, a top_k below 1 or a top_p outside (0, 1], or either without a temperature; ids as in `forward`;
                cached where a mixer makes no cache.
            TypeError: ids that are not a Tensor.
        """
        checked = self._checked(ids)
        batch, prompt = ids.shape
        check_sampling(temperature, top_k, top_p)
        check_lengths(ids, n_new)
        read = prompt + max(n_new - 1, 0)  # the last token is chosen and never read
        self.check_longest(read, "ids and n_new", "shorten the prompt or n_new")
        if reset is not None:
            check_reset(reset, ids)
        # --8<-- [start:generate]
        cache = self.new_cache(batch, read) if cached else None

        def scores_after(unread: Tensor, n: int) -> Tensor:
            return self._next(unread, cache, _reset_of(unread, reset) if n == 0 or not cached else None, last=True)

        # --8<-- [end:generate]
        tokens = extend(
            checked, n_new, scores_after, temperature, top_k, top_p, generator=generator, eos=eos, cached=cached
        )
        fits = torch.iinfo(ids.dtype).max >= self.vocabulary - 1
        return tokens.to(ids.dtype if fits else torch.long)

    def hidden(
        self,
        x: Float[Tensor, "b n e"],
        *,
        cache: list[Any] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        before: Callable[[int, Tensor], Tensor] | None = None,
        mixing: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """Embeddings (B, N, E) -> the vector of each position after the last norm, (B, N, E).

        For a model that puts something else than tokens into the sequence, or something between the layers:

            model.scores(model.hidden(model.embeddings(ids)))             # model(ids), to the bit
            model.hidden(x, before=lambda i, x: x + more[i])              # more[i] is added before layer i

        Args:
            x: (B, N, E), floating point; the positions, if there are any, are added to it here.
            cache: as in `forward`.
            reset: as in `forward`.
            before: called with i and the vectors (B, N, E) that layer i is about to read, in order; what it returns is
                read in their place.
            mixing: what else every mixer is given by name, such as a mask, and causal=False where that mask decides
                alone what is seen.

        Raises:
            TypeError: x that is not a Tensor, or as `forward`.
            ValueError: x that is not floating point (B, N, E); a cache or a reset as in `forward`; in mixing, what a
                layer's mixer does not take.
        """
        check_tensors({"x": x})
        width = self.embeddings.embedding_dim if isinstance(self.embeddings, nn.Embedding) else x.shape[-1]
        if x.ndim != 3 or x.shape[-1] != width or not x.is_floating_point():
            raise ValueError(f"x must be floating point (B, N, {width}), got {x.dtype} {tuple(x.shape)}")
        self._check(cache, reset)
        for option in mixing or ():
            for i, mixer in enumerate(self._mixers()):
                check_takes(mixer, option, f"layer {i}")
        with as_before_if_raised(*(cache or ())):
            return self._through_layers(x, cache, reset, before, mixing)

    def scores(self, hidden: Float[Tensor, "*b e"]) -> Float[Tensor, "*b v"]:
        """What `hidden` gives, or any of its positions, (…, E) -> scores (…, V) for the token that follows each."""
        return self._scores(hidden)

    def loss_at(self, hidden: Float[Tensor, "b n e"], labels: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
        """The mean cross-entropy, in nats, of the labelled positions; the scores of no other are computed.

        With a large vocabulary and few labels most of a loss's time and memory is saved so. Compiled, the scores of all
        are computed, since shapes cannot depend on values there.

        Args:
            hidden: (B, N, E), from `hidden`.
            labels: (B, N) int64, the token that follows each position, or -100 where none is to be predicted.

        Returns:
            A number, in float32 or better: 0, and so are its gradients, where nothing is labelled.

        Raises:
            TypeError: labels that are not a Tensor.
            ValueError: labels that are not int64 (B, N).
        """
        check_tensors({"hidden": hidden, "labels": labels})
        if labels.dtype != torch.int64 or labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels must be int64 (B, N) = {tuple(hidden.shape[:-1])}, got {labels.dtype} {tuple(labels.shape)}"
            )
        # --8<-- [start:loss_at]
        if has_values(labels):
            labelled = labels != -100
            hidden, labels = hidden[labelled], labels[labelled]  # (L, E) and (L,)
        return _mean_cross_entropy(self._scores(hidden), labels)
        # --8<-- [end:loss_at]

    def check_longest(self, n: int, what: str, remedy: str) -> None:
        """Refuse more positions than the model reads; one whose positions have no end refuses none.

        Raises:
            ValueError: n is more than the positions go to.
        """
        longest = None if self.positions is None else self.positions.longest
        if longest is not None and n > longest:
            raise ValueError(
                f"{what} must be {longest} positions or fewer, the longest that this model reads, got {n}: {remedy}"
            )

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for a batch of B sequences: what the positions need, if there are any, and one for each layer.

        Args:
            batch: B.
            max_len: how many positions will be read at most; as many as the model has where left out, if there is an
                end to them. Mamba and its like do not need it.

        Raises:
            ValueError: a mixer that makes no cache, or one that needs max_len where there is none.
        """
        caches: list[Any] = []
        if self.positions is not None:
            caches.append(self.positions.new_cache())
            max_len = self.positions.longest if max_len is None else max_len
        return caches + new_caches(self._mixers(), batch, max_len, "generate with cached=False")

    def _mixers(self) -> list[Any]:
        return [layer.mixer for layer in self.layers]

    def _next(self, ids: Tensor, cache: list[Any] | None, reset: Tensor | None, *, last: bool = False) -> Tensor:
        """Scores (B, N, V), or (B, V) for the last position alone. All the caches change, or none where it raises."""
        self._check(cache, reset)
        with as_before_if_raised(*(cache or ())):
            hidden = self._through_layers(self.embeddings(ids), cache, reset, None)
            return self._scores(hidden[:, -1] if last else hidden)

    def _check(self, cache: list[Any] | None, reset: Tensor | None) -> None:
        if cache is not None:
            self._check_cache(cache)
        if reset is not None:
            for i, mixer in enumerate(self._mixers()):
                check_takes(mixer, "reset", f"layer {i}")

    def _check_cache(self, cache: list[Any]) -> None:
        """Refuse what is not a list of as many caches as `new_cache` makes. Each mixer checks its own."""
        if not isinstance(cache, (list, tuple)):
            raise TypeError(f"cache must be a list, from new_cache, got {type(cache).__name__}")
        wanted = len(self.layers) + (self.positions is not None)
        if len(cache) != wanted:
            and_positions = "" if self.positions is None else ", and one for the positions"
            raise ValueError(
                f"cache must have one for each of {len(self.layers)} layers{and_positions}, got {len(cache)}"
            )

    def _through_layers(
        self,
        x: Tensor,
        cache: list[Any] | None,
        reset: Tensor | None,
        before: Callable[[int, Tensor], Tensor] | None,
        mixing: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The vector of each position after the last norm (B, N, E)."""
        caches = list(cache or ())
        if self.positions is not None:
            places = x.new_zeros(x.shape[:2], dtype=torch.int64)  # of which the shape counts and the device
            where = self.positions.of_sequences(places, cache=caches.pop(0) if caches else None, reset=reset)
            x = x + where if self.residual_in_fp32 else (x + where).to(x.dtype)  # a fixed code is in float32
        if self.residual_in_fp32:
            x = at_least_float32(x)
        given = dict(mixing or {}) if reset is None else {**(mixing or {}), "reset": reset}
        calls = [
            LayerCall(
                layer,
                given if cache is None else given | {"cache": caches[i]},
                None if before is None else partial(before, i),
            )
            for i, layer in enumerate(self.layers)
        ]
        return normed(self.norm_f, self.connection(x, calls))

    def _scores(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return tied_scores(self.embeddings, hidden, self.vocabulary)

    def _checked(self, ids: Tensor) -> Tensor:
        return check_ids("ids", ids, self.vocabulary).long()


def _check_positions(positions: object, max_len: int | None, d_model: int) -> None:
    if not isinstance(positions, AddedPositions):
        raise TypeError(
            f"positions must be LearnedPositions, Sinusoidal or another of AddedPositions, got "
            f"{type(positions).__name__}; what acts inside attention, such as Rotary, goes to "
            "MultiHeadAttention(positions=) or GPT(positions=)"
        )
    if max_len is not None:
        raise ValueError(f"max_len makes a learned table and cannot go with positions, got {max_len}: give one of them")
    if positions.d_model != d_model:
        raise ValueError(f"positions must be of the width d_model={d_model}, got {positions.d_model}")


def _check_connection(connection: object) -> None:
    if not callable(connection) or isinstance(connection, type):
        got = f"the class {connection.__name__}" if isinstance(connection, type) else type(connection).__name__
        raise TypeError(f"connection must be a function or a module, such as DenseFormer(n_layers), got {got}")


def _reset_of(unread: Tensor, reset: Tensor | None) -> Tensor | None:
    """The prompt's reset, with False for the tokens after it."""
    return None if reset is None else F.pad(reset, (0, unread.shape[1] - reset.shape[1]))


def _mean_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean over the targets that are not -100, in float32 or better; 0 where there are none."""
    each = F.cross_entropy(scores.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="none")
    return at_least_float32(each).sum() / (targets != -100).sum().clamp(min=1)
