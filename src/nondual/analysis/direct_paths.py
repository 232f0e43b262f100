"""What a layer reads straight from each layer before it: direct paths along the residual stream, cut one at a time.

In a model whose layers add to one stream, what layer k reads is a sum, with L layers counted from 1 and c_0 the
embeddings:

    x_k = c_0 + c_1 + ... + c_(k - 1),       c_j = F_j(x_j),  what layer j added

To cut the direct path from j to k is to let layer k, and it alone, read x_k - c_j. The stream keeps c_j for all others,
and what reaches k through the layers between is left as it was. Two things are measured: how far the output of layer k
moves, |F_k(x_k - c_j) - F_k(x_k)| / |F_k(x_k)| in the mean over positions; and the loss of the model that goes on from
there, less its own.

A control subtracts something else of the same length: `random_direction`. Sources: the stream as a sum over paths,
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; ensembles of paths, Veit et al. 2016
(1605.06431); one path at a time, Goldowsky-Dill et al. 2023 (2304.05969). Symbols: B texts, N positions, width E.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nondual.connections import stream
from nondual.language_models.causal import CausalLM
from nondual.transformer_layer import normed


class PathEffect(NamedTuple):
    """What cutting a path does, text by text."""

    output: Float[Tensor, " b"]
    """(B,), how far the layer's own output moves, as a share of its length: the mean over positions."""
    loss: Float[Tensor, " b"] | None
    """(B,), what the loss rises by, in nats a token; None where it was not asked for."""


class DirectPaths(NamedTuple):
    """The effect of cutting each direct path: row j is the source, column k - 1 the layer that reads; NaN elsewhere."""

    output: Float[Tensor, "sources layers b"]
    loss: Float[Tensor, "sources layers b"] | None


@torch.no_grad()
def stream_parts(model: CausalLM, ids: Int[Tensor, "b n"]) -> list[Float[Tensor, "b n e"]]:
    """c_0 to c_(L - 1): the embeddings, positions included, and what each layer but the last added, (B, N, E) each.

    Their sum up to c_(k - 1) is what layer k reads.

    Args:
        model: with the plain residual stream.
        ids: (B, N).

    Raises:
        TypeError: model is not a CausalLM.
        ValueError: a model whose layers are joined in another way; ids that are not in its vocabulary.
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model must be a CausalLM, got {type(model).__name__}; from_llama makes one of a Llama")
    if model.connection is not stream:
        raise ValueError("model must have the plain residual stream, got another connection: its paths have weights")
    read: list[Tensor] = []

    def keep(_: int, x: Tensor) -> Tensor:
        read.append(x)
        return x

    model.hidden(model.embeddings(ids), before=keep)
    return [read[0], *(after - before for before, after in pairwise(read))]


@torch.no_grad()
def cut_paths(
    model: CausalLM,
    ids: Int[Tensor, "b n"],
    parts: Sequence[Tensor],
    k: int,
    removed: Iterable[Tensor],
    *,
    first: int = 0,
    loss: bool = True,
) -> list[PathEffect]:
    """Let layer k read its input less one of `removed`, and all others what they would read; for each of them anew.

    Args:
        model: as in `stream_parts`.
        ids: (B, N).
        parts: from `stream_parts`.
        k: the layer, from 1.
        removed: each (B, N, E), what is subtracted from what layer k reads, such as parts[j].
        first: the first position at which it is subtracted and the effect is measured; before it all is as it was. The
            first token of a text may hold vectors so long that all others attend to it.
        loss: measure the loss too, which needs the rest of the model.

    Raises:
        ValueError: a k that is not a layer, a removed of another shape, a first that leaves no position to measure.
    """
    n_layers, n = len(parts), ids.shape[1]
    if not 1 <= k <= n_layers:
        raise ValueError(f"k must be a layer, 1 to {n_layers}, got {k}")
    if not 0 <= first < n - 1:
        raise ValueError(f"first must lie in 0 to {n - 2}, so that a loss is left to measure, got {first}")
    layer, x = model.layers[k - 1], torch.stack(list(parts[:k])).sum(0)  # x_k
    added = layer(x) - x  # F_k(x_k)
    before = _losses(model, ids, x + added, k, first) if loss else None
    here = (torch.arange(n, device=x.device) >= first)[:, None]
    effects = []
    for taken in removed:
        if taken.shape != x.shape:
            raise ValueError(f"removed must be (B, N, E) = {tuple(x.shape)} each, got {tuple(taken.shape)}")
        # --8<-- [start:cut]
        read = torch.where(here, x - taken, x)  # what layer k alone reads
        changed = layer(read) - read  # F_k(x_k - c_j)
        moved = (changed - added).norm(dim=-1) / added.norm(dim=-1)  # (B, N)
        after = None if before is None else _losses(model, ids, x + changed, k, first)
        # --8<-- [end:cut]
        rise = None if before is None or after is None else after - before
        effects.append(PathEffect(moved[:, first:].mean(1), rise))
    return effects


def direct_paths(
    model: CausalLM,
    ids: Int[Tensor, "b n"],
    *,
    layers: Sequence[int] | None = None,
    first: int = 0,
    loss: bool = False,
    removed: Callable[[Tensor], Tensor] = lambda part: part,
) -> DirectPaths:
    """The effect of cutting every direct path j -> k, one at a time.

    Args:
        model: as in `stream_parts`.
        ids: (B, N).
        layers: the layers k whose input is cut, from 1; all where left out.
        first: as in `cut_paths`.
        loss: as in `cut_paths`: many times as long.
        removed: what is subtracted for a part c_j (B, N, E): the part itself where left out.

    Raises:
        TypeError, ValueError: as in `stream_parts` and `cut_paths`.
    """
    parts = stream_parts(model, ids)
    n = len(parts)
    output = torch.full((n, n, len(ids)), torch.nan)
    losses = torch.full_like(output, torch.nan) if loss else None
    for k in range(1, n + 1) if layers is None else layers:
        taken = (removed(part) for part in parts[:k])
        for j, effect in enumerate(cut_paths(model, ids, parts, k, taken, first=first, loss=loss)):
            output[j, k - 1] = effect.output
            if losses is not None and effect.loss is not None:
                losses[j, k - 1] = effect.loss
    return DirectPaths(output, losses)


def random_direction(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A function of (B, N, E) that gives vectors of the same lengths in random directions, drawn anew at each call.

    Args:
        generator: where the randomness comes from.
    """

    def drawn(part: Tensor) -> Tensor:
        other = torch.randn(part.shape, generator=generator, device=generator.device).to(part)
        return other * (part.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True))

    return drawn


def _losses(model: CausalLM, ids: Tensor, x: Tensor, k: int, first: int) -> Tensor:
    """The loss (B,) of a model that goes on with x after layer k, over what follows the positions from `first` on."""
    for layer in list(model.layers)[k:]:
        x = layer(x)
    scores = model.scores(normed(model.norm_f, x)[:, first:-1])
    return F.cross_entropy(scores.mT, ids[:, first + 1 :].long(), reduction="none").mean(1)
