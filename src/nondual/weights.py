"""Layers whose weight is used otherwise than by calling them, and what is used where something stands in their place.

A hook, or an adapter such as LoRA, acts in the call of a layer. What reads the weight past that call does not hear it.
"""

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import type_before_parametrizations

M = TypeVar("M", bound=nn.Module)


def only_a_weight(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a call of this module does no more than `kind` does with its weight and bias: these may be used directly.

    Not so where the module itself does more, and where there are global hooks, which expect its call.
    """
    return not _has_any_global_hook() and _does_no_more(module, kind)


def _does_no_more(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether the module itself makes nothing else of its weight and bias than `kind` does.

    Not so for any other class (an adapter, a quantised layer, a subclass), where it has hooks, and where the instance
    has a forward of its own (as accelerate gives it). A parametrization makes no difference: it is computed whenever
    the weight is read.
    """
    return not (
        type_before_parametrizations(module) is not kind
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
    )


def matrix_and_bias(linear: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The matrix (out, width) by which a linear layer multiplies, and what it adds (out,), or None.

    They are its weight and bias. Where a call does something else, such as an adapter's, they are what the layer gives
    for the unit vectors and for zero: right for all that is linear, and for no more than that. Global hooks, which
    torch keeps for profiling, do not count: what a profiler measures is what runs without it.

    Args:
        linear: an nn.Linear, or what stands in its place.
        width: of what it is given.
        like: a tensor of the dtype and on the device of what it is given.
    """
    if _does_no_more(linear, nn.Linear):
        return linear.weight, linear.bias
    given = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)  # the unit vectors, and zero
    made = linear(given)
    return (made[:-1] - made[-1]).mT, made[-1]


def tied_scores(embeddings: nn.Module, hidden: Float[Tensor, "*b e"], vocabulary: int) -> Float[Tensor, "*b v"]:
    """The product of hidden (…, E) with the embedding of each token: scores (…, V).

    Those of an nn.Embedding are its weight, whatever hooks it has. Where something else stands in its place, such as an
    adapter, they are the rows that it gives for all V ids, computed at every call.

    Args:
        embeddings: ids to vectors (…, E).
        hidden: (…, E).
        vocabulary: V.
    """
    if isinstance(embeddings, nn.Embedding):
        return F.linear(hidden, embeddings.weight)
    rows = embeddings(torch.arange(vocabulary, device=hidden.device))
    return F.linear(hidden, rows.to(hidden.dtype))
