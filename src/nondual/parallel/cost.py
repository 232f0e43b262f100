"""What one sequence over P ranks costs: bytes that a rank sends, multiply-adds, and a model of the time they take.

    ring_bytes          keys and values go round once; backward their gradients come home too
    all_to_all_bytes    rows are exchanged for heads, and back
    halo_bytes          only the keys that windows reach beyond a rank's own
    state_bytes         a recurrent state is passed on to the ranks after
    pairs               how many query-key pairs each rank computes with the keys of each
    ring_time, all_to_all_time, state_time    seconds on a link and a device that are given as numbers

Bytes and pairs are exact: tests compare them with what ranks count as they send (`nondual.parallel.traffic`). Times
are a model. It knows a link's peak rate, a wait for each message and a device's rate, and nothing of contention, of the
rest of a network, or of kernels that slow down on short pieces.

    Liu et al. 2023, Ring Attention (2310.01889), section 3: from which length on traffic hides behind compute
    Jacobs et al. 2023, DeepSpeed Ulysses (2309.14509), section 3.2: the volume of all-to-all
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from nondual.ops.dtypes import accumulation_dtype
from nondual.parallel.layout import Layout
from nondual.parallel.passed_on import by_doubling


@dataclass(frozen=True)
class Heads:
    """The heads of one layer, as (B, H, N, D) and (B, G, N, D) have them.

    Attributes:
        query: H, heads of queries.
        key: G, heads of keys and values; divides H.
        width: D, of a query and a key.
        value_width: of a value; None for D.
        batch: B.
        dtype: of what is sent; gradients that are summed on their way are in float32 or wider.

    Raises:
        ValueError: a size below 1, or a G that does not divide H.
        TypeError: a dtype that is not floating.
    """

    query: int
    key: int
    width: int
    value_width: int | None = None
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        sizes = self.query, self.key, self.width, self.of_value, self.batch
        if min(sizes) < 1:
            raise ValueError(f"heads, widths and batch must be 1 or more, got {sizes}")
        if self.query % self.key:
            raise ValueError(f"heads of keys must divide those of queries, got {self.key} and {self.query}")
        if not self.dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating one, got {self.dtype}")

    @property
    def of_value(self) -> int:
        """The width of a value."""
        return self.width if self.value_width is None else self.value_width

    @property
    def key_value_numbers(self) -> int:
        """Numbers in the keys and values of one position."""
        return self.batch * self.key * (self.width + self.of_value)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a number of a gradient that is summed on its way."""
        return accumulation_dtype(self.dtype).itemsize


class Sent(NamedTuple):
    """Bytes that one rank sends to others.

    Attributes:
        forward: in the forward pass.
        backward: in the backward pass.
    """

    forward: int
    backward: int


# --- bytes ---------------------------------------------------------------------------------------------------------


def ring_bytes(heads: Heads, layout: Layout, rank: int) -> Sent:
    """What a rank sends in ring attention. It does not fall with P.

    Keys and values take P - 1 steps, forward and again backward: a rank sends its own block first and then each that it
    was sent, but the last. The gradients of a block take P steps, and so all blocks' gradients pass through each rank.

    Args:
        heads: their sizes.
        layout: which rank holds what; causal or not, all blocks go round.
        rank: 0 to P - 1.

    Raises:
        ValueError: a rank that is out of range.
    """
    _check_rank(layout, rank)
    if layout.size == 1:
        return Sent(0, 0)
    onward = layout.length - layout.lengths[(rank + 1) % layout.size]
    there = onward * heads.key_value_numbers * heads.dtype.itemsize
    return Sent(there, there + layout.length * heads.key_value_numbers * heads.gradient_bytes)


