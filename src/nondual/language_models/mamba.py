"""A language model of Mamba blocks: embeddings, residual blocks each with its norm, a last norm, and scores for tokens.

Source: Gu and Dao 2023 (2312.00752), section 3.4 and figure 3; root-mean-square norm: Zhang and Sennrich 2019
(1910.07467). Symbols: ids (B, N), E width, V tokens in the vocabulary.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from nondual.efficient_attention.mamba import Mamba, MambaCache, at_least_float32
from nondual.mixers import as_before_if_raised
from nondual.ops.checks import check_tensors


class MambaBlock(nn.Module):
    """A mixer with its norm before it and a residual path around it: x + mixer(norm(x)).

    Args:
        mixer: a `Mamba` or `Mamba2`.
        d_model: width E.
        eps: added to the mean square in the norm.
    """

    norm: nn.RMSNorm
    mixer: nn.Module

    def __init__(self, mixer: nn.Module, d_model: int, *, eps: float = 1e-5):
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(d_model, eps=eps), mixer

    def forward(self, x: Float[Tensor, "b n e"], **mixing: Any) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); what is given besides x goes to the mixer. x may be wider than the weights are."""
        return x + self.mixer(normed(self.norm, x), **mixing)


class MambaLM(nn.Module):
    """Token ids to scores for the token after each, by a stack of Mamba or Mamba-2 blocks.

        MambaLM(256, 64, 4)                                        # Mamba
        MambaLM(256, 64, 4, mixer=partial(Mamba2, d_head=32))      # Mamba-2

    Every layer may be replaced or wrapped (LoRA, quantised layers), and may have hooks and parametrizations; see the
    mixer for its own. Tied scores use the weight of the embeddings. Where something that is not an nn.Embedding stands
    in their place, such as an adapter, they use the rows that it gives for all V ids, computed at every call: merge the
    adapter, or untie the scores, where that is too slow.

    Args:
        vocabulary: V.
        d_model: width E.
        n_layers: how many blocks.
        mixer: makes the mixer of one block, given E.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        eps: added to the mean square in the norms.
        residual_in_fp32: keep what the blocks add up in float32 where the weights are narrower.
    """

    vocabulary: int
    residual_in_fp32: bool
    embeddings: nn.Embedding
    layers: nn.ModuleList
    norm_f: nn.RMSNorm
    lm_head: nn.Linear | None

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layers: int,
        *,
        mixer: Callable[[int], nn.Module] = Mamba,
        tied: bool = True,
        eps: float = 1e-5,
        residual_in_fp32: bool = True,
    ):
        super().__init__()
        self.vocabulary, self.residual_in_fp32 = vocabulary, residual_in_fp32
        self.embeddings = nn.Embedding(vocabulary, d_model)
        self.layers = nn.ModuleList(MambaBlock(mixer(d_model), d_model, eps=eps) for _ in range(n_layers))
        self.norm_f = nn.RMSNorm(d_model, eps=eps)
        self.lm_head = None if tied else nn.Linear(d_model, vocabulary, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As the released code does: small embeddings, no biases, and branches that sum to the scale of one."""
        nn.init.normal_(self.embeddings.weight, std=0.02)
        for layer in self.layers:
            mixer = cast("Mamba", layer.mixer)
            for linear in (mixer.in_proj, mixer.out_proj):
                if linear.bias is not None:
                    linear.bias.zero_()
            mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        cache: list[MambaCache] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n v"]:
        """ids (B, N) -> scores (B, N, V) for the token that follows each.

        Args:
            ids: (B, N), of any integer dtype.
            cache: one for each layer, from `new_cache`, of what came before; all are brought up to date, or none where
                this call raises.
            reset: True where a packed sequence begins, as in `Mamba`. For a batch padded on the left, True at the first
                real token of each row.

        Raises:
            ValueError: ids that are not integers (B, N) or not in the vocabulary; a cache of another batch or depth.
            TypeError: ids that are not a Tensor, a cache that is not a list.
        """
        ids = self._checked(ids)
        return self._next(ids, cache, reset)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self, ids: Tensor, *, cache: list[MambaCache] | None = None, reset: Tensor | None = None
        ) -> Tensor: ...

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
        generator: torch.Generator | None = None,
        eos: int | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Int[Tensor, "b m"]:
        """The prompt and up to n_new tokens after it, each read once: time a token does not grow with the length.

        Args:
            ids: the prompt (B, N), of one token or more, of any integer dtype.
            n_new: how many tokens to add.
            temperature: scores are divided by it and a token is drawn; the likeliest is taken where left out.
            top_k: draw among the k likeliest only.
            generator: where the randomness comes from.
            eos: the token after which a row is finished; it then repeats it until all are.
            reset: as in `forward`, for a prompt padded on the left.

        Returns:
            (B, N + n_new), or shorter where every row met eos before; in the dtype of ids, or in int64 where that of
            ids does not hold every token of the vocabulary.

        Raises:
            ValueError: an empty prompt, a negative n_new, a temperature not above 0, a top_k below 1 or without a
                temperature; ids as in `forward`.
            TypeError: ids that are not a Tensor.
        """
        checked = self._checked(ids)
        dtype, ids = ids.dtype, checked
        if ids.shape[1] < 1:
            raise ValueError(f"ids must hold a token or more to go on from, got {tuple(ids.shape)}")
        if n_new < 0:
            raise ValueError(f"n_new must be 0 or more, got {n_new}")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}; leave it out to take the likeliest")
        if top_k is not None and (top_k < 1 or temperature is None):
            raise ValueError(f"top_k must be 1 or more and go with a temperature, got {top_k} and {temperature}")
        # --8<-- [start:generate]
        cache, tokens = self.new_cache(ids.shape[0]), [ids]
        finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(n_new):
            scores = self._next(tokens[-1], cache, reset if len(tokens) == 1 else None, last=True)
            token = choose(scores, temperature, top_k, generator)
            if eos is not None:
                token = token.masked_fill(finished, eos)
                finished |= token == eos
            tokens.append(token[:, None])
            if eos is not None and finished.all():
                break
        # --8<-- [end:generate]
        fits = torch.iinfo(dtype).max >= self.vocabulary - 1
        return torch.cat(tokens, 1).to(dtype if fits else torch.long)

    def new_cache(self, batch: int) -> list[MambaCache]:
        """One empty cache for each layer, for a batch of B sequences."""
        return [cast("Mamba", layer.mixer).new_cache(batch) for layer in self.layers]

    def _next(self, ids: Tensor, cache: list[MambaCache] | None, reset: Tensor | None, *, last: bool = False) -> Tensor:
        """Scores (B, N, V), or (B, V) for the last position alone. All the caches change, or none where it raises."""
        if cache is not None:
            self._check_cache(cache)
        with as_before_if_raised(*(cache or ())):
            hidden = self._hidden(ids, cache, reset)
            return self._scores(hidden[:, -1] if last else hidden)

    def _check_cache(self, cache: list[MambaCache]) -> None:
        """Refuse what is not a list of one MambaCache for each layer."""
        if not isinstance(cache, (list, tuple)):
            raise TypeError(
                f"cache must be a list of one MambaCache a layer, from new_cache, got {type(cache).__name__}"
            )
        if len(cache) != len(self.layers):
            raise ValueError(f"cache must have one for each of {len(self.layers)} layers, got {len(cache)}")
        for i, one in enumerate(cache):
            if not isinstance(one, MambaCache):
                raise TypeError(
                    f"cache must be a MambaCache for each layer, from new_cache, got {type(one).__name__} for layer {i}"
                )

    def _hidden(self, ids: Tensor, cache: list[MambaCache] | None, reset: Tensor | None) -> Tensor:
        """The vector of each position after the last norm (B, N, E)."""
        x = self.embeddings(ids)
        if self.residual_in_fp32:
            x = at_least_float32(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache=None if cache is None else cache[i], reset=reset)
        return normed(self.norm_f, x)

    def _scores(self, hidden: Tensor) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)
        if isinstance(self.embeddings, nn.Embedding):
            return F.linear(hidden, self.embeddings.weight)
        rows = self.embeddings(torch.arange(self.vocabulary, device=hidden.device))
        return F.linear(hidden, rows.to(hidden.dtype))

    def _checked(self, ids: Tensor) -> Tensor:
        """ids in int64, checked: integers (B, N) in the vocabulary."""
        check_tensors({"ids": ids})
        if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
        ids = ids.long()
        if torch.compiler.is_compiling() or ids.is_meta or is_functorch_wrapped_tensor(ids):
            return ids  # no values to look at
        if ids.numel():
            low, high, vocabulary = int(ids.min()), int(ids.max()), self.vocabulary
            if not 0 <= low <= high < vocabulary:
                raise ValueError(f"ids must lie in 0 to {vocabulary - 1}, got {low} to {high}")
        return ids


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), x in the dtype of the norm's weight where it has one."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype))


def check_reset(reset: Tensor, ids: Tensor) -> None:
    """Refuse a reset that is not a boolean Tensor of the shape of ids."""
    check_tensors({"reset": reset})
    if reset.shape != ids.shape or reset.dtype != torch.bool:
        raise ValueError(
            f"reset must be boolean (B, N) = {tuple(ids.shape)}, True where a sequence begins, got {reset.dtype} "
            f"{tuple(reset.shape)}"
        )


def choose(
    scores: Float[Tensor, "b v"],
    temperature: float | None,
    top_k: int | None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """One token of each row: the likeliest, or one drawn at a temperature, among the top_k likeliest where given."""
    if temperature is None:
        return scores.argmax(-1)
    if top_k is not None:
        kept = scores.topk(min(top_k, scores.shape[-1]), -1)
        drawn = torch.multinomial((kept.values.float() / temperature).softmax(-1), 1, generator=generator)
        return kept.indices.gather(-1, drawn)[:, 0]
    return torch.multinomial((scores.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]
