"""Recent answers to what stays fixed in a transformer: its weights, its depth, and the path through its layers.

ctm        the Continuous Thought Machine: ticks of its own, as many as it needs
ctm_parts  its synapses, neuron-level models and synchronisation
ttt        test-time training: a memory that is a model, trained while it reads
"""

from nondual.recent.ctm import ContinuousThoughtMachine, Stopped, Thoughts, certainty, two_tick_loss
from nondual.recent.ctm_parts import NeuronModels, Synapses, Synchronisation, UNetSynapses, dense_pairs, random_pairs
from nondual.recent.ttt import TTT, TTTMLP, TTTCache, TTTLinear

__all__ = [
    "TTT",
    "TTTMLP",
    "ContinuousThoughtMachine",
    "NeuronModels",
    "Stopped",
    "Synapses",
    "Synchronisation",
    "TTTCache",
    "TTTLinear",
    "Thoughts",
    "UNetSynapses",
    "certainty",
    "dense_pairs",
    "random_pairs",
    "two_tick_loss",
]
