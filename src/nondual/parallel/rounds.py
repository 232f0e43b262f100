"""The two rounds of keys and values past the queries of all ranks: forward, and backward with their gradients.

    step 0    rank r attends to its own keys and values, while they are sent on to rank r + 1
    step t    to those of rank r - t, which have just arrived, while they are sent on
    step P-1  to those of rank r + 1, the last ones; nothing more is sent

What is known after each step is a softmax over the keys so far, and its log-sum-exp: the next step's is added to it
(`nondual.ops.flash_attention.partial`). Backward the keys and values go round once more. The gradient of a block goes
with it, each rank adds what its queries give, and one step more brings it home. A rank holds its own rows, two blocks
of keys and values (one in use, one that arrives), and backward the gradients of three: one that is sent, one that
arrives, and one that is computed.

Source and symbols as in `nondual.parallel.ring`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nondual.ops.autocast import without_autocast
from nondual.ops.flash_attention.partial import Partial, PartialEngine, add_, nothing
from nondual.parallel.exchange import Pending, Ranks, exchange
from nondual.parallel.pieces import Fragment, Pair, as_slice, pairs


def round_the_ring(q: Tensor, k: Tensor, v: Tensor, ring: "Ring") -> Tensor:
    """This rank's rows over the keys of all ranks, differentiable; `ring_attention` has checked the inputs.

    Args:
        q: this rank's queries (B, H, n, D).
        k: its keys (B, G, n, D).
        v: its values (B, G, n, Dv).
        ring: the rest.

    Returns:
        out (B, H, n, Dv) in q's dtype.

    Raises:
        RuntimeError: a rank does not answer; a second derivative.
    """
    return _RoundTheRing.apply(q, k, v, ring)


class Ring(NamedTuple):
    """All that the two rounds need besides tensors, alike on every rank.

    Attributes:
        ranks: the group.
        held: what each rank holds.
        lengths: how many rows each rank holds.
        causal: a query sees no later key.
        scale: factor on q · k.
        engine: what computes a part.
    """

    ranks: Ranks
    held: list[list[Fragment]]
    lengths: tuple[int, ...]
    causal: bool
    scale: float
    engine: PartialEngine

    def before(self, rank: int) -> int:
        """The rank that sends to this one."""
        return (rank - 1) % self.ranks.size

    def after(self, rank: int) -> int:
        """The rank that it sends to."""
        return (rank + 1) % self.ranks.size

    def pairs(self, source: int) -> list[Pair]:
        """What this rank computes with the keys of another."""
        return pairs(self.held[self.ranks.rank], self.held[source], self.causal)

    def pass_on(self, block: Sequence[Tensor], source: int) -> Pending:
        """Send what belongs to rank `source` one rank on, and ask for what belongs to the rank before it."""
        rows = self.lengths[self.before(source)]
        coming = [x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in block]
        to, source = self.after(self.ranks.rank), self.before(self.ranks.rank)
        return exchange(self.ranks, [(to, x) for x in block], [(source, x) for x in coming], "ring_attention")

    # --8<-- [start:round]
    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values of one rank after another, own ones first.

        While one is used the next is under way.
        """
        source, block = self.ranks.rank, [k.contiguous(), v.contiguous()]
        for step in range(self.ranks.size):
            last = step == self.ranks.size - 1
            under_way = None if last else self.pass_on(block, source)
            yield source, block[0], block[1]
            if under_way is not None:
                block, source = under_way.arrived(), self.before(source)

    # --8<-- [end:round]


# --8<-- [start:forward]
def forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """This rank's rows over the keys of all ranks."""
    whole = nothing(q, v)
    for source, k_s, v_s in ring.blocks(k, v):
        for pair in ring.pairs(source):
            rows, keys = as_slice(pair.rows), as_slice(pair.keys)
            own, given = q[:, :, rows], (k_s[:, :, keys], v_s[:, :, keys])
            part = ring.engine.forward(own, *given, pair.causal, ring.scale)
            add_(whole.rows(rows), part, ring.engine.unit)
    return whole


# --8<-- [end:forward]


# --8<-- [start:backward]
def backward(
    ring: Ring, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Partial, of_keys: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq of this rank's queries, and dk and dv of its keys from the queries of all ranks."""
    wide = whole.top.dtype
    dq = q.new_zeros(q.shape, dtype=wide)
    travelling: Pending | None = None
    for source, k_s, v_s in ring.blocks(k, v):
        block = [x.new_zeros(x.shape, dtype=wide) for x in (k_s, v_s)]  # dk and dv of these keys, from own queries
        for pair in ring.pairs(source):
            rows, keys = as_slice(pair.rows), as_slice(pair.keys)
            given = d_out[:, :, rows], q[:, :, rows], k_s[:, :, keys], v_s[:, :, keys], whole.rows(rows)
            dq_i, *of_block = ring.engine.backward(*given, pair.causal, ring.scale)
            dq[:, :, rows] += dq_i
            for total, added in zip(block, of_block):
                total[:, :, keys] += added
        if of_keys:
            for own, others in zip(block, travelling.arrived() if travelling is not None else ()):
                own += others  # those of the ranks that these keys have been to
            travelling = ring.pass_on(block, source)
    if travelling is None:
        return dq.to(q.dtype), None, None
    dk, dv = travelling.arrived()  # home
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# --8<-- [end:backward]


# --- as one operation with a gradient ------------------------------------------------------------------------------


class _RoundTheRing(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, ring):
        whole = forward(ring, q, k, v)
        out = whole.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, whole.top, whole.total)
        ctx.ring, ctx.of_keys = ring, any(ctx.needs_input_grad[1:3])
        return out

    @staticmethod
    def backward(ctx, d_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_RoundTheRingBackward.apply(d_out, *ctx.saved_tensors, ctx.ring, ctx.of_keys), None


class _RoundTheRingBackward(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, d_out, q, k, v, out, top, total, ring, of_keys):
        return backward(ring, d_out, q, k, v, Partial(out, top, total), of_keys)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("ring_attention has no second derivative; on one device nondual.ops.attention.attention has")
