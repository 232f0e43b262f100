"""The first linear attention as a mixer: a positive feature map, and a normaliser.

Source: Katharopoulos et al. 2020 (2006.16236), sections 3.2 to 3.4.
"""

from collections.abc import Callable

from torch import Tensor

from nondual.efficient_attention.feature_maps import elu_plus_one
from nondual.efficient_attention.linear_attention.mixer import LinearMixer
from nondual.ops.linear_attention import Impl


class LinearAttentionMixer(LinearMixer):
    """out_t = (Σ_{s≤t} v_s φ(k_s)ᵀ) φ(q_t) / (Σ_{s≤t} φ(k_s)) · φ(q_t), in H heads.

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(LinearAttentionMixer(64, 4), 64))

    As published it has neither convolution nor norm nor gate, and learns the order of positions from elsewhere.

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        d_head: width D of queries and keys; d_model / n_heads where left out.
        d_value: width of values; D where left out.
        d_conv: width of a short convolution; 0 for none.
        norm: whether each head's output is divided by its root mean square.
        gate: whether the output is multiplied by silu(x W_z).
        feature_map: φ, of `nondual.efficient_attention.feature_maps` or any from (…, D) to (…, F).
        normalise: divide by the sum of the weights.
        chunk: as in `nondual.ops.linear_attention`.
        impl: likewise.

    Raises:
        ValueError: a size below 1, or heads that do not divide d_model.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_value: int | None = None,
        d_conv: int = 0,
        norm: bool = False,
        gate: bool = False,
        feature_map: Callable[[Tensor], Tensor] = elu_plus_one,
        normalise: bool = True,
        chunk: int | None = None,
        impl: Impl = "auto",
    ):
        super().__init__(
            d_model,
            n_heads,
            d_head=d_head,
            d_value=d_value,
            d_conv=d_conv,
            norm=norm,
            gate=gate,
            feature_map=feature_map,
            normalise=normalise,
            chunk=chunk,
            impl=impl,
        )
