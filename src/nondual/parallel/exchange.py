"""What the ranks of a group tell and send one another: checked by all of them alike, counted in bytes, never for ever.

    ranks_of       the group that is meant, this process's rank in it, and how many there are
    compared       before anything is sent every rank tells its sizes; what does not fit is one error on every rank
    exchange       tensors to some ranks and from others, at the same time; returns before they have arrived
    traffic        a count of the bytes that this rank sends

A wait ends with the group's own timeout (`torch.distributed.init_process_group(timeout=...)`), or at once where the
backend sees that the other side is gone; the error names the rank that does not answer. (Under NCCL a wait holds up the
GPU's stream and not the program: there torch's watchdog ends the job.)
"""

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

dist = torch.distributed

MOST = 30  # how many numbers a rank can tell the others before a call
ROLL_CALL = 3.0  # seconds in which a rank that lives says so, after one was lost


F = TypeVar("F", bound=Callable)


def not_compiled(function: F) -> F:
    """Make a compiled model have a break at this function: what ranks tell one another is read on the host.

    The same as torch.compiler.disable, which would take two seconds as it is imported.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return cast("F", call)


class Ranks(NamedTuple):
    """A group of processes, each of them a rank.

    Attributes:
        group: torch's process group.
        rank: this process's number in it, 0 to size - 1.
        size: P, how many there are.
    """

    group: Any
    rank: int
    size: int


def ranks_of(group: "torch.distributed.ProcessGroup | torch.distributed.device_mesh.DeviceMesh | None" = None) -> Ranks:
    """The group that is meant, and this process's place in it.

    Args:
        group: a process group, a mesh of one dimension (`mesh["sequence"]`), or None for all processes of the job.

    Raises:
        RuntimeError: no process group has been made.
        TypeError: group is none of these.
        ValueError: a mesh of several dimensions, or a group that this process does not belong to.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "a process group must be made first: start the program with torchrun, and call "
            'torch.distributed.init_process_group("gloo") in it ("nccl" on GPUs)'
        )
    chosen: Any = dist.group.WORLD if group is None else group
    if isinstance(chosen, dist.device_mesh.DeviceMesh):
        if chosen.ndim != 1:
            raise ValueError(
                f"group must be a mesh of one dimension, got one of {chosen.ndim}, {chosen.mesh_dim_names}: "
                'take the one along which the sequence is cut, such as mesh["sequence"]'
            )
        chosen = chosen.get_group()
    if chosen is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this process belongs to, got one of others")
    if not isinstance(chosen, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {type(chosen).__name__}")
    rank = dist.get_rank(chosen)
    if rank < 0:
        raise ValueError("group must be one that this process belongs to, got one of others")
    return Ranks(chosen, rank, dist.get_world_size(chosen))


# --- before anything is sent ---------------------------------------------------------------------------------------


def compared(
    ranks: Ranks,
    call: str,
    check: Callable[[], Mapping[str, int]],
    device: torch.device | str,
    may_differ: Collection[str] = (),
) -> list[dict[str, int]]:
    """Every rank checks what it was given and tells the others its sizes. One small collective.

    Args:
        ranks: the group. Every rank of it has to make the call.
        call: the name of the operation, the same on every rank.
        check: checks what this rank was given, and returns its sizes by name, the same names on every rank.
        device: where the backend can send from: a GPU for NCCL.
        may_differ: the names whose numbers may differ between ranks.

    Returns:
        The sizes of every rank, in the order of ranks.

    Raises:
        ValueError: on every rank alike: a rank refused what it was given, made another call, or gave another size.
        TypeError: on the rank that was given what its check refuses with one; on the others that is a ValueError.
        RuntimeError: a rank does not answer.
    """
    refused: Exception | None = None
    mine: dict[str, int] = {}
    try:
        mine = dict(check())
    except (TypeError, ValueError) as error:
        if ranks.size == 1:
            raise
        refused = error
    if ranks.size == 1:
        return [mine]
    if len(mine) > MOST:
        raise ValueError(f"a rank must tell at most {MOST} sizes, got {len(mine)}")
    told = [int(refused is not None), zlib.crc32(" ".join((call, *sorted(mine))).encode()), *map(int, mine.values())]
    own = torch.tensor(told + [0] * (MOST + 2 - len(told)), device=device)
    everyone = [torch.empty_like(own) for _ in range(ranks.size)]
    with naming_the_lost(ranks, call):
        dist.all_gather(everyone, own, group=ranks.group)
    numbers = [one.tolist() for one in everyone]
    if any(failed for failed, *_ in numbers):
        texts: list[Any] = [None] * ranks.size
        with naming_the_lost(ranks, call):
            dist.all_gather_object(texts, str(refused) if refused else None, group=ranks.group)
        if refused is not None:
            raise refused
        raise ValueError("; ".join(f"{call} on rank {r}: {text}" for r, text in enumerate(texts) if text is not None))
    if len({name for _, name, *_ in numbers}) > 1:
        raise ValueError(f"every rank must call {call} with arguments of the same kinds, and one of them does not")
    sizes = [dict(zip(mine, of_rank[2:])) for of_rank in numbers]
    for name in mine:
        given = [of_rank[name] for of_rank in sizes]
        if name not in may_differ and len(set(given)) > 1:
            raise ValueError(
                f"{call} must have the same {name} on every rank, got {given} on ranks 0 to {ranks.size - 1}"
            )
    return sizes


# --- sending -------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What this rank has sent since the count began.

    Attributes:
        bytes: of tensors, without the few that `compared` sends.
        messages: how many tensors.
    """

    bytes: int = 0
    messages: int = 0

    def add(self, x: Tensor) -> None:
        """Count one tensor that goes to one rank."""
        self.bytes += x.numel() * x.element_size()
        self.messages += 1


_counts: list[Traffic] = []


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this process sends within the block, in backward passes too."""
    count = Traffic()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


def note_sent(x: Tensor) -> None:
    """Count a tensor that goes to one other rank."""
    for count in _counts:
        count.add(x)


class Pending(NamedTuple):
    """Tensors under way.

    Attributes:
        ranks: the group.
        what: what they are, for an error.
        works: torch's handles of sends and receives, each with the rank on the other side where there is one.
        received: what they arrive in, and the tensors that a rank sends itself.
    """

    ranks: Ranks
    what: str
    works: list[tuple[Any, int | None]]
    received: list[Tensor]

    def arrived(self) -> list[Tensor]:
        """The tensors, in the order in which they were asked for, once they are there.

        Raises:
            RuntimeError: a rank does not answer.
        """
        for work, other in self.works:
            with naming_the_lost(self.ranks, self.what, other):
                work.wait()
        return self.received


def exchange(
    ranks: Ranks, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]], what: str
) -> Pending:
    """Send tensors to ranks and receive others from ranks, all at the same time. Returns at once.

    What passes between two ranks arrives in the order in which it was sent. Tensors without elements are not sent; what
    a rank sends to itself is copied.

    Args:
        ranks: the group.
        sends: (to which rank, tensor).
        receives: (from which rank, an empty tensor of the shape, dtype and device of what will arrive).
        what: what is sent, for an error.

    Raises:
        RuntimeError: a rank does not answer.
    """
    own = [x for to, x in sends if to == ranks.rank]
    calls: list[tuple[int, Any]] = []  # the rank on the other side, and what is to be done
    for to, x in sends:
        if to != ranks.rank and x.numel():
            x = x.contiguous()
            note_sent(x)
            calls.append((to, dist.P2POp(dist.isend, x, _global(ranks, to), group=ranks.group)))
    for source, into in receives:
        if source == ranks.rank:
            into.copy_(own.pop(0))
        elif into.numel():
            calls.append((source, dist.P2POp(dist.irecv, into, _global(ranks, source), group=ranks.group)))
    works = []
    # NCCL has to start them together. gloo starts them in turn, and so can say which of them failed.
    apart = dist.get_backend(ranks.group) == "gloo"
    for batch in [[call] for call in calls] if apart else [calls] if calls else []:
        other = batch[0][0] if len(batch) == 1 else None
        with naming_the_lost(ranks, what, other):
            works += [(work, other) for work in dist.batch_isend_irecv([call for _, call in batch])]
    return Pending(ranks, what, works, [into for _, into in receives])


