"""Record what each attention head gives out, and run a model again with some heads' outputs replaced.

    with record_heads(model) as clean:
        model(ids)
    clean.outputs[layer]                       # (B, N, H, D), what goes into W_O

    with replace_heads(model, {(2, 3): 0.0}):  # head 3 of layer 2 is switched off
        model(ids)

Both hook the input of the output projection W_O, so they serve this library's models and those of transformers alike
(see `nondual.analysis.attention_layers`). A context ends its hooks, also after an exception. Several can be open at
once and act in the order in which they were opened: a recording that was opened after a replacement sees the replaced
outputs; one that was opened before it sees what the head computed. A compiled model runs uncompiled in them.

What to put in place of a head's output is a choice, and the effect depends on it. Zero is a value that the rest of the
model may never have met; the head's mean over a recorded run (`mean_values`) or its output for another sequence
(`resample_values`) stay within what the model is used to. `patch_heads` puts in the outputs of another run.

Source: zero ablation: Michel et al. 2019 (1905.10650); mean ablation: Wang et al. 2022 (2211.00593);
resampling: Chan et al. 2022, "Causal Scrubbing"; patching: Vig et al. 2020 (2004.12265), Meng et al. 2022 (2202.05262).
Symbols: B batch, N positions, H heads, D head width.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from nondual.analysis.attention_layers import AttentionLayer, attention_layers, check_heads, uncompiled

Value = float | Tensor | Callable[[Tensor], Tensor]


class HeadRecord:
    """What `record_heads` saw; filled anew by each forward pass, and still there after the context has ended."""

    def __init__(self, n_layers: int):
        self._outputs: list[Tensor | None] = [None] * n_layers

    @property
    def outputs(self) -> list[Float[Tensor, "b n h d"]]:
        """One Tensor (B, N, H, D) a layer: the heads' outputs of the last call, before W_O.

        Raises:
            RuntimeError: a layer was not called while the context was open.
        """
        missing = [i for i, output in enumerate(self._outputs) if output is None]
        if missing:
            raise RuntimeError(
                f"every layer must have run within record_heads before outputs are read; these did not: {missing}"
            )
        return [output for output in self._outputs if output is not None]


def record_heads(model: nn.Module, *, gradients: bool = False) -> AbstractContextManager[HeadRecord]:
    """A context that records the output of every head, at each forward pass of the model.

    Args:
        model: as in `nondual.analysis.attention_layers.attention_layers`.
        gradients: keep the recorded outputs in the graph, so that `torch.autograd.grad(loss, record.outputs)` gives
            their gradients. Otherwise they are detached.

    Returns:
        A context manager; its value is a HeadRecord, whose `outputs` is a list over layers of (B, N, H, D).

    Raises:
        TypeError, ValueError: the model has no heads of a known kind.
    """
    layers = attention_layers(model)
    record = HeadRecord(len(layers))

    def keep(layer: int, heads: Tensor) -> Tensor | None:
        record._outputs[layer] = heads if gradients else heads.detach()
        return heads if gradients else None  # handed on, so that it is part of the graph

    return _at_heads(model, layers, keep, record)


def replace_heads(model: nn.Module, values: Mapping[tuple[int, int], Value]) -> AbstractContextManager[None]:
    """A context in which chosen heads give out something else than they compute.

    Args:
        model: as in `nondual.analysis.attention_layers.attention_layers`.
        values: for each (layer, head) a number, a Tensor that broadcasts to (B, N, D), or a function of the head's
            output (B, N, D) that returns such a Tensor. A Tensor is converted to the dtype and device of the output.

    Raises:
        TypeError: a key that is not a pair of ints, a value of another kind.
        ValueError: a layer or head that the model does not have; a Tensor that cannot broadcast to (B, N, D). Where
            that depends on B and N, the forward pass raises it.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values must be a dict from (layer, head) to a value, got {type(values).__name__}")
    layers = check_heads(model, values)
    chosen: dict[int, dict[int, Value]] = {}
    for (layer, head), value in values.items():
        _check_value(value, layers[layer].d_head, f"the value of head {head} of layer {layer}")
        chosen.setdefault(layer, {})[head] = value

    # --8<-- [start:put]
    def put(layer: int, heads: Tensor) -> Tensor | None:
        if layer not in chosen:
            return None
        outputs = list(heads.unbind(2))  # H of (B, N, D)
        for head, value in chosen[layer].items():
            name = f"the value of head {head} of layer {layer}"
            outputs[head] = _as_output(value, outputs[head], name)
        return torch.stack(outputs, 2)

    # --8<-- [end:put]
    return _at_heads(model, layers, put, None)


