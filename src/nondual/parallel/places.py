"""A language model made for one device becomes that of a rank: its rows stand where the layout says, and not at 0 to n.

    model = GPT(256, 64, 4, 4, positions=Rotary(16))                 # or one with pretrained weights
    shard_sequence(model, zigzag, op=RingAttention)
    scores = model(layout.shard(ids, rank, dim=1))                   # (B, n, V), of this rank's rows

Without it a rank would count its first row as place 0. Its parameters keep their names, so that a checkpoint serves one
device and many alike. Positions with a bias (ALiBi, T5) are a mask, which attention over ranks does not take.

Symbols: P ranks, N positions of the whole sequence, n of them on this rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.efficient_attention.flash_attention import FlashAttention
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.ops.checks import check_tensors
from nondual.parallel.exchange import compared, not_compiled, ranks_of
from nondual.parallel.inputs import Placing, SharedByCopies, device_of
from nondual.parallel.layout import Layout
from nondual.positional_encoding import AddedPositions
from nondual.relative_positions import RelativePositions
from nondual.self_attention import MultiHeadAttention


def shard_sequence(
    model: CausalLM, layout: Placing, group: Any = None, *, op: Callable[..., Callable[..., Any]]
) -> CausalLM:
    """Let a model read this rank's rows of a sequence, in place: attention over all ranks, positions by the layout.

    To be called on every rank, before the model is compiled or given to DDP or `fully_shard`. Generation with a cache
    is for one device.

    Args:
        model: a `CausalLM`, such as `GPT`, each of whose mixers is a `MultiHeadAttention` over plain or flash
            attention; a window and a scale are kept.
        layout: which rank holds which positions: a `Layout`, or a function of N and P that gives it, such as `zigzag`.
            With a function the ranks tell each other their lengths at every call, which costs small messages.
        group: the ranks: a process group, a mesh of one dimension, or None for all.
        op: `RingAttention` or `AllToAllAttention`: called with layout, group, window= and scale=, it gives what joins
            queries, keys and values.

    Returns:
        The same model.

    Raises:
        TypeError: a model that is no CausalLM.
        ValueError: another mixer, another op than those, or positions with a bias; nothing has been changed then.
        RuntimeError: no process group.
    """
    ranks_of(group)
    if not isinstance(model, CausalLM):
        raise TypeError(f"model must be a CausalLM, such as GPT, got {type(model).__name__}")
    changes: list[Callable[[], object]] = []
    for i, layer in enumerate(model.layers):
        mixer = cast(Any, layer).mixer
        if not isinstance(mixer, MultiHeadAttention):
            raise ValueError(
                f"layer {i} must have MultiHeadAttention as its mixer, got {type(mixer).__name__}: a model "
                "whose mixers hand on a state takes nondual.parallel.shard_time"
            )
        joins = op(layout, group, **_options(i, mixer.op))
        changes.append(partial(setattr, mixer, "op", joins))
        if mixer.positions is not None:
            changes.append(partial(setattr, mixer, "positions", RowPositions(mixer.positions, layout, group)))
    if model.positions is not None:
        vectors = _RowVectors(layout, group)
        changes.append(partial(model.positions.register_forward_hook, vectors, with_kwargs=True))
    for change in changes:
        change()
    return model


def _options(i: int, op: object) -> dict[str, Any]:
    """The window and the scale of plain or flash attention."""
    if op is attention:
        return {"window": None, "scale": None}
    if isinstance(op, FlashAttention):
        return {"window": op.window, "scale": op.scale}
    raise ValueError(
        f"layer {i} must join queries, keys and values by attention or FlashAttention, got {op}: no other can be cut"
    )


# --- positions inside attention --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowPositions(SharedByCopies, RelativePositions):
    """Positions that turn this rank's rows by their places in the whole sequence.

        MultiHeadAttention(64, 4, op=RingAttention(zigzag), positions=RowPositions(Rotary(16), zigzag))

    Attributes:
        positions: what turns queries and keys, such as `Rotary`.
        layout: a `Layout`, or a function of N and P that gives it.
        group: the ranks; all where None.

    Raises:
        TypeError: positions that do not act inside attention.
        ValueError: positions with a bias, or with parameters.
    """

    positions: RelativePositions
    layout: Placing
    group: Any = None

    def __post_init__(self) -> None:
        kind = type(self.positions)
        if not isinstance(self.positions, RelativePositions):
            raise TypeError(f"positions must act inside attention, as Rotary does, got {kind.__name__}")
        if kind.bias is not RelativePositions.bias or isinstance(self.positions, nn.Module):
            raise ValueError(
                f"positions must only turn queries and keys, as Rotary does, got {kind.__name__}: a bias of positions "
                "is a mask, which attention over ranks does not take"
            )

    def turn(self, x: Float[Tensor, "b h n d"], start: int = 0) -> Float[Tensor, "b h n d"]:
        """This rank's queries or keys (B, H, n, D), each row turned by its place in the whole sequence.

        Args:
            x: queries or keys, rows in the layout's order.
            start: 0: rows of a layout have nothing before them in a cache.

        Raises:
            TypeError: x is not a Tensor.
            ValueError: another start; or as the positions raise. A number of rows that is not the layout's is left to
                attention, which refuses it on every rank alike.
        """
        check_tensors({"x": x})
        _check_start(start)
        pieces = _held(self.layout, self.group, x.shape[-2], x)[1]
        if pieces is None:
            return x
        parts = x.split([len(piece) for piece in pieces], -2)
        turned = [self.positions.turn(part, piece.start) for part, piece in zip(parts, pieces)]
        return torch.cat(turned, -2) if len(turned) > 1 else turned[0]

    def refuses(self, n_heads: int, d_head: int) -> str | None:
        """What the positions refuse."""
        return self.positions.refuses(n_heads, d_head)


# --- positions that are added to embeddings --------------------------------------------------------------------------


@dataclass(frozen=True)
class _RowVectors(SharedByCopies):
    """A hook of `AddedPositions`: the vectors of this rank's places in place of those of 0 to n - 1."""

    layout: Placing
    group: Any

    def __call__(
        self, positions: AddedPositions, args: tuple[Any, ...], given: Mapping[str, Any], vectors: Tensor
    ) -> Tensor:
        _check_start(given.get("start", 0))
        length, pieces = _held(self.layout, self.group, len(vectors), vectors)
        if positions.longest is not None and length > positions.longest:
            raise ValueError(
                f"positions must lie in 0 to {positions.longest - 1}, got {length - 1}: shorten the sequence or make "
                "the table longer"
            )
        if pieces is None:
            return vectors
        places = [torch.arange(piece.start, piece.stop, device=vectors.device) for piece in pieces]
        return positions.at(torch.cat(places)).to(vectors.dtype)


