"""A language model over bytes that learns where to cut them: an H-Net of one stage.

    embeddings  ->  encoder, at every byte  ->  cut  ->  main network, at every piece  ->  decoder, at every byte

Its tokens are the 256 bytes, so that no text is unknown to it; what a tokenizer would do is inside, and trained with
all the rest. Main networks may be nested: one that is made of layers can have a `ChunkingLayer` among them.

Source: Hwang, Wang and Gu 2025 (2507.07955), section 2; the parts are in `nondual.chunking`. Where we differ: encoder
and decoder are layers of attention here, and mostly Mamba-2 in the paper. Symbols: E width at the bytes, F at the
pieces.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.chunking import ChunkingLayer, Cuts, DynamicChunking, ratio_loss
from nondual.language_models.causal import CausalLM
from nondual.mixers import as_before_if_raised, new_caches
from nondual.ops.checks import check_sizes
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer
from nondual.transformer_layer import normed


class Layers(nn.Module):
    """A stack of layers and a norm after them, as one mixer: c (B, M, F) -> c (B, M, F).

    Args:
        layers: each x -> x over (B, M, F), with its mixer as `mixer`.
        d_model: width F.
        norm: the last norm.
    """

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, layers: Sequence[nn.Module], d_model: int, norm: Callable[[int], nn.Module] = nn.RMSNorm):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm(d_model)

    def forward(self, x: Float[Tensor, "b m f"], *, cache: list[Any] | None = None) -> Float[Tensor, "b m f"]:
        """x (B, M, F) -> (B, M, F); with a list of caches, one a layer, it goes on from what these hold.

        Args:
            x: (B, M, F).
            cache: from `new_cache`; it is brought up to date, unless this call raises.
        """
        with as_before_if_raised(cache):
            for i, layer in enumerate(self.layers):
                x = layer(x) if cache is None else layer(x, cache=cache[i])
            return normed(self.norm, x)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, *, cache: list[Any] | None = None) -> Tensor: ...

    def new_cache(self, batch: int, max_len: int | None = None) -> list[Any]:
        """An empty cache for each layer.

        Args:
            batch: B.
            max_len: how many pieces will be read at most; some mixers need it.

        Raises:
            ValueError: a mixer that makes no cache.
        """
        return new_caches([cast(Any, layer).mixer for layer in self.layers], batch, max_len, "use no cache")


def rotary_layer(d_model: int, n_heads: int, **options: Any) -> TransformerLayer:
    """A pre-norm layer of causal attention with rotary positions, and a feed-forward network four times as wide.

    Args:
        d_model: width.
        n_heads: heads.
        options: others of `MultiHeadAttention`.
    """
    mixer = MultiHeadAttention(d_model, n_heads, causal=True, positions=Rotary(d_model // n_heads), **options)
    return TransformerLayer(mixer, FeedForward(d_model, 4 * d_model), d_model, norm_first=True, norm=nn.RMSNorm)


class HNet(CausalLM):
    """Bytes to scores for the byte after each, by pieces that the model cuts itself.

        model = HNet(64, 96, 4)                    # 256 bytes, pieces of about four
        model.loss(ids)                            # cross-entropy, and the ratio loss
        model.cuts(ids).cut                        # (B, N), where it cuts

    All else is as in `CausalLM`. Generating with a cache takes one sequence at a time.

    Args:
        d_model: width E at the bytes.
        d_main: width F at the pieces, E or more.
        n_heads: of each layer of attention.
        vocabulary: how many ids there are: the bytes, and more where there are other signs, such as a beginning.
        n_encoder: layers before the cuts.
        n_main: layers on the pieces.
        n_decoder: layers after.
        pieces_of: how many bytes a piece is to have on average, which the ratio loss asks for.
        ratio_weight: what the ratio loss is multiplied by; 0.03 as published.
        router: as in `DynamicChunking`.
        layer: (width, heads) -> a layer.

    Raises:
        ValueError: a size below 1; pieces_of that is not above 1; d_main below d_model.
    """

    pieces_of: float
    ratio_weight: float

    def __init__(
        self,
        d_model: int,
        d_main: int,
        n_heads: int,
        *,
        vocabulary: int = 256,
        n_encoder: int = 1,
        n_main: int = 2,
        n_decoder: int = 1,
        pieces_of: float = 4.0,
        ratio_weight: float = 0.03,
        router: nn.Module | None = None,
        layer: Callable[[int, int], nn.Module] = rotary_layer,
    ):
        check_sizes(d_model=d_model, n_heads=n_heads, n_encoder=n_encoder, n_main=n_main, n_decoder=n_decoder)
        if not pieces_of > 1:
            raise ValueError(f"pieces_of must be above 1, got {pieces_of}")
        main = Layers([layer(d_main, n_heads) for _ in range(n_main)], d_main)
        chunking = ChunkingLayer(DynamicChunking(main, d_model, d_main=d_main, router=router))

        def of_bytes(i: int) -> nn.Module:
            return chunking if i == n_encoder else layer(d_model, n_heads)

        super().__init__(vocabulary, d_model, n_encoder + 1 + n_decoder, layer=of_bytes)
        self.pieces_of, self.ratio_weight = pieces_of, ratio_weight
        _start_small(main, n_encoder + n_main + n_decoder)

    @property
    def chunking(self) -> DynamicChunking:
        """The layer that cuts."""
        return next(layer.mixer for layer in self.layers if isinstance(layer, ChunkingLayer))

    def loss(self, ids: Int[Tensor, "b n"], *, reset: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
        """As in `CausalLM`, and the ratio loss times its weight."""
        with self.noting_cuts() as noted:
            loss = super().loss(ids, reset=reset)
        return loss + self.ratio_weight * ratio_loss(noted[0], self.pieces_of)

    @contextmanager
    def noting_cuts(self) -> Iterator[list[Cuts]]:
        """Meanwhile every forward pass appends its cuts to the list that this gives."""
        noted: list[Cuts] = []

        def note(module: nn.Module, given: Any, cuts: Any) -> None:
            noted.append(cuts)

        hook = self.chunking.router.register_forward_hook(note)
        try:
            yield noted
        finally:
            hook.remove()

    @torch.no_grad()
    def cuts(self, ids: Int[Tensor, "b n"]) -> Cuts:
        """Where it cuts ids (B, N), and how surely.

        Raises:
            ValueError: ids as in `forward`.
            TypeError: ids that are not a Tensor.
        """
        with self.noting_cuts() as noted:
            self(ids)
        return noted[0]


@torch.no_grad()
def _start_small(main: Layers, branches_of_layers: int) -> None:
    """The layers inside begin as `CausalLM` lets its own begin: no biases, and branches whose sum keeps its scale."""
    for layer in main.layers:
        for branch in (getattr(layer, "mixer", None), getattr(layer, "feed_forward", None)):
            for name in ("in_proj", "q_proj", "k_proj", "v_proj", "out_proj", "linear1", "linear2"):
                bias = getattr(getattr(branch, name, None), "bias", None)
                if bias is not None:
                    bias.zero_()
            last = getattr(branch, "out_proj", getattr(branch, "linear2", None))
            if last is not None:
                last.weight /= math.sqrt(2 * branches_of_layers)
