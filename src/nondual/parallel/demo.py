"""One sequence over the ranks of this machine: what each rank held, sent and got right, in three ways.

    torchrun --nproc-per-node 2 -m nondual.parallel.demo

Ring attention, all-to-all attention, and linear attention whose state is passed on, all of the same queries, keys and
values, forward and backward. Every rank also computes the whole on its own device, and compares; bytes are counted as
they are sent, and compared with `nondual.parallel.cost`. It ends with an exit status of 1 where anything is not right.
With as many GPUs as ranks it runs over NCCL, otherwise over gloo on the CPU.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nondual.ops.flash_attention import flash_attention
from nondual.ops.linear_attention import linear_attention
from nondual.parallel.all_to_all import all_to_all_attention
from nondual.parallel.cost import Heads, Sent, all_to_all_bytes, ring_bytes, state_bytes
from nondual.parallel.exchange import Ranks, ranks_of, traffic
from nondual.parallel.layout import Layout, contiguous, zigzag
from nondual.parallel.ring import ring_attention
from nondual.parallel.scan import parallel_linear_attention

dist = torch.distributed

LENGTH = 1000
HEADS = Heads(query=12, key=4, width=32, dtype=torch.float64)
NEAR = 1e-9  # what a result may differ from one device's, in float64


class Way(NamedTuple):
    """One way to work on a sequence that is cut.

    Attributes:
        name: for the table.
        layout: which rank holds what.
        ours: of this rank's rows of the inputs, the output.
        one: of all rows, on one device.
        sent: the bytes that a rank sends by the formula.
        inputs: how many of q, k, v and the logarithms of the decays it takes.
    """

    name: str
    layout: Layout
    ours: Callable[..., Tensor]
    one: Callable[..., Tensor]
    sent: Callable[[int], Sent]
    inputs: int = 3


class Row(NamedTuple):
    """A line of the table: one rank in one way.

    Attributes:
        way: its name.
        rank: this one.
        rows: how many positions it held.
        held: bytes of its rows of the inputs.
        sent: bytes that it sent, counted.
        formula: bytes that it should have sent.
        output: the largest difference from one device in its rows of the output.
        gradient: the same for the gradients of its rows of the inputs.
    """

    way: str
    rank: int
    rows: int
    held: int
    sent: Sent
    formula: Sent
    output: float
    gradient: float


def ways(size: int) -> list[Way]:
    """The ways that P ranks can go: all-to-all only where they divide the heads.

    Args:
        size: P.
    """
    cut, in_order = zigzag(LENGTH, size), contiguous(LENGTH, size)
    state, decays = HEADS.batch * HEADS.query * HEADS.width * HEADS.of_value, HEADS.batch * HEADS.query

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=True)

    found = [
        Way(
            "ring attention",
            cut,
            lambda q, k, v: ring_attention(q, k, v, cut, causal=True),
            causal,
            lambda rank: ring_bytes(HEADS, cut, rank),
        )
    ]
    if HEADS.query % size == 0:
        found.append(
            Way(
                "all-to-all attention",
                cut,
                lambda q, k, v: all_to_all_attention(q, k, v, cut, causal=True),
                causal,
                lambda rank: all_to_all_bytes(HEADS, cut, rank),
            )
        )
    found.append(
        Way(
            "linear attention, state passed on",
            in_order,
            lambda q, k, v, decay: parallel_linear_attention(q, k, v, log_decay=decay)[0],
            lambda q, k, v, decay: linear_attention(q, k, v, log_decay=decay)[0],
            lambda rank: state_bytes(state, decays, size, rank, dtype=HEADS.dtype),
            inputs=4,
        )
    )
    return found


def measured(device: torch.device | str) -> list[Row]:
    """This rank's lines of the table.

    Args:
        device: where it computes.

    Raises:
        RuntimeError: no process group, or a rank does not answer.
    """
    ranks = ranks_of()
    given, gradient = drawn(device)
    return [_compared(way, ranks, given[: way.inputs], gradient) for way in ways(ranks.size)]


def drawn(device: torch.device | str) -> tuple[tuple[Tensor, ...], Tensor]:
    """The whole sequence's q, k, v and logarithms of decays, and a gradient of the output, the same at every call.

    Args:
        device: where they are.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        whole = torch.randn(HEADS.batch, heads, LENGTH, HEADS.width, generator=generator, dtype=HEADS.dtype)
        return whole.to(device)

    q, k, v, gradient = normal(HEADS.query), normal(HEADS.key), normal(HEADS.key), normal(HEADS.query)
    decay = -gradient[..., 0].exp()  # below 0
    return (q * HEADS.width**-0.5, k, v, decay), gradient


