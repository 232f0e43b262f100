"""Attention as it began: a decoder that looks back over the encoder's states (Bahdanau et al. 2014, 1409.0473).

    scores      the scores of 2014 and 2015 as functions, and the way from scores to weights and a context
    attention   the same as modules that a decoder calls once a step: additive, dot, general, concat, location-aware,
                with coverage, local; and two without scores, the mean and the last state
    decoders    recurrent decoders that read through any of these: Bahdanau's and Luong's
    seq2seq     a whole encoder and decoder: loss, greedy and beam search

Everything public can be imported from here.
"""

from nondual.attention_mechanism.attention import (
    AdditiveAttention,
    Attention,
    ConcatAttention,
    CoverageAttention,
    DotAttention,
    GeneralAttention,
    LastState,
    LocalAttention,
    LocationAttention,
    UniformAttention,
)
from nondual.attention_mechanism.decoders import AttentionDecoder, BahdanauDecoder, LuongDecoder
from nondual.attention_mechanism.scores import (
    additive_scores,
    around_median,
    attend,
    compare,
    coverage_loss,
    dot_scores,
    scaled_dot_scores,
    smooth,
)
from nondual.attention_mechanism.seq2seq import Seq2Seq

__all__ = [
    "AdditiveAttention",
    "Attention",
    "AttentionDecoder",
    "BahdanauDecoder",
    "ConcatAttention",
    "CoverageAttention",
    "DotAttention",
    "GeneralAttention",
    "LastState",
    "LocalAttention",
    "LocationAttention",
    "LuongDecoder",
    "Seq2Seq",
    "UniformAttention",
    "additive_scores",
    "around_median",
    "attend",
    "compare",
    "coverage_loss",
    "dot_scores",
    "scaled_dot_scores",
    "smooth",
]
