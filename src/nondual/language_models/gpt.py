"""A GPT: pre-norm layers of causal attention and a feed-forward network, positions of any kind, tied scores.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3. Symbols: E
width, H heads, F feed-forward width, V tokens in the vocabulary.
"""

from collections.abc import Callable

from torch import nn

from nondual.connections import Connection, stream
from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.positional_encoding import AddedPositions
from nondual.relative_positions import RelativePositions, of_layer
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

# By flash attention; with a mask, as packed or padded sequences and a bias of the positions need, by plain attention.
FLASH: FlashAttention = FlashAttention(otherwise=attention)


class GPT(CausalLM):
    """Token ids to scores for the token after each, by causal attention; all else as in `CausalLM`.

        GPT(256, 64, 4, 4, max_len=512)                                       # learned positions, as in GPT-2
        GPT(256, 64, 4, 4, positions=Sinusoidal(64))                          # others that are added to embeddings
        GPT(256, 64, 4, 4, positions=Rotary(16))                              # inside attention, shared by all layers
        GPT(256, 64, 4, 4, positions=lambda i: RelativeBias(4, causal=True))  # or one for each layer i
        GPT(256, 64, 4, 4)                                                    # none: only the mask tells the order

    Args:
        vocabulary: V.
        d_model: width E.
        n_layers: how many layers.
        n_heads: H, of each layer.
        max_len: the longest input, with one learned position for each.
        positions: in place of max_len, what is added to the embeddings, or acts inside attention: one object, which all
            layers share, or a function of the layer's index that gives each layer's own.
        n_kv_heads: key/value heads, a divisor of H; H where left out.
        d_ff: F; 4 E where left out.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.
        dropout: of both branches of a layer while training.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        eps: added to the variance in the norms.
        connection: how the layers are joined, as in `CausalLM`; each has two branches.

    Raises:
        TypeError: positions of neither kind.
        ValueError: positions together with max_len, of another width, or made for other heads.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        max_len: int | None = None,
        positions: AddedPositions | RelativePositions | Callable[[int], RelativePositions] | None = None,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        op: Callable = FLASH,
        dropout: float = 0.0,
        tied: bool = True,
        eps: float = 1e-5,
        connection: Connection = stream,
    ):
        if max_len is not None and positions is not None:
            raise ValueError(
                f"max_len makes a learned table and cannot go with positions, got {max_len}: give one of them"
            )
        added = positions if isinstance(positions, AddedPositions) else None

        def layer(i: int) -> TransformerLayer:
            inside = None if added is not None else of_layer(positions, i)
            mixer = MultiHeadAttention(d_model, n_heads, n_kv_heads=n_kv_heads, causal=True, op=op, positions=inside)
            feed_forward = FeedForward(d_model, 4 * d_model if d_ff is None else d_ff)
            return TransformerLayer(mixer, feed_forward, d_model, norm_first=True, eps=eps, dropout=dropout)

        super().__init__(
            vocabulary,
            d_model,
            n_layers,
            layer=layer,
            max_len=max_len,
            positions=added,
            norm=nn.LayerNorm,
            tied=tied,
            eps=eps,
            connection=connection,
        )
