"""Positions inside attention: what turns queries and keys, or is added to their scores, by the distance between them.

What they have in common is `RelativePositions`; each is a file: rotary, ALiBi, T5's learned bias.
"""

from nondual.relative_positions.alibi import ALiBi as ALiBi
from nondual.relative_positions.protocol import RelativePositions as RelativePositions
from nondual.relative_positions.protocol import of_layer as of_layer
from nondual.relative_positions.relative_bias import RelativeBias as RelativeBias
from nondual.relative_positions.rotary import Rotary as Rotary
from nondual.relative_positions.rotary import reorder_pairs as reorder_pairs
