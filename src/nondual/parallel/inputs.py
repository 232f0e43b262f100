"""What ranks give to attention over a sequence that is cut: checked by all of them alike, before anything is sent.

Symbols: P ranks, N positions of the whole sequence, n of them on this rank; B batch, H query heads, G key/value heads,
D head width, Dv width of the values.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from nondual.ops.attention import check_qkv
from nondual.ops.autocast import as_autocast_does
from nondual.ops.checks import check_tensors
from nondual.ops.impl import refuses_transforms
from nondual.parallel.exchange import Ranks, compared, ranks_of
from nondual.parallel.layout import Layout

dist = torch.distributed

Placing: TypeAlias = Layout | Callable[[int, int], Layout]
"""A layout, or a function of N and P that gives it, such as `zigzag`, for lengths that change from call to call."""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class SharedByCopies:
    """What never changes, and is the same object in a deep copy of a model: a process group cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class OverRanks(SharedByCopies):
    """What joins this rank's queries to the keys of all ranks, in a `MultiHeadAttention`."""

    def refuses_positions(self, positions: object) -> str | None:
        """Why these positions would turn rows by their places on this rank, and be wrong; None where they do not.

        Args:
            positions: those of the module.
        """
        if getattr(positions, "layout", None) is not None:
            return None
        name = type(positions).__name__
        return (
            f"positions must be RowPositions, for {type(self).__name__}, got {name}, which knows no places but those "
            "on this rank: give RowPositions(positions, layout), or let shard_sequence change the model"
        )


class Rows(NamedTuple):
    """This rank's rows of q, k and v, which fit together and fit those of the other ranks.

    Attributes:
        ranks: the group.
        layout: of the whole sequence.
        q: (B, H, n, D).
        k: (B, G, n, D).
        v: (B, G, n, Dv).
    """

    ranks: Ranks
    layout: Layout
    q: Tensor
    k: Tensor
    v: Tensor


def checked_rows(
    call: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Placing,
    group: Any,
    *,
    options: Mapping[str, int | float | None],
    refuse: Callable[[Ranks], None] | None = None,
) -> Rows:
    """Check this rank's rows, and compare their sizes with those of the other ranks: one small collective.

    Under autocast the rows are cast before they are sent.

    Args:
        call: the name of the operation.
        q: queries (B, H, n, D).
        k: keys (B, G, n, D).
        v: values (B, G, n, Dv).
        layout: a `Layout`, or a function of N and P that gives it.
        group: as in `ranks_of`.
        options: what else has to be the same on every rank, by name: numbers, booleans or None.
        refuse: called with the ranks; it raises TypeError or ValueError where the operation cannot serve the call.

    Raises:
        TypeError: q, k or v is not a tensor, or layout neither a Layout nor a function.
        ValueError: on every rank alike: rows that do not fit together, or differ between ranks in more than their
            number; a number of rows that is not the layout's.
        RuntimeError: no process group, or a rank does not answer.
    """
    ranks = ranks_of(group)
    given: list[Tensor] = []

    def check() -> dict[str, int]:
        if refuse is not None:
            refuse(ranks)
        check_tensors({"q": q, "k": k, "v": v})
        if not isinstance(layout, Layout) and not callable(layout):
            raise TypeError(f"layout must be a Layout or a function such as zigzag, got {type(layout).__name__}")
        given.extend(as_autocast_does(q, k, v))
        check_qkv(*given)
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k and v must have q's {q.shape[2]} rows, those of this rank, got {k.shape[2]}")
        if v.shape[-1] == 0:
            raise ValueError("v must have a width of 1 or more, got 0")
        if given[0].dtype not in _DTYPES:
            raise ValueError(f"q must be float64, float32, float16 or bfloat16, got {given[0].dtype}")
        if q.device.type != device_of(ranks, q).type:
            raise ValueError(f"q must be on a GPU for the backend nccl, got {q.device}")
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        return {
            "batch size": q.shape[0],
            "number of query heads": q.shape[1],
            "number of key/value heads": k.shape[1],
            "head width": q.shape[3],
            "value width": v.shape[3],
            "rows": q.shape[2],
            "dtype (its place in float64, float32, float16, bfloat16)": _DTYPES.index(given[0].dtype),
            "need of gradients": int(learning),
            "layout (a checksum)": zlib.crc32(repr(layout).encode()) if isinstance(layout, Layout) else -1,
            **{name: _number(value) for name, value in options.items()},
        }

    sizes = compared(ranks, call, check, device_of(ranks, q), may_differ=("rows",))
    rows = tuple(of_rank["rows"] for of_rank in sizes)
    whole = layout_of(layout, sum(rows), ranks.size)
    if whole.lengths != rows:
        raise ValueError(
            f"{call}: the ranks must hold the layout's {list(whole.lengths)} rows, got {list(rows)} on ranks 0 to "
            f"{ranks.size - 1}; layout.shard(x, rank) cuts them"
        )
    return Rows(ranks, whole, *given)


def layout_of(layout: Placing, length: int, size: int) -> Layout:
    """The layout itself, or what a function gives for N and P.

    Args:
        layout: as in `checked_rows`.
        length: N.
        size: P.
    """
    return layout if isinstance(layout, Layout) else layout(length, size)


def device_of(ranks: Ranks, x: object) -> torch.device:
    """Where sizes are sent from: where x is, if the backend can send from there.

    Args:
        ranks: the group.
        x: what a rank was given, which may be no tensor.
    """
    if dist.get_backend(ranks.group) == "nccl" and not (isinstance(x, Tensor) and x.device.type == "cuda"):
        return torch.device("cuda")
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _number(x: int | float | None) -> int:
    """An integer that is the same for the same x alone; that of an integer of 0 or more is itself."""
    if x is None:
        return -1
    return struct.unpack("q", struct.pack("d", x))[0] if isinstance(x, float) else int(x)


def refuse_transforms(call: str, *xs: object) -> None:
    """Refuse forward-mode derivatives and the transforms of torch.func, which attention over ranks does not have.

    Args:
        call: the name of the operation.
        xs: what it was given, tensors or not.

    Raises:
        RuntimeError: one of them has a tangent or is transformed.
    """
    if why := refuses_transforms(*(x for x in xs if isinstance(x, Tensor))):
        raise RuntimeError(f"{call} {why}; on one device nondual.ops.flash_attention.flash_attention has them")


def refuse_options(call: str, mask: Tensor | None, dropout: float, return_weights: bool) -> None:
    """Refuse what `MultiHeadAttention` may ask of an op and attention over ranks does not take.

    Raises:
        ValueError: a mask, a dropout, or the weights.
    """
    if mask is not None:
        raise ValueError(
            f"mask must be None for {call}, which knows causal and window, got a mask: that is also what reset, and "
            "positions with a bias such as ALiBi, are made into"
        )
    if dropout:
        raise ValueError(f"dropout must be 0 for {call}, which keeps no weights to drop, got {dropout}")
    if return_weights:
        raise ValueError(f"return_weights must be False for {call}, which never forms the weights")
