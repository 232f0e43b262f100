"""One sequence over several devices, on torch.distributed: attention round a ring or over heads, scans passed on.

ring        attention in which keys and values go round a ring of ranks: causal, windows, packed documents
all_to_all  attention in which every rank trades rows for heads
layout      which rank holds which positions: contiguous, zig-zag, or of given lengths
places      a language model made for one device becomes that of a rank
training    a rank's part of a batch, and a loss over the tokens of all ranks
cost        bytes that a rank sends, its multiply-adds, and a model of the time they take
demo        what each rank of this machine held, sent and got right: torchrun … -m nondual.parallel.demo
exchange    what ranks send one another, counted, checked by all alike, with a limit to every wait
"""

from nondual.parallel.all_to_all import AllToAllAttention, all_to_all_attention
from nondual.parallel.exchange import Ranks, Traffic, ranks_of, traffic
from nondual.parallel.layout import Layout, contiguous, of_lengths, zigzag
from nondual.parallel.places import RowPositions, shard_sequence
from nondual.parallel.ring import RingAttention, ring_attention
from nondual.parallel.training import parallel_token_loss, shard_tokens

__all__ = [
    "AllToAllAttention",
    "Layout",
    "Ranks",
    "RingAttention",
    "RowPositions",
    "Traffic",
    "all_to_all_attention",
    "contiguous",
    "of_lengths",
    "parallel_token_loss",
    "ranks_of",
    "ring_attention",
    "shard_sequence",
    "shard_tokens",
    "traffic",
    "zigzag",
]
