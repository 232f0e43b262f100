"""One sequence over several devices, on torch.distributed: attention round a ring or over heads, scans passed on.

layout      which rank holds which positions: contiguous, zig-zag, or of given lengths
exchange    what ranks send one another, counted, checked by all alike, with a limit to every wait
"""

from nondual.parallel.exchange import Ranks, Traffic, ranks_of, traffic
from nondual.parallel.layout import Layout, contiguous, of_lengths, zigzag

__all__ = [
    "Layout",
    "Ranks",
    "Traffic",
    "contiguous",
    "of_lengths",
    "ranks_of",
    "traffic",
    "zigzag",
]
