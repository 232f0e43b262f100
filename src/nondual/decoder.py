"""The decoder that reads a memory: a causal mixer over what is written, attention over what an encoder has read.

A decoder without a memory, as in a GPT, is `nondual.transformer.Encoder` with causal=True. Source: Vaswani et al. 2017
(1706.03762), section 3.1 and figure 1, right side; pre-norm: Xiong et al. 2020 (2002.04745). Symbols: x (B, N, E),
memory (B, M, E), F the feed-forward width.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.feed_forward import FeedForward
from nondual.kv_cache import ProjectedMemory
from nondual.mixers import as_before_if_raised, new_caches
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import check_depth


class DecoderLayer(nn.Module):
    """A mixer of positions, attention over a memory and a feed-forward network, each with a residual path around it.

        post-norm (2017):  x = norm1(x + mixer(x)),   x = norm2(x + cross(x, memory)),   x = norm3(x + feed_forward(x))
        pre-norm:          x = x + mixer(norm1(x)),   x = x + cross(norm2(x), memory),   x = x + feed_forward(norm3(x))

    Args:
        mixer: any module x -> x over (B, N, E); what `forward` is given besides x and memory goes to it.
        cross: a module (x, memory) -> x that takes `mask=`, and `return_weights=` where they are asked for, such as
            `MultiHeadAttention`.
        feed_forward: any module x -> x, position by position.
        d_model: width E.
        norm_first: pre-norm if True, as torch's nn.TransformerDecoderLayer names it.
        norm: the norms, called as nn.LayerNorm and nn.RMSNorm are.
        eps: added to the variance or mean square in the norms.
        dropout: probability of dropping a unit of any branch while training.
    """

    mixer: nn.Module
    cross: nn.Module
    feed_forward: nn.Module
    norm_first: bool
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module
    dropout: nn.Dropout

    def __init__(
        self,
        mixer: nn.Module,
        cross: nn.Module,
        feed_forward: nn.Module,
        d_model: int,
        *,
        norm_first: bool = False,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.mixer, self.cross, self.feed_forward, self.norm_first = mixer, cross, feed_forward, norm_first
        self.norm1, self.norm2, self.norm3 = (norm(d_model, eps=eps) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        memory: Float[Tensor, "b m e"] | ProjectedMemory,
        *,
        memory_mask: Tensor | None = None,
        return_weights: bool = False,
        **mixing: Any,
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "b h n m"]]:
        """x (B, N, E), memory (B, M, E) -> (B, N, E), or with the weights over the memory (B, H, N, M) if asked for.

        Args:
            x: (B, N, E).
            memory: what cross attends to; or what `cross.project` made of it.
            memory_mask: (N, M) or broadcastable to (B, H, N, M); True where attending to the memory is allowed.
            return_weights: also return the weights over the memory.
            mixing: given to the mixer as it is: mask, cache, reset. Whatever this call raises, the cache is then as it
                was before.
        """
        asked = {"return_weights": True} if return_weights else {}  # cross need not have this argument
        with as_before_if_raised(mixing.get("cache")):
            x = self._joined(x, self.norm1, self.mixer(self._before(x, self.norm1), **mixing))
            read = self.cross(self._before(x, self.norm2), memory, mask=memory_mask, **asked)
            weights: Any = None
            if return_weights:
                read, weights = read
            x = self._joined(x, self.norm2, read)
            x = self._joined(x, self.norm3, self.feed_forward(self._before(x, self.norm3)))
        return (x, weights) if return_weights else x

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What a branch is given: x, normalised if the norms come first."""
        return norm(x) if self.norm_first else x

    def _joined(self, x: Tensor, norm: nn.Module, branch: Tensor) -> Tensor:
        """x and what a branch made of it, normalised if the norms come last."""
        x = x + self.dropout(branch)
        return x if self.norm_first else norm(x)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | ProjectedMemory,
            *,
            memory_mask: Tensor | None = None,
            return_weights: Literal[False] = False,
            **mixing: Any,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | ProjectedMemory,
            *,
            memory_mask: Tensor | None = None,
            return_weights: bool,
            **mixing: Any,
        ) -> Any: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Decoder(nn.Module):
    """A stack of decoder layers: causal over x, free over the memory.

    Args:
        d_model: width E of x and of the memory.
        n_heads: heads H of each layer, for x and for the memory.
        d_ff: feed-forward width F.
        n_layers: how many layers.
        norm_first: pre-norm if True; a last norm then follows the stack.
        activation: of the feed-forward networks.
        eps: added to the variance or mean square in the norms.
        dropout: of the weights and of all branches.
        n_kv_heads: key/value heads, a divisor of H; H where left out.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.
        mixer: makes the causal mixer of one layer, given E, in place of attention over x.
        norm: the norms, called as nn.LayerNorm and nn.RMSNorm are.
        feed_forward: makes the feed-forward networks, called as `FeedForward` and `GatedFeedForward` are.
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
        mixer: Callable[[int], nn.Module] | None = None,
        norm: Callable[..., nn.Module] = nn.LayerNorm,
        feed_forward: Callable[..., nn.Module] = FeedForward,
    ):
        super().__init__()
        attend = partial(MultiHeadAttention, n_heads=n_heads, n_kv_heads=n_kv_heads, dropout=dropout, op=op)
        self.layers = nn.ModuleList(
            DecoderLayer(
                attend(d_model, causal=True) if mixer is None else mixer(d_model),
                attend(d_model),
                feed_forward(d_model, d_ff, activation=activation, dropout=dropout),
                d_model,
                norm_first=norm_first,
                norm=norm,
                eps=eps,
                dropout=dropout,
            )
            for _ in range(n_layers)
        )
        self.norm = norm(d_model, eps=eps) if norm_first else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        memory: Float[Tensor, "b m e"] | list[ProjectedMemory],
        *,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: list[Any] | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "layers b h n m"]]:
        """x (B, N, E), memory (B, M, E) -> (B, N, E); no output depends on a later position of x.

        Args:
            x: (B, N, E).
            memory: (B, M, E), what an encoder gave; or what `project` made of it, where it is read more than once.
            mask: over x, as in `nondual.ops.attention.attention`, on top of the causal one.
            memory_mask: over the memory; `masks.padding` for a padded one.
            cache: of the positions before x, from `new_cache`; whatever this call raises, it is then as it was before.
            reset: (B, N), True at the first position of each of several sequences packed along N.
            return_weights: also return every layer's weights over the memory (layers, B, H, N, M).

        Raises:
            TypeError: x or memory is not a tensor.
            ValueError: a cache or a projected memory of another depth, or what the mixers refuse.
        """
        check_depth(cache, self.layers)
        if isinstance(memory, (list, tuple)) and len(memory) != len(self.layers):
            raise ValueError(f"memory must be projected for each of {len(self.layers)} layers, got {len(memory)}")
        given: dict[str, Any] = {"memory_mask": memory_mask, "return_weights": return_weights}
        given |= {name: value for name, value in (("mask", mask), ("reset", reset)) if value is not None}
        weights = []
        with as_before_if_raised(*(cache or ())):
            for i, layer in enumerate(self.layers):
                own = given if cache is None else given | {"cache": cache[i]}
                x = layer(x, memory[i] if isinstance(memory, (list, tuple)) else memory, **own)
                if return_weights:
                    x, rows = x
                    weights.append(rows)
            x = self.norm(x)
        return (x, torch.stack(weights)) if return_weights else x

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | list[ProjectedMemory],
            *,
            mask: Tensor | None = None,
            memory_mask: Tensor | None = None,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | list[ProjectedMemory],
            *,
            mask: Tensor | None = None,
            memory_mask: Tensor | None = None,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | list[ProjectedMemory],
            *,
            mask: Tensor | None = None,
            memory_mask: Tensor | None = None,
            cache: list[Any] | None = None,
            reset: Tensor | None = None,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def project(self, memory: Float[Tensor, "b m e"]) -> list[ProjectedMemory]:
        """Each layer's keys and values of the memory, made once and given to each call in its place.

        Args:
            memory: (B, M, E).

        Raises:
            TypeError: memory is not a tensor.
            ValueError: a wrong rank or width, or a `cross` that does not make them apart.
        """
        crosses: list[Any] = [layer.cross for layer in self.layers]
        for i, cross in enumerate(crosses):
            if not hasattr(cross, "project"):
                raise ValueError(
                    f"the cross of layer {i}, {type(cross).__name__}, has no project: give the memory itself"
                )
        return [cross.project(memory) for cross in crosses]

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for each layer: attention needs max_len, how many positions it will hold.

        Raises:
            ValueError: a mixer that makes no cache, or one that needs max_len where there is none.
        """
        mixers = (layer.mixer for layer in self.layers)
        return new_caches(mixers, batch, max_len, "call without a cache")