def all_to_all_bytes(heads: Heads, layout: Layout, rank: int) -> Sent:
    """What a rank sends in all-to-all attention. With equal parts it falls as 1/P.

    Each rank has H/P heads of the whole sequence in the middle: of its own rows it sends the other heads' queries, keys
    and values, and of the outputs of its heads the other ranks' rows. Backward the same two exchanges run in reverse.
    Key heads that the ranks do not divide are repeated before they are sent, to the least common multiple of G and P.

    Args:
        heads: their sizes.
        layout: which rank holds what.
        rank: 0 to P - 1.

    Raises:
        ValueError: P does not divide the heads of queries, or a rank is out of range.
    """
    _check_rank(layout, rank)
    size, of = layout.size, heads.dtype.itemsize
    if heads.query % size:
        raise ValueError(
            f"the number of ranks must divide the heads of queries, got {size} ranks and {heads.query} heads: "
            "take fewer ranks, or ring attention"
        )
    own, others = layout.lengths[rank], layout.length - layout.lengths[rank]
    repeated = size // math.gcd(heads.key, size)
    # numbers at one position
    inputs = heads.batch * heads.query * heads.width + heads.key_value_numbers * repeated
    outputs = heads.batch * heads.query * heads.of_value
    forward = own * inputs * (size - 1) // size + others * outputs // size
    backward = own * outputs * (size - 1) // size + others * inputs // size
    return Sent(forward * of, backward * of)


def halo_bytes(heads: Heads, layout: Layout, rank: int, window: int) -> Sent:
    """What a rank sends in causal attention with a window: only keys in reach travel, and backward their gradients.

    A window of N or more masks nothing, and the ring runs as without one.

    Args:
        heads: their sizes.
        layout: which rank holds what.
        rank: 0 to P - 1.
        window: W, how many keys a query sees, its own included.

    Raises:
        ValueError: a window below 1, or a rank that is out of range.
    """
    _check_rank(layout, rank)
    if window < 1:
        raise ValueError(f"window must be 1 or more, got {window}")
    if window >= layout.length:
        return ring_bytes(heads, layout, rank)
    ranks = range(layout.size)
    sends = sum(_reached(layout, other, rank, window) for other in ranks if other != rank)
    returns = sum(_reached(layout, rank, other, window) for other in ranks if other != rank)
    of_position = heads.key_value_numbers * heads.dtype.itemsize
    return Sent(sends * of_position, returns * of_position)


def _reached(layout: Layout, of_queries: int, of_keys: int, window: int) -> int:
    """How many keys of one rank the queries of another see: where windows overlap a key is counted once."""
    rows = 0
    for keys in layout.pieces[of_keys]:
        end = keys.start  # the keys before it are counted
        for queries in sorted(filter(len, layout.pieces[of_queries]), key=lambda piece: piece.start):
            start, stop = max(end, queries.start - window + 1), min(keys.stop, queries.stop)
            rows += max(0, stop - start)
            end = max(end, stop)
    return rows


def state_bytes(state: int, decay: int, size: int, rank: int, *, dtype: torch.dtype = torch.float32) -> Sent:
    """What a rank sends where a recurrent state is passed along the ranks. It does not grow with the sequence.

    As in `nondual.parallel.passed_on`: each step goes directly to all later ranks, or in ceil(log2 P) rounds to one of
    them. A step that begins with the sequence is sent without its decay. Backward the ranks are in reverse order.

    Args:
        state: numbers in a state, for linear attention B H D D_v.
        decay: numbers in what a state is multiplied by, for one gate a head B H.
        size: P, the ranks.
        rank: 0 to P - 1.
        dtype: of the state.

    Raises:
        ValueError: a number that is negative, no ranks, or a rank that is out of range.
    """
    if state < 0 or decay < 0 or size < 1 or not 0 <= rank < size:
        raise ValueError(
            "state and decay must be 0 or more, size 1 or more, and rank 0 to size - 1, "
            f"got {state}, {decay}, {size} and {rank}"
        )
    of = dtype.itemsize

    def sent(place: int) -> int:
        if not by_doubling(size, state * of, decay * of):
            return (size - 1 - place) * (state + decay * (place > 0)) * of
        spans = [2**k for k in range(size.bit_length()) if place + 2**k < size]
        return sum(state + decay * (place >= span) for span in spans) * of

    return Sent(sent(rank), sent(size - 1 - rank))


# --- work ----------------------------------------------------------------------------------------------------------