# --- where this rank's rows stand ------------------------------------------------------------------------------------


def _held(layout: Placing, group: Any, n: int, like: Tensor) -> tuple[int, tuple[range, ...] | None]:
    """N, and the pieces that this rank holds, one at least, which may be empty.

    The pieces are None where they are not n rows long. Attention compares the rows of all ranks and refuses them on
    every rank alike; an error here would leave the others waiting.
    """
    if isinstance(layout, Layout):
        whole, rank = layout, ranks_of(group).rank
    else:
        whole, rank = _told(layout, group, n, like)
    fits = rank < whole.size and whole.lengths[rank] == n
    return whole.length, (whole.pieces[rank] or (range(0),)) if fits else None


@not_compiled
def _told(layout: Callable[[int, int], Layout], group: Any, n: int, like: Tensor) -> tuple[Layout, int]:
    """The layout of as many positions as all ranks hold together, and this rank."""
    ranks = ranks_of(group)
    sizes = compared(ranks, "positions of rows", lambda: {"rows": n}, device_of(ranks, like), may_differ=("rows",))
    return layout(sum(of_rank["rows"] for of_rank in sizes), ranks.size), ranks.rank


def _check_start(start: int) -> None:
    if start:
        raise ValueError(f"cache must be None where a sequence is cut over ranks, got one that holds {start} positions")
