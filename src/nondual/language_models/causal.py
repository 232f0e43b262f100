"""A causal language model over any mixer: token ids to scores for the token after each.

    embeddings (+ positions)  ->  layers, each a mixer or a mixer and a feed-forward network  ->  norm  ->  scores

It knows of a mixer what `nondual.mixers` says, and no more. Source: Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2, for the frame; tied scores: Press and Wolf 2017 (1608.05859). Symbols: ids
(B, N), E width, V tokens in the vocabulary.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.language_models.sampling import check_sampling, choose
from nondual.mixers import as_before_if_raised, check_reset, check_takes, new_caches
from nondual.ops.dtypes import at_least_float32
from nondual.positional_encoding import AddedPositions, LearnedPositions
from nondual.token_ids import check_ids
from nondual.transformer_layer import normed

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

    Raises:
        TypeError: positions that are not added to embeddings.
        ValueError: positions together with max_len, or of another width.
    """

    vocabulary: int
    residual_in_fp32: bool
    embeddings: nn.Embedding
    positions: AddedPositions | None
    layers: nn.ModuleList
    norm_f: nn.Module
    lm_head: nn.Linear | None

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
    ):
        super().__init__()
        if positions is not None:
            _check_positions(positions, max_len, d_model)
        elif max_len is not None:
            positions = LearnedPositions(max_len, d_model)
        self.vocabulary, self.residual_in_fp32 = vocabulary, residual_in_fp32
        self.embeddings = nn.Embedding(vocabulary, d_model)
        self.positions = positions
        self.layers = nn.ModuleList(layer(i) for i in range(n_layers))
        self.norm_f = norm(d_model, eps=eps)
        self.lm_head = None if tied else nn.Linear(d_model, vocabulary, bias=False)
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
        each = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return at_least_float32(each).sum() / (targets != -100).sum().clamp(min=1)

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
        dtype, ids = ids.dtype, checked
        batch, prompt = ids.shape
        if prompt < 1:
            raise ValueError(f"ids must hold a token or more to go on from, got {tuple(ids.shape)}")
        if n_new < 0:
            raise ValueError(f"n_new must be 0 or more, got {n_new}")
        check_sampling(temperature, top_k, top_p)
        read = prompt + max(n_new - 1, 0)  # the last token is chosen and never read
        longest = None if self.positions is None else self.positions.longest
        if longest is not None and read > longest:
            raise ValueError(
                f"ids and n_new must be {longest} positions or fewer, the longest that this model reads, got {read}: "
                "shorten the prompt or n_new"
            )
        if reset is not None:
            check_reset(reset, ids)
        # --8<-- [start:generate]
        cache, tokens = self.new_cache(batch, read) if cached else None, [ids]
        finished = torch.zeros(batch, dtype=torch.bool, device=ids.device)
        for n in range(n_new):
            unread = torch.cat(tokens, 1) if cache is None else tokens[-1]
            scores = self._next(unread, cache, _reset_of(unread, reset) if n == 0 or not cached else None, last=True)
            token = choose(scores, temperature, top_k, generator, top_p=top_p)
            if eos is not None:
                token = token.masked_fill(finished, eos)
                finished |= token == eos
            tokens.append(token[:, None])
            if eos is not None and finished.all():
                break
        # --8<-- [end:generate]
        fits = torch.iinfo(dtype).max >= self.vocabulary - 1
        return torch.cat(tokens, 1).to(dtype if fits else torch.long)

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
        if cache is not None:
            self._check_cache(cache)
        if reset is not None:
            for i, mixer in enumerate(self._mixers()):
                check_takes(mixer, "reset", f"layer {i}")
        with as_before_if_raised(*(cache or ())):
            hidden = self._hidden(ids, cache, reset)
            return self._scores(hidden[:, -1] if last else hidden)

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

    def _hidden(self, ids: Tensor, cache: list[Any] | None, reset: Tensor | None) -> Tensor:
        """The vector of each position after the last norm (B, N, E)."""
        x, caches = self.embeddings(ids), list(cache or ())
        if self.positions is not None:
            where = self.positions.of_sequences(ids, cache=caches.pop(0) if caches else None, reset=reset)
            x = x + where if self.residual_in_fp32 else (x + where).to(x.dtype)  # a fixed code is in float32
        if self.residual_in_fp32:
            x = at_least_float32(x)
        given = {} if reset is None else {"reset": reset}
        for i, layer in enumerate(self.layers):
            x = layer(x, **given) if cache is None else layer(x, cache=caches[i], **given)
        return normed(self.norm_f, x)

    def _scores(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)
        if isinstance(self.embeddings, nn.Embedding):
            return F.linear(hidden, self.embeddings.weight)
        rows = self.embeddings(torch.arange(self.vocabulary, device=hidden.device))
        return F.linear(hidden, rows.to(hidden.dtype))

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


def _reset_of(unread: Tensor, reset: Tensor | None) -> Tensor | None:
    """The prompt's reset, with False for the tokens after it."""
    return None if reset is None else F.pad(reset, (0, unread.shape[1] - reset.shape[1]))