def pairs(layout: Layout, *, causal: bool = True, window: int | None = None) -> Int[Tensor, "p p"]:
    """How many query-key pairs there are between the queries of one rank and the keys of another.

    Args:
        layout: which rank holds what.
        causal: a query sees no later key.
        window: W, with causal: the last W keys only, a query's own included.

    Returns:
        Row r, column s: pairs of rank r's queries with rank s's keys. In step t of a ring rank r computes those of
        column r - t (modulo P). One pair costs D + D_v multiply-adds for each head.

    Raises:
        ValueError: a window below 1, or one without causality.
    """
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window must be 1 or more, with causal=True, got {window} with causal={causal}")
    if not causal:
        lengths = torch.tensor(layout.lengths)
        return lengths[:, None] * lengths
    most = max((len(of_rank) for of_rank in layout.pieces), default=0)
    padded = [[*of_rank, *[range(0)] * (most - len(of_rank))] for of_rank in layout.pieces]
    start = torch.tensor([[piece.start for piece in of_rank] for of_rank in padded]).view(layout.size, most)
    stop = torch.tensor([[piece.stop for piece in of_rank] for of_rank in padded]).view(layout.size, most)
    found = torch.zeros(layout.size, layout.size, dtype=torch.int64)
    for i in range(most):
        for j in range(most):
            bounds = start[:, None, i], stop[:, None, i], start[None, :, j], stop[None, :, j]
            found += _not_after(*bounds, back=0)
            if window is not None:
                found -= _not_after(*bounds, back=window)
    return found


def _not_after(a: Tensor, b: Tensor, c: Tensor, d: Tensor, back: int) -> Tensor:
    """Pairs of i in [a, b) and j in [c, d) with j <= i - back."""

    def up_to(rows: Tensor) -> Tensor:  # the sum of min(t, d - c) for t from 1 to rows
        rising = rows.clamp(min=0).minimum(d - c)
        return rising * (rising + 1) // 2 + (rows.clamp(min=0) - rising) * (d - c)

    return up_to(b - back - c) - up_to(a - back - c)


def multiply_adds(heads: Heads, pairs: int, *, backward: bool = False) -> int:
    """Multiply-adds of attention over so many query-key pairs, in all heads of a batch.

    Forward two products (scores, outputs); backward five, since the scores are computed again.

    Args:
        heads: their sizes.
        pairs: of a query and a key, as `pairs` counts them.
        backward: of the backward pass instead.
    """
    of_pair = 3 * heads.width + 2 * heads.of_value if backward else heads.width + heads.of_value
    return heads.batch * heads.query * of_pair * pairs


# --- time ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """What ranks send over.

    Attributes:
        name: for a figure.
        bandwidth: bytes a second that one device sends while it receives as many.
        latency: seconds that each message waits besides.
        source: where the numbers are from.

    Raises:
        ValueError: a bandwidth that is not positive, or a negative latency.
    """

    name: str
    bandwidth: float
    latency: float
    source: str = ""

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise ValueError(f"bandwidth must be positive and latency 0 or more, got {self.bandwidth}, {self.latency}")


_WAIT = "latency: NCCL's own table for a step of a ring, src/graph/tuning.cc at 01afd20 (Simple)"
LINKS = (
    Link("NVLink 4", 450e9, 3.4e-6, f"peak: NVIDIA, H100 data sheet, 900 GB/s a GPU, half of it each way; {_WAIT}"),
    Link("InfiniBand NDR", 50e9, 9.6e-6, f"peak: NVIDIA, ConnectX-7 manual, 400 Gb/s a port; {_WAIT}"),
    Link("100 Gb Ethernet", 12.5e9, 9.6e-6, f"peak: the standard's line rate, 100 Gb/s; {_WAIT}, for any network"),
)
"""Three links, fastest first, one of each for every device. Peaks are the vendors', and no program reaches them."""


class Seconds(NamedTuple):
    """A model's time of one pass through one layer's attention or scan.

    Attributes:
        total: from the first rank's start to the last rank's end.
        compute: what it would be if sending took no time.
        traffic: what sending alone takes, without latency.
        latency: the waits of messages.
    """

    total: float
    compute: float
    traffic: float
    latency: float


