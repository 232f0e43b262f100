"""What a mixer is: a module that lets the positions of a sequence exchange something, x (B, N, E) to (B, N, E).

Attention, Mamba, Mamba-2 and S4D are mixers alike: a transformer layer, a causal language model and its generation take
any of them, and know no more of it than stands here. Symbols: B sequences, N positions of width E.

    class Average(nn.Module):                     # the mean of each position and the one before it
        def forward(self, x):
            return (x + F.pad(x, (0, 0, 1, -1))) / 2

    TransformerLayer(Average(), FeedForward(64, 256), 64)

A mixer in a causal language model lets no position see a later one. What else it can do, its `forward` says by its
arguments, each of them keyword-only and None where left out:

    cache     what it remembers of the positions before x; made by `new_cache`, and brought up to date by the call
    reset     (B, N), True at the first position of each of several sequences packed along N
    mask      as in `nondual.ops.attention.attention`

A cache changes by having its attributes replaced. Tensors in it are never written into where they are read, so that its
attributes, and those of the caches in it, are all that there is to put back after an error. A beam search
(`nondual.search`) needs one method more: `select(rows)`, which gives a cache of its own for these rows of the batch.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Integer
from torch import Tensor, nn

from nondual.ops.checks import check_tensors


class Mixer(Protocol):
    """Any module x (B, N, E) -> (B, N, E)."""

    def __call__(self, x: Tensor, /, **options: Any) -> Tensor: ...


@runtime_checkable
class CachedMixer(Mixer, Protocol):
    """A mixer that reads a sequence in parts: `mixer(x, cache=cache)` goes on from what earlier calls have read."""

    def new_cache(self, batch: int, max_len: int | None = None) -> Any:
        """An empty cache.

        Args:
            batch: B.
            max_len: how many positions it will hold at most. A mixer whose memory does not grow ignores it.
        """
        ...


def check_takes(mixer: nn.Module, option: str, where: str) -> None:
    """Refuse an option that the mixer's forward does not have. Compiled, Python's own error says so.

    Args:
        mixer: the mixer.
        option: "cache", "reset" or "mask".
        where: which mixer it is, for the error: "layer 3".

    Raises:
        ValueError: naming the option, the layer and the mixer's class.
    """
    if torch.compiler.is_compiling():
        return
    parameters = inspect.signature(mixer.forward).parameters
    if option not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"{option} must be left out: the mixer of {where}, {type(mixer).__name__}, does not take it")


def new_caches(mixers: Iterable[object], batch: int, max_len: int | None, otherwise: str) -> list[Any]:
    """An empty cache from each of a model's mixers, in the order of the layers.

    Args:
        mixers: one a layer.
        batch: B.
        max_len: how many positions they will hold at most; a mixer whose memory does not grow ignores it.
        otherwise: what to do where a mixer makes no cache, for the error: "generate with cached=False".

    Raises:
        ValueError: a mixer without `new_cache` or whose forward takes no cache, named with its layer; or what a mixer
            refuses.
    """
    caches = []
    for i, mixer in enumerate(mixers):
        if not hasattr(mixer, "new_cache"):
            raise ValueError(f"the mixer of layer {i}, {type(mixer).__name__}, has no new_cache: {otherwise}")
        check_takes(cast(nn.Module, mixer), "cache", f"layer {i}")
        caches.append(cast(Any, mixer).new_cache(batch, max_len))
    return caches


def check_reset(reset: Tensor, x: Tensor) -> None:
    """Refuse a reset that is not a boolean Tensor of the first two sizes of x, (B, N)."""
    check_tensors({"reset": reset})
    shape = tuple(x.shape[:2])
    if tuple(reset.shape) != shape or reset.dtype != torch.bool:
        raise ValueError(
            f"reset must be boolean (B, N) = {shape}, True where a sequence begins, got {reset.dtype} "
            f"{tuple(reset.shape)}"
        )


def sequence_starts(
    reset: Bool[Tensor, "b n"] | None, n: int, *, length: int = 0, start: Integer[Tensor, " b"] | None = None
) -> Integer[Tensor, "b n"] | None:
    """For each of n positions the index at which its sequence began; None where every sequence began at 0.

        reset  F F T F T    length 0    ->   0 0 2 2 4

    Args:
        reset: True where a sequence begins.
        n: how many positions, N.
        length: how many positions were read before these.
        start: where the sequence began that the position before these belongs to; 0 where left out.
    """
    if reset is None:
        return None if start is None else start[:, None].expand(-1, n)
    index = torch.arange(length, length + n, device=reset.device)
    before = torch.zeros_like(index) if start is None else start[:, None]
    return torch.where(reset, index, before).cummax(1).values


class _AsBeforeIfRaised:
    """Puts the caches back where an exception leaves the block, a KeyboardInterrupt too."""

    def __init__(self, caches: tuple[object, ...]):
        self.caches = caches

    def __enter__(self):
        self.before = [(part, part.copy()) for part in _parts(self.caches, set())]

    def __exit__(self, kind, *_):
        if kind is not None:
            for part, before in self.before:
                part.clear()
                part.extend(before) if isinstance(part, list) else part.update(before)


def _parts(held: object, seen: set[int]) -> Iterator[list[Any] | dict[Any, Any]]:
    """The attributes, lists and dicts of which caches are made, and those of the caches that they hold."""
    own = held if isinstance(held, (list, dict, tuple)) else getattr(held, "__dict__", None)
    if not isinstance(own, (list, dict, tuple)) or isinstance(held, (Tensor, nn.Module)) or id(held) in seen:
        return
    seen.add(id(held))
    if not isinstance(own, tuple):
        yield own
    for each in own.values() if isinstance(own, dict) else own:
        yield from _parts(each, seen)


def as_before_if_raised(*caches: object | None) -> AbstractContextManager[Any]:
    """A context: where an exception leaves it, the caches are as they were when it was entered, and those in them too.

    Args:
        caches: each a cache of some mixer, or a list of them, or None. Compiled, an exception leaves no change behind
            by itself, and this does nothing.
    """
    given = tuple(cache for cache in caches if cache is not None)
    return nullcontext() if not given or torch.compiler.is_compiling() else _AsBeforeIfRaised(given)
