"""Autocast where tensors enter an operation: they are cast once on the way in, and nothing is cast after that.

Source: torch's own rule for scaled_dot_product_attention, https://docs.pytorch.org/docs/stable/amp.html.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVarTuple, cast

import torch
from torch import Tensor

Given = TypeVarTuple("Given")  # each of them Tensor, or Tensor | None


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is on for devices of this type ("cpu", "cuda")."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # "meta" has none, and must not be asked


def as_autocast_does(*tensors: *Given) -> tuple[*Given]:
    """Under autocast, the tensors in its dtype, all but float64: what torch does for scaled_dot_product_attention.

    Args:
        tensors: of any shape and dtype, on one device; the first that is not None decides which autocast is meant.

    Returns:
        The tensors in the same order; booleans, integers, float64 and None as they were.
    """
    given: Any = tensors
    first = given[0] if given[0] is not None else next(x for x in given if x is not None)
    kind = first.device.type
    if not is_autocasting(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return cast("tuple[*Given]", tuple(x.to(dtype) if _is_cast(x) else x for x in given))


def _is_cast(x: Tensor | None) -> TypeGuard[Tensor]:
    return x is not None and x.is_floating_point() and x.dtype != torch.float64


def autocast_off(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast casts nothing; where it is off already, one that does nothing (and is not traced)."""
    return torch.autocast(device_type, enabled=False) if is_autocasting(device_type) else contextlib.nullcontext()


def without_autocast(method: Callable) -> Callable:
    """Make a pass of an autograd.Function run with autocast off: each tensor keeps the dtype that the pass gave it."""

    @functools.wraps(method)
    def run(ctx, x, *rest):
        with autocast_off(x.device.type):
            return method(ctx, x, *rest)

    return run
