"""Linear attention as modules: an op of `MultiHeadAttention`, and mixers whose memory of the past has a fixed size.

    op          LinearAttention, what joins q, k and v in a module of heads
    mixer       what the mixers share: projections, short convolution, norm and gate, and their cache
    plain       LinearAttentionMixer: a feature map and a normaliser (Katharopoulos et al. 2020)
    retention   Retention: a fixed decay of each head (RetNet)
    gated       GatedLinearAttention: a decay of each channel that depends on the input (GLA)
    delta       DeltaNet and GatedDeltaNet: the difference is written, not the value

Everything public can be imported from here. The operation is `nondual.ops.linear_attention`, the feature maps are in
`nondual.efficient_attention.feature_maps`.
"""

from nondual.efficient_attention.linear_attention.delta import DeltaNet, GatedDeltaNet
from nondual.efficient_attention.linear_attention.gated import GatedLinearAttention
from nondual.efficient_attention.linear_attention.mixer import LinearAttentionCache, LinearMixer
from nondual.efficient_attention.linear_attention.op import LinearAttention
from nondual.efficient_attention.linear_attention.plain import LinearAttentionMixer
from nondual.efficient_attention.linear_attention.retention import Retention

__all__ = [
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "LinearAttention",
    "LinearAttentionCache",
    "LinearAttentionMixer",
    "LinearMixer",
    "Retention",
]
