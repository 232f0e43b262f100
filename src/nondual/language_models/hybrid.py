"""A hybrid: Mamba blocks, and attention in every third, which alone needs memory that grows with the length.

No positions are learned: the Mamba blocks know the order. Source: Dao and Gu 2024 (2405.21060), section 9.2.3; Lieber
et al. 2024 (2403.19887), section 2. Symbols: E width, H heads, V tokens in the vocabulary.
"""

from collections.abc import Callable

from torch import nn

from nondual.efficient_attention.mamba import Mamba
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import FLASH
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import MixerBlock


class HybridLM(CausalLM):
    """Token ids to scores for the token after each, by Mamba and attention in turn; all else as in `CausalLM`.

    Args:
        vocabulary: V.
        d_model: width E.
        n_layers: how many blocks.
        n_heads: H, of each attention.
        every: blocks every - 1, 2 every - 1, … are attention.
        n_kv_heads: key/value heads, a divisor of H; H where left out.
        mixer: makes the mixer of the other blocks, given E.
        op: what joins queries, keys and values, as in `MultiHeadAttention`.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.

    Raises:
        ValueError: an every below 1.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        every: int = 3,
        n_kv_heads: int | None = None,
        mixer: Callable[[int], nn.Module] = Mamba,
        op: Callable = FLASH,
        tied: bool = True,
    ):
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")

        # --8<-- [start:layer]
        def layer(i: int) -> MixerBlock:
            if i % every < every - 1:
                return MixerBlock(mixer(d_model), d_model)
            attends = MultiHeadAttention(
                d_model,
                n_heads,
                n_kv_heads=n_kv_heads,
                causal=True,
                op=op,
            )
            return MixerBlock(attends, d_model)

        # --8<-- [end:layer]
        super().__init__(vocabulary, d_model, n_layers, layer=layer, tied=tied, residual_in_fp32=True)
