"""How the layers of a model are joined: the plain stream, in which each reads what the one before it gave, and others.

A connection takes the vectors that enter the first layer and the layers of one forward pass, and gives the vectors that
leave the last. It is called once a pass, and decides what each layer reads and what becomes of what it adds:

    def stream(x, layers):                       # the plain residual stream, the default of every model
        for layer in layers:
            x = layer(x)
        return x

    def reminded(x, layers):                     # each layer reads the embeddings once more
        start = x
        for layer in layers:
            x = layer(x + start)
        return x

    CausalLM(..., connection=reminded)

It calls each layer once, since each call appends to the layer's cache, and mixes no positions. A connection that has
parameters is an `nn.Module`, and is trained and saved with the model: see `nondual.recent`. Symbols: B sequences, N
positions of width E.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn


class LayerCall:
    """One layer of a model in one forward pass, with what it is given besides x: its cache, and where sequences begin.

    Args:
        layer: x (B, N, E) -> (B, N, E).
        options: what its mixer is given by name.
        before: what is done to x before the layer reads it; nothing where left out.
    """

    layer: nn.Module
    options: dict[str, Any]
    before: Callable[[Tensor], Tensor] | None

    def __init__(self, layer: nn.Module, options: dict[str, Any], before: Callable[[Tensor], Tensor] | None = None):
        self.layer, self.options, self.before = layer, options, before

    def __call__(self, x: Tensor, **more: Any) -> Tensor:
        """x (B, N, E) -> (B, N, E), the residual path included; what is given besides x goes to the mixer."""
        return self.layer(self._read(x), **self.options, **more)

    def branches(self) -> list[Callable[[Tensor], Tensor]]:
        """What the layer adds to the stream, part by part: functions of x (B, N, E) to what is added, (B, N, E).

        Of a `TransformerLayer` two, its mixer and its feed-forward network, each with its norm before it; of a
        `MixerBlock` one. Calling x = x + branch(x) for each is the layer. They call the parts of the layer, not the
        layer itself, whose own hooks do not run.

        Raises:
            ValueError: a layer that has no `branches`, or norms after its residual paths.
        """
        if not hasattr(self.layer, "branches"):
            raise ValueError(
                f"layers must have branches for this connection, as TransformerLayer and MixerBlock do, got "
                f"{type(self.layer).__name__}"
            )
        first, *rest = cast(Any, self.layer).branches(**self.options)
        return [lambda x: first(self._read(x)), *rest]

    def _read(self, x: Tensor) -> Tensor:
        return x if self.before is None else self.before(x)


@runtime_checkable
class Connection(Protocol):
    """A function or a module that leads x (B, N, E) through the layers of a model, to (B, N, E)."""

    def __call__(self, x: Tensor, layers: Sequence[LayerCall], /) -> Tensor: ...


# --8<-- [start:stream]
def stream(x: Tensor, layers: Sequence[LayerCall]) -> Tensor:
    """The plain residual stream: each layer reads what the one before it gave.

    Args:
        x: (B, N, E).
        layers: of one forward pass, in order.
    """
    for layer in layers:
        x = layer(x)
    return x
    # --8<-- [end:stream]


def branches_of(layers: Sequence[LayerCall], expected: int) -> list[Callable[[Tensor], Tensor]]:
    """The branches of all layers, in order.

    Args:
        layers: of one forward pass.
        expected: how many branches the connection was made for.

    Raises:
        ValueError: another number of branches, or a layer without.
    """
    branches = [branch for layer in layers for branch in layer.branches()]
    check_count("branches", len(branches), expected)
    return branches


def check_width(x: Tensor, expected: int) -> None:
    """Refuse a connection that was made for a model of another width.

    Args:
        x: (B, N, E), of the model.
        expected: the width that the connection was made for.

    Raises:
        ValueError: naming both.
    """
    if x.shape[-1] != expected:
        raise ValueError(f"connection must be made for the model's width of {x.shape[-1]}, got one for {expected}")


def check_count(what: str, found: int, expected: int) -> None:
    """Refuse a connection that was made for a model of another depth.

    Raises:
        ValueError: naming both numbers.
    """
    if found != expected:
        raise ValueError(f"connection must be made for the model's {found} {what}, got one for {expected}")