def _compared(way: Way, ranks: Ranks, given: Sequence[Tensor], gradient: Tensor) -> Row:
    """One way on this rank, beside one device."""
    whole = [x.detach().requires_grad_() for x in given]
    expected = way.one(*whole)
    expected_gradients = torch.autograd.grad(expected, whole, gradient)

    def part(x: Tensor) -> Tensor:
        return way.layout.shard(x.detach(), ranks.rank, dim=2)

    rows = [part(x).requires_grad_() for x in given]
    with traffic() as forward:
        out = way.ours(*rows)
    with traffic() as backward:
        gradients = torch.autograd.grad(out, rows, part(gradient))
    return Row(
        way=way.name,
        rank=ranks.rank,
        rows=out.shape[2],
        held=sum(x.numel() * x.element_size() for x in rows),
        sent=Sent(forward.bytes, backward.bytes),
        formula=way.sent(ranks.rank),
        output=_farthest([out], [part(expected)]),
        gradient=_farthest(gradients, [part(x) for x in expected_gradients]),
    )


def _farthest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference; NaN where there is one."""
    each = [(x - y).detach().abs().amax() for x, y in zip(ours, theirs) if x.numel()]
    return torch.stack(each).amax().item() if each else 0.0


# --- the table -------------------------------------------------------------------------------------------------------


def wrong(rows: Sequence[Row]) -> list[str]:
    """What is not right, a sentence each.

    Args:
        rows: of all ranks.
    """
    said = []
    for row in rows:
        if row.sent != row.formula:
            said.append(f"{row.way}: rank {row.rank} sent {tuple(row.sent)} bytes, by the formula {tuple(row.formula)}")
        if not (row.output <= NEAR and row.gradient <= NEAR):  # where there is a NaN, too
            said.append(
                f"{row.way}: rank {row.rank} differs from one device by {row.output:.1e} in the output and "
                f"{row.gradient:.1e} in gradients, more than {NEAR:.0e}"
            )
    return said


def table(rows: Sequence[Row]) -> str:
    """The lines, one under the other, with a head.

    Args:
        rows: in the order in which they are shown.
    """
    head = ("", "rank", "rows", "holds", "sends forward", "backward", "as the formula", "output off", "gradients off")
    cells = [head] + [
        (
            row.way if row.rank == 0 else "",
            str(row.rank),
            str(row.rows),
            f"{row.held:,}",
            f"{row.sent.forward:,}",
            f"{row.sent.backward:,}",
            "yes" if row.sent == row.formula else "no",
            f"{row.output:.1e}",
            f"{row.gradient:.1e}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(text.rjust(width) if i else text.ljust(width) for i, (text, width) in enumerate(zip(line, widths)))
        for line in cells
    )


def shown(mine: Sequence[Row], where: str) -> int:
    """Gather the lines of all ranks; rank 0 prints the table.

    Args:
        mine: this rank's lines, from `measured`.
        where: on what the ranks computed, for the head.

    Returns:
        0, or 1 on every rank where something is not right.

    Raises:
        RuntimeError: no process group, or a rank does not answer.
    """
    ranks = ranks_of()
    gathered: list[Any] = [None] * ranks.size
    dist.all_gather_object(gathered, list(mine), group=ranks.group)
    rows = [row for of_way in zip(*gathered) for row in of_way]
    faults = wrong(rows)
    if ranks.rank == 0:
        print(
            f"one sequence of {LENGTH} positions over {ranks.size} {'rank' if ranks.size == 1 else 'ranks'}, by "
            f"{dist.get_backend(ranks.group)} on {where}, in "
            f"{str(HEADS.dtype).removeprefix('torch.')}: {HEADS.query} heads of queries, {HEADS.key} of keys and "
            f"values, {HEADS.width} wide\nholds and sends: bytes; off: the largest difference from one device\n\n"
            f"{table(rows)}\n"
        )
        if HEADS.query % ranks.size:
            print(f"all-to-all attention is left out: {ranks.size} ranks do not divide {HEADS.query} heads")
        print(f"everything is right, to {NEAR:.0e}" if not faults else "not right:\n" + "\n".join(faults), flush=True)
    return int(bool(faults))


def main() -> int:
    """Make the process group that torchrun has told of, and show the table.

    Returns:
        The exit status: 0, 1 where something is not right, 2 where it was not started by torchrun.
    """
    if "RANK" not in os.environ:
        print("start it with: torchrun --nproc-per-node 2 -m nondual.parallel.demo", file=sys.stderr)
        return 2
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = dist.is_nccl_available() and torch.cuda.device_count() >= size
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(seconds=60))
    try:
        return shown(measured(device), device.type)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
