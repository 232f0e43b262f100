"""A GPT: pre-norm layers of causal attention and a feed-forward network, learned positions, tied scores.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3. Symbols: E
width, H heads, F feed-forward width, V tokens in the vocabulary.
"""

from collections.abc import Callable

from torch import nn

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

# By flash attention; with a mask, as packed or padded sequences need, by plain attention.
FLASH: FlashAttention = FlashAttention(otherwise=attention)


class GPT(CausalLM):
    """Token ids to scores for the token after each, by causal attention; all else as in `CausalLM`.

    Args:
        vocabulary: V.
        d_model: width E.
        n_layers: how many layers.
        n_heads: H, of each layer.
        max_len: the longest input.
        n_kv_heads: key/value heads, a divisor of H; H where left out.
        d_ff: F; 4 E where left out.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.
        dropout: of both branches of a layer while training.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        eps: added to the variance in the norms.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        max_len: int,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        op: Callable = FLASH,
        dropout: float = 0.0,
        tied: bool = True,
        eps: float = 1e-5,
    ):
        def layer(_: int) -> TransformerLayer:
            mixer = MultiHeadAttention(d_model, n_heads, n_kv_heads=n_kv_heads, causal=True, op=op)
            feed_forward = FeedForward(d_model, 4 * d_model if d_ff is None else d_ff)
            return TransformerLayer(mixer, feed_forward, d_model, norm_first=True, eps=eps, dropout=dropout)

        super().__init__(
            vocabulary, d_model, n_layers, layer=layer, max_len=max_len, norm=nn.LayerNorm, tied=tied, eps=eps
        )
