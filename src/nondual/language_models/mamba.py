"""A language model of Mamba blocks: embeddings, residual blocks each with its norm, a last norm, and scores for tokens.

Source: Gu and Dao 2023 (2312.00752), section 3.4 and figure 3; root-mean-square norm: Zhang and Sennrich 2019
(1910.07467). Symbols: ids (B, N), E width, V tokens in the vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nondual.efficient_attention.mamba import Mamba, MambaCache
from nondual.language_models.causal import CausalLM
from nondual.language_models.sampling import choose as choose
from nondual.transformer import MixerBlock

MambaBlock = MixerBlock


class MambaLM(CausalLM):
    """Token ids to scores for the token after each, by a stack of Mamba or Mamba-2 blocks; all else as in `CausalLM`.

        MambaLM(256, 64, 4)                                        # Mamba
        MambaLM(256, 64, 4, mixer=partial(Mamba2, d_head=32))      # Mamba-2

    Its cache is a list of one `MambaCache` for each layer: the time of a generated token does not grow with the length.

    Args:
        vocabulary: V.
        d_model: width E.
        n_layers: how many blocks.
        mixer: makes the mixer of one block, given E.
        tied: score a token by its own embedding; otherwise the scores have a matrix of their own, lm_head.
        eps: added to the mean square in the norms.
        residual_in_fp32: keep what the blocks add up in float32 where the weights are narrower.
    """

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
        super().__init__(
            vocabulary,
            d_model,
            n_layers,
            layer=lambda _: MambaBlock(mixer(d_model), d_model, eps=eps),
            tied=tied,
            eps=eps,
            residual_in_fp32=residual_in_fp32,
        )

    if TYPE_CHECKING:  # the same methods, whose caches are known to be Mamba's

        def __call__(
            self, ids: Tensor, *, cache: list[MambaCache] | None = None, reset: Tensor | None = None
        ) -> Tensor: ...

        def new_cache(self, batch: int, max_len: int | None = None) -> list[MambaCache]: ...

    def _check_cache(self, cache: list[MambaCache]) -> None:
        """Refuse what is not a list of one MambaCache for each layer."""
        if not isinstance(cache, (list, tuple)):
            raise TypeError(
                f"cache must be a list of one MambaCache a layer, from new_cache, got {type(cache).__name__}"
            )
        super()._check_cache(cache)
        for i, one in enumerate(cache):
            if not isinstance(one, MambaCache):
                raise TypeError(
                    f"cache must be a MambaCache for each layer, from new_cache, got {type(one).__name__} for layer {i}"
                )