def patch_heads(
    model: nn.Module,
    source: HeadRecord | Sequence[Tensor],
    heads: Iterable[tuple[int, int]],
    *,
    positions: Sequence[int] | None = None,
) -> AbstractContextManager[None]:
    """A context in which chosen heads give out what they gave out in a recorded run: activation patching.

    Args:
        model: the recorded one, or one of the same shape.
        source: what was recorded; its batch is that of the run to be patched, or 1.
        heads: pairs (layer, head).
        positions: the positions at which they do so; all of them where left out. A negative one counts from the end.

    Raises:
        TypeError, ValueError: as in `replace_heads`, and a source of another number of layers. Where the recorded run
            has another length or batch, or lacks a position, the forward pass raises.
    """
    pairs = list(heads)
    layers = check_heads(model, pairs)
    outputs = source.outputs if isinstance(source, HeadRecord) else list(source)
    if len(outputs) != len(layers):
        raise ValueError(f"source must have recorded {len(layers)} layers, got {len(outputs)}")

    def patched(layer: int, head: int) -> Callable[[Tensor], Tensor]:
        def value(output: Tensor) -> Tensor:
            given = outputs[layer][:, :, head].to(output)
            if given.shape[1:] != output.shape[1:] or given.shape[0] not in (1, output.shape[0]):
                raise ValueError(
                    f"source must be a run of B, N, D = {tuple(output.shape)} or of batch 1, got {tuple(given.shape)}"
                )
            if positions is None:
                return given
            here = torch.zeros(output.shape[1], 1, dtype=torch.bool, device=output.device)
            for position in positions:
                if not -len(here) <= position < len(here):
                    raise ValueError(f"positions must lie in {-len(here)} to {len(here) - 1}, got {position}")
                here[position] = True
            return torch.where(here, given, output)

        return value

    return replace_heads(model, {pair: patched(*pair) for pair in pairs})


def mean_values(
    source: HeadRecord | Sequence[Tensor],
    heads: Iterable[tuple[int, int]],
    *,
    by_position: bool = False,
    real: Bool[Tensor, "b n"] | None = None,
) -> dict[tuple[int, int], Tensor]:
    """The mean output of heads over a recorded run, to give to `replace_heads`: mean ablation.

    Args:
        source: what was recorded.
        heads: pairs (layer, head).
        by_position: a mean for each position, (N, D), over the batch alone; otherwise one for all, (D,).
        real: True at the positions that count, in a padded batch. A position that is padding in every sequence has the
            mean 0.

    Returns:
        A Tensor for each pair.

    Raises:
        ValueError: a pair that was not recorded; a `real` of another shape.
    """
    outputs = source.outputs if isinstance(source, HeadRecord) else list(source)
    means = {}
    for layer, head in heads:
        if not (0 <= layer < len(outputs) and 0 <= head < outputs[layer].shape[2]):
            raise ValueError(f"({layer}, {head}) must be among the recorded heads; {len(outputs)} layers were recorded")
        output = outputs[layer][:, :, head]
        if real is not None and real.shape != output.shape[:2]:
            raise ValueError(f"real must be (B, N) = {tuple(output.shape[:2])}, got {tuple(real.shape)}")
        weight = torch.ones_like(output[..., :1]) if real is None else real[..., None].to(output)
        over = (0,) if by_position else (0, 1)
        means[layer, head] = (output * weight).sum(over) / weight.sum(over).clamp(min=1)
    return means


