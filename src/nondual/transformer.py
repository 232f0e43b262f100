"""A stack of layers that read a whole sequence, and the text encoder made of it.

One layer is in `nondual.transformer_layer`. Source: Vaswani et al. 2017 (1706.03762), section 3.1; the text encoder:
Devlin et al. 2018 (1810.04805), section 3. Symbols: x (B, N, E), F the feed-forward width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from nondual.feed_forward import FeedForward as FeedForward
from nondual.mixers import as_before_if_raised, new_caches
from nondual.ops.attention import attention
from nondual.ops.checks import check_tensors
from nondual.positional_encoding import LearnedPositions
from nondual.relative_positions import RelativePositions, of_layer
from nondual.self_attention import MultiHeadAttention
from nondual.token_ids import check_ids
from nondual.transformer_layer import MixerBlock as MixerBlock
from nondual.transformer_layer import TransformerLayer as TransformerLayer


class Encoder(nn.Module):
    """A stack of attention layers, each position free to see every other; or, causal, none after it.

        Encoder(64, 4, 256, 6)                                                             # as in BERT
        Encoder(64, 4, 171, 6, norm_first=True, norm=nn.RMSNorm, feed_forward=GatedFeedForward, activation=F.silu,
                n_kv_heads=2, causal=True, positions=Rotary(16))                           # as in Llama
        Encoder(64, 4, 256, 6, mixer=Mamba)                                                # another mixer

    Args:
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: how many layers.
        norm_first: pre-norm if True; a last norm then follows the stack.
        activation: of the feed-forward networks.
        eps: added to the variance or mean square in the norms.
        dropout: of the weights and of both branches.
        n_kv_heads: key/value heads, a divisor of H; H where left out.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.
        causal: no position sees a later one.
        positions: what acts inside attention, such as `Rotary`: one object, which all layers share, or a function of
            the layer's index that gives each layer's own.
        mixer: makes the mixer of one layer, given E, in place of attention: n_heads, n_kv_heads, op and causal then
            count for nothing, and positions must be left out.
        norm: the norms, called as nn.LayerNorm and nn.RMSNorm are.
        feed_forward: makes the feed-forward networks, called as `FeedForward` and `GatedFeedForward` are.
        drop_path: with what probability the last layer leaves a whole branch out for a sample while training; it grows
            evenly from 0 in the first layer (stochastic depth: 1603.09382, section 3).
        layer_scale: what a learned scale of each channel of every branch starts at (2103.17239); None for none.

    Raises:
        TypeError: positions that do not act inside attention.
        ValueError: positions together with a mixer, or made for other heads.
    """

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        *,
        norm_first: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        eps: float = 1e-5,
        dropout: float = 0.0,
        n_kv_heads: int | None = None,
        op: Callable[..., Any] = attention,
        causal: bool = False,
        positions: RelativePositions | Callable[[int], RelativePositions] | None = None,
        mixer: Callable[[int], nn.Module] | None = None,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        feed_forward: Callable[..., nn.Module] = FeedForward,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        if mixer is not None and positions is not None:
            raise ValueError("positions must be left out with a mixer: give them to the mixer itself")

        def mixer_of(i: int) -> nn.Module:
            if mixer is not None:
                return mixer(d_model)
            return MultiHeadAttention(
                d_model,
                n_heads,
                n_kv_heads=n_kv_heads,
                dropout=dropout,
                causal=causal,
                op=op,
                positions=of_layer(positions, i),
            )

        self.layers = nn.ModuleList(
            TransformerLayer(
                mixer_of(i),
                feed_forward(d_model, d_ff, activation=activation, dropout=dropout),
                d_model,
                norm_first=norm_first,
                norm=norm,
                eps=eps,
                dropout=dropout,
                drop_path=drop_path * i / max(1, n_layers - 1),
                layer_scale=layer_scale,
            )
            for i in range(n_layers)
        )
        self.norm = norm(d_model, eps=eps) if norm_first else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        *,
        mask: Tensor | None = None,
        cache: list[Any] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "layers b h n n"]]:
        """x (B, N, E) -> (B, N, E), and the weights (layers, B, H, N, N) if asked for.

        Args:
            x: (B, N, E).
            mask: as in `nondual.ops.attention.attention`; `masks.padding` for a padded batch.
            cache: of the positions before x, from `new_cache`; whatever this call raises, it is then as it was before.
            reset: (B, N), True at the first position of each of several sequences packed along N.
            return_weights: also return every layer's weights.

        Raises:
            ValueError: a cache of another depth, or what the mixers refuse.
        """
        check_depth(cache, self.layers)
        given = {name: value for name, value in (("mask", mask), ("reset", reset)) if value is not None}
        weights = []
        with as_before_if_raised(*(cache or ())):
            for i, layer in enumerate(self.layers):
                own = given if cache is None else given | {"cache": cache[i]}
                x = layer(x, return_weights=return_weights, **own)
                if return_weights:
                    x, rows = x
                    weights.append(rows)
            x = self.norm(x)
        return (x, torch.stack(weights)) if return_weights else x

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for each layer: attention needs max_len, how many positions it will hold.

        Raises:
            ValueError: a mixer that makes no cache, or one that needs max_len where there is none.
        """
        mixers = (layer.mixer for layer in self.layers)
        return new_caches(mixers, batch, max_len, "call without a cache")

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            mask: Tensor | None = None,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            mask: Tensor | None = None,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            *,
            mask: Tensor | None = None,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def check_depth(cache: list[Any] | None, layers: nn.ModuleList) -> None:
    """Refuse a cache that is not one for each layer."""
    if cache is not None and len(cache) != len(layers):
        raise ValueError(f"cache must have one for each of {len(layers)} layers, got {len(cache)}")


