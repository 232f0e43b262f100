"""One sequence over several devices, on torch.distributed: attention round a ring or over heads, scans passed on.

ring        attention in which keys and values go round a ring of ranks: causal, windows, packed documents
all_to_all  attention in which every rank trades rows for heads
layout      which rank holds which positions: contiguous, zig-zag, or of given lengths
exchange    what ranks send one another, counted, checked by all alike, with a limit to every wait
"""

from nondual.parallel.all_to_all import AllToAllAttention, all_to_all_attention
from nondual.parallel.exchange import Ranks, Traffic, ranks_of, traffic
from nondual.parallel.layout import Layout, contiguous, of_lengths, zigzag
from nondual.parallel.ring import RingAttention, ring_attention

__all__ = [
    "AllToAllAttention",
    "Layout",
    "Ranks",
    "RingAttention",
    "Traffic",
    "all_to_all_attention",
    "contiguous",
    "of_lengths",
    "ranks_of",
    "ring_attention",
    "traffic",
    "zigzag",
]