def resample_values(
    heads: Iterable[tuple[int, int]], order: Integer[Tensor, " b"]
) -> dict[tuple[int, int], Callable[[Tensor], Tensor]]:
    """Functions for `replace_heads` that give each sequence the head's output for another one: resample ablation.

    Args:
        heads: pairs (layer, head).
        order: (B,), for each sequence of the batch the one that the output is taken from: `torch.arange(B).roll(1)`.

    Returns:
        A function for each pair.

    Raises:
        ValueError: an order that is not a permutation of 0 to B - 1, or that leaves a sequence its own output.
    """
    order = torch.as_tensor(order)
    even = torch.arange(order.numel(), device=order.device)
    if order.ndim != 1 or order.is_floating_point() or not torch.equal(order.sort().values, even):
        raise ValueError(f"order must be a permutation of 0 to B - 1, got {order.tolist()}")
    if (order == even).any():
        raise ValueError(f"order must give every sequence another one's output, got {order.tolist()}")

    def value(output: Tensor) -> Tensor:
        if len(output) != len(order):
            raise ValueError(f"order must have the batch's size {len(output)}, got {len(order)}")
        return output[order.to(output.device)]

    return {pair: value for pair in heads}


@contextmanager
def _at_heads(
    model: nn.Module, layers: list[AttentionLayer], act: Callable[[int, Tensor], Tensor | None], value: Any
) -> Iterator[Any]:
    """A context in which act(layer, heads (B, N, H, D)) is called before every W_O; what it returns goes into W_O."""
    numbers: dict[nn.Module, list[int]] = {}  # of each W_O, the layers that it serves: several where weights are shared
    for i, layer in enumerate(layers):
        numbers.setdefault(layer.output, []).append(i)
    calls: Counter[nn.Module] = Counter()

    # --8<-- [start:before_output]
    def before_output(w_o: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        number = numbers[w_o][calls[w_o] % len(numbers[w_o])]  # which layer this is
        calls[w_o] += 1
        heads = args[0].unflatten(-1, (layers[number].n_heads, layers[number].d_head))
        changed = act(number, heads)  # (B, N, H, D); None: as it was
        return None if changed is None else (changed.flatten(-2), *args[1:])

    # --8<-- [end:before_output]
    handles = []
    try:
        if any(len(served) > 1 for served in numbers.values()):  # count afresh, also after a pass that raised
            handles.append(model.register_forward_pre_hook(lambda *_: calls.clear()))
        for output in numbers:
            handles.append(output.register_forward_pre_hook(before_output))
        with uncompiled(model):
            yield value
    finally:
        for handle in handles:
            handle.remove()


def _check_value(value: object, d_head: int, name: str) -> None:
    if isinstance(value, Tensor):
        if value.ndim > 3 or (value.ndim and value.shape[-1] not in (1, d_head)):
            raise ValueError(f"{name} must broadcast to (B, N, {d_head}), got {tuple(value.shape)}")
    elif isinstance(value, bool) or not (isinstance(value, int | float) or callable(value)):
        raise TypeError(f"{name} must be a number, a Tensor or a function, got {type(value).__name__}")


def _as_output(value: Value, output: Tensor, name: str) -> Tensor:
    """The value in the shape, dtype and device of the head's output (B, N, D)."""
    given = value if isinstance(value, int | float | Tensor) else value(output)
    if isinstance(given, int | float):
        return torch.full_like(output, given)
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must return a Tensor, got {type(given).__name__}")
    try:
        return given.to(output).expand(output.shape)
    except RuntimeError:
        shape = tuple(output.shape)
        raise ValueError(f"{name} must broadcast to (B, N, D) = {shape}, got {tuple(given.shape)}") from None
