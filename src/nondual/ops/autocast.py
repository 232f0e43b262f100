"""Autocast at the door of our own operations: what is cast on the way in, and nothing after that."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def as_autocast_does(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the tensors in its dtype, all but float64: what torch does for scaled_dot_product_attention."""
    kind = next(x for x in tensors if x is not None).device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def without_autocast(method: Callable) -> Callable:
    """A pass of an autograd.Function, out of autocast's reach: each tensor is as wide as it was made."""

    @functools.wraps(method)
    def run(ctx, x, *rest):
        if not torch.amp.is_autocast_available(x.device.type):
            return method(ctx, x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return method(ctx, x, *rest)

    return run