def ring_time(
    heads: Heads, layout: Layout, link: Link, rate: float, *, causal: bool = True, backward: bool = False
) -> Seconds:
    """Seconds of ring attention: in each step the longer of computing and sending, and one message's wait.

    All ranks begin a step together, so that the rank with the most pairs and the largest block set its pace.

    Args:
        heads: their sizes.
        layout: which rank holds what.
        link: what ranks send over.
        rate: floating-point operations a second of one device, two for a multiply-add.
        causal: a query sees no later key; blocks with nothing to compute are passed on.
        backward: of the backward pass instead.

    Raises:
        ValueError: a rate that is not positive.
    """
    _check_rate(rate)
    size, most = layout.size, _most_pairs(layout, causal)
    work = [2 * multiply_adds(heads, count, backward=backward) / rate for count in most]
    block = max(layout.lengths) * heads.key_value_numbers / link.bandwidth  # seconds for each byte of a number
    there = block * heads.dtype.itemsize
    sending = [there] * (size - 1) + [0.0]
    if backward and size > 1:  # the gradients that one step has added to are sent during the next; at last, home
        home = block * heads.gradient_bytes
        sending = [there, *[there + home] * (size - 2), home, home]
        work.append(0.0)
    waits = sum(seconds > 0 for seconds in sending) * link.latency
    return Seconds(sum(map(max, work, sending)) + waits, sum(work), sum(sending), waits)


@lru_cache(maxsize=32)  # a figure asks for several links
def _most_pairs(layout: Layout, causal: bool) -> tuple[int, ...]:
    """For each step of a ring, the pairs of the rank that computes most."""
    table, ranks = pairs(layout, causal=causal), torch.arange(layout.size)
    return tuple(int(table[ranks, (ranks - step) % layout.size].max()) for step in range(layout.size))


def all_to_all_time(
    heads: Heads, layout: Layout, link: Link, rate: float, *, causal: bool = True, backward: bool = False
) -> Seconds:
    """Seconds of all-to-all attention: an exchange, the attention of H/P heads over all positions, an exchange back.

    Nothing is computed while rows travel. The messages of an exchange go at once, and wait once.

    Args:
        heads: their sizes.
        layout: which rank holds what.
        link: what ranks send over.
        rate: floating-point operations a second of one device, two for a multiply-add.
        causal: a query sees no later key.
        backward: of the backward pass instead.

    Raises:
        ValueError: a rate that is not positive, or P does not divide the heads of queries.
    """
    _check_rate(rate)
    size, n = layout.size, layout.length
    count = n * (n + 1) // 2 if causal else n * n
    work = 2 * multiply_adds(heads, count, backward=backward) / size / rate
    sent = max(all_to_all_bytes(heads, layout, rank)[int(backward)] for rank in range(size))
    waits = 2 * link.latency if size > 1 else 0.0
    return Seconds(work + sent / link.bandwidth + waits, work, sent / link.bandwidth, waits)


def state_time(
    state: int, decay: int, size: int, link: Link, *, compute: float = 0.0, dtype: torch.dtype = torch.float32
) -> Seconds:
    """Seconds of a scan: a rank's own part, and then the states, for which nothing is computed meanwhile.

    Args:
        state: numbers in a state.
        decay: numbers in what a state is multiplied by.
        size: P, the ranks.
        link: what ranks send over.
        compute: seconds that a rank's own part takes.
        dtype: of the state.

    Raises:
        ValueError: as in `state_bytes`.
    """
    sent = max(state_bytes(state, decay, size, rank, dtype=dtype).forward for rank in range(max(size, 1)))
    doubling = by_doubling(size, state * dtype.itemsize, decay * dtype.itemsize)
    messages = (size - 1).bit_length() if doubling else size - 1
    traffic, waits = sent / link.bandwidth, messages * link.latency
    return Seconds(compute + traffic + waits, compute, traffic, waits)


def _check_rank(layout: Layout, rank: int) -> None:
    if not 0 <= rank < layout.size:
        raise ValueError(f"rank must be 0 to {layout.size - 1}, got {rank}")


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise ValueError(f"rate must be positive, in operations a second, got {rate}")