class TextEncoder(nn.Module):
    """Token ids to contextual vectors: BERT's encoder, with its embeddings of token, position and segment.

    Args:
        vocabulary: how many token ids there are.
        max_len: the longest input.
        d_model: width E.
        n_heads: heads H of each layer.
        d_ff: feed-forward width F.
        n_layers: how many layers.
        n_segments: how many segment ids there are.
        eps: added to the variance in the norms.
    """

    vocabulary: int
    n_segments: int
    token: nn.Embedding
    position: LearnedPositions
    segment: nn.Embedding
    norm: nn.LayerNorm
    encoder: Encoder

    def __init__(
        self,
        vocabulary: int,
        max_len: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        *,
        n_segments: int = 2,
        eps: float = 1e-12,
    ):
        super().__init__()
        self.vocabulary, self.n_segments = vocabulary, n_segments
        self.token = nn.Embedding(vocabulary, d_model)
        self.position = LearnedPositions(max_len, d_model)
        self.segment = nn.Embedding(n_segments, d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.encoder = Encoder(d_model, n_heads, d_ff, n_layers, eps=eps)

    def embed(
        self, ids: Integer[Tensor, "b n"], segments: Integer[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n e"]:
        """The input of the first layer: what each token is, where it stands, which segment it is of.

        Args:
            ids: (B, N), any integer dtype, each below the vocabulary's size.
            segments: (B, N), any integer dtype, each below n_segments; all 0 where left out.

        Returns:
            (B, N, E).

        Raises:
            TypeError: ids or segments are not a tensor.
            ValueError: ids or segments that are not integers (B, N), one that is out of range, or N above max_len.
                Where values cannot be looked at (compiled, exported, on meta, inside torch.func.vmap) the range is
                left to torch's own embedding.
        """
        check_tensors({"ids": ids}, {"segments": segments})
        ids = check_ids("ids", ids, self.vocabulary)
        which = torch.zeros_like(ids) if segments is None else check_ids("segments", segments, self.n_segments)
        if which.shape != ids.shape:
            raise ValueError(f"segments must be of ids' shape {tuple(ids.shape)}, got {tuple(which.shape)}")
        return self.norm(self.token(ids) + self.position(ids.shape[1]) + self.segment(which))

    def forward(
        self,
        ids: Integer[Tensor, "b n"],
        *,
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "layers b h n n"]]:
        """ids (B, N) -> vectors (B, N, E), and the weights (layers, B, H, N, N) if asked for.

        Args:
            ids: as in `embed`.
            mask: as in `nondual.ops.attention.attention`; `masks.padding` for a padded batch.
            return_weights: also return every layer's weights.

        Raises:
            TypeError, ValueError: as in `embed`, and a mask that does not fit.
        """
        return self.encoder(self.embed(ids), mask=mask, return_weights=return_weights)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self, ids: Tensor, *, mask: Tensor | None = None, return_weights: Literal[False] = False
        ) -> Tensor: ...

        @overload
        def __call__(
            self, ids: Tensor, *, mask: Tensor | None = None, return_weights: Literal[True]
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self, ids: Tensor, *, mask: Tensor | None = None, return_weights: bool
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
