"""Recent answers to what stays fixed in a transformer: its weights, its depth, and the path through its layers.

attention_residuals  each part of a layer reads a softmax average over depth, weighed anew at every position
ctm                  the Continuous Thought Machine: ticks of its own, as many as it needs
ctm_parts            its synapses, neuron-level models and synchronisation
denseformer          learned averages over depth, the same for every token
hyper_connections    several residual streams side by side, and learned maps to read and write them
ttt                  test-time training: a memory that is a model, trained while it reads
value_residual       the first layer's values in all later ones
"""

from nondual.recent.attention_residuals import AttentionResiduals
from nondual.recent.ctm import ContinuousThoughtMachine, Stopped, Thoughts, certainty, two_tick_loss
from nondual.recent.ctm_parts import NeuronModels, Synapses, Synchronisation, UNetSynapses, dense_pairs, random_pairs
from nondual.recent.denseformer import DenseFormer
from nondual.recent.hyper_connections import HyperConnections
from nondual.recent.ttt import TTT, TTTMLP, TTTCache, TTTLinear
from nondual.recent.value_residual import ValueResidual

__all__ = [
    "TTT",
    "TTTMLP",
    "AttentionResiduals",
    "ContinuousThoughtMachine",
    "DenseFormer",
    "HyperConnections",
    "NeuronModels",
    "Stopped",
    "Synapses",
    "Synchronisation",
    "TTTCache",
    "TTTLinear",
    "Thoughts",
    "UNetSynapses",
    "ValueResidual",
    "certainty",
    "dense_pairs",
    "random_pairs",
    "two_tick_loss",
]