def _global(ranks: Ranks, rank: int) -> int:
    return dist.get_global_rank(ranks.group, rank)


# --- a rank that is lost -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_the_lost(ranks: Ranks, what: str, other: int | None = None) -> Iterator[None]:
    """Turn the backend's error into one that names the rank that does not answer.

    Every rank that lives writes so into the job's store when its own wait fails, and the first few seconds show who
    does not. In a ring, ranks far from the lost one still wait then, until their neighbours end, and are not lost. So
    where the rank on the other side of a send or receive does not answer, it is named alone, and the store is told: of
    several that do not answer, the others name those of which the store was told.

    Args:
        ranks: the group.
        what: what the block does, for the error.
        other: the rank on the other side of a send or a receive.

    Raises:
        RuntimeError: a send, a receive or a collective within the block failed.
    """
    try:
        yield
    except RuntimeError as error:
        missing = _who_does_not_answer(ranks, other)
        names = "a rank" if not missing else ", ".join(f"rank {rank}" for rank in missing)
        reason = str(error).splitlines()[0][:200]
        raise RuntimeError(
            f"{what}: {names} does not answer (rank {ranks.rank} of {ranks.size} was told: {reason})"
        ) from error


def _who_does_not_answer(ranks: Ranks, other: int | None) -> list[int]:
    """The ranks that do not say that they live; none where the store has gone with them."""
    numbers = [_global(ranks, rank) for rank in range(ranks.size)]
    lives, lost = "nondual/lives/{}".format, "nondual/lost/{}".format
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(lives(numbers[ranks.rank]), "yes")
        end = time.monotonic() + ROLL_CALL
        while True:
            missing = [rank for rank, number in enumerate(numbers) if not store.check([lives(number)])]
            if not missing or time.monotonic() > end:
                break
            time.sleep(0.05)
        if other in missing:
            store.set(lost(numbers[other]), "yes")
        return [rank for rank in missing if store.check([lost(numbers[rank])])] or missing
    except (RuntimeError, ValueError, AttributeError):
        return []
