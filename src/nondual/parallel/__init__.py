"""One sequence over several devices, on torch.distributed: attention round a ring or over heads, scans passed on.

ring        attention in which keys and values go round a ring of ranks: causal, windows, packed documents
all_to_all  attention in which every rank trades rows for heads
layout      which rank holds which positions: contiguous, zig-zag, or of given lengths
scan        selective scan, SSD and linear attention, each rank its part of time
passed_on   a state that each rank changes and passes on
end_state   what a part of a sequence makes of the state before it
history     the rows before a rank's first one, which a convolution reads
mixers      a model of mixers that hand on a state becomes that of a rank
places      a language model made for one device becomes that of a rank
training    a rank's part of a batch, and a loss over the tokens of all ranks
cost        bytes that a rank sends, its multiply-adds, and a model of the time they take
demo        what each rank of this machine held, sent and got right: torchrun … -m nondual.parallel.demo
exchange    what ranks send one another, counted, checked by all alike, with a limit to every wait
"""

from nondual.parallel.all_to_all import AllToAllAttention, all_to_all_attention
from nondual.parallel.exchange import Ranks, Traffic, ranks_of, traffic
from nondual.parallel.history import rows_before
from nondual.parallel.layout import Layout, contiguous, of_lengths, zigzag
from nondual.parallel.mixers import shard_time
from nondual.parallel.passed_on import pass_on
from nondual.parallel.places import RowPositions, shard_sequence
from nondual.parallel.ring import RingAttention, ring_attention
from nondual.parallel.scan import parallel_linear_attention, parallel_selective_scan, parallel_ssd
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
    "parallel_linear_attention",
    "parallel_selective_scan",
    "parallel_ssd",
    "parallel_token_loss",
    "pass_on",
    "ranks_of",
    "ring_attention",
    "rows_before",
    "shard_sequence",
    "shard_time",
    "shard_tokens",
    "traffic",
    "zigzag",
]
