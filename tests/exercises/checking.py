"""What the checks of the exercises share: how a mistake is told, and what a reader's function may return."""

from typing import Any

import torch
from torch import Tensor


class NotYetError(Exception):
    """What is not right yet, in a sentence."""


def tensor(what: str, given: Any, shape: tuple[int, ...]) -> Tensor:
    """The reader's tensor, if it is one of this shape and of finite numbers."""
    if not isinstance(given, Tensor):
        raise NotYetError(f"{what} should be a tensor, and is {type(given).__name__}")
    if tuple(given.shape) != shape:
        raise NotYetError(f"{what} should have the shape {shape}, and has {tuple(given.shape)}")
    if not given.isfinite().all():
        raise NotYetError(f"{what} has numbers that are infinite or not a number")
    return given


def pair(given: Any, what: str) -> tuple[Any, Any]:
    """The two things that the reader's function should return."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise NotYetError(f"it should return {what}, and returns {type(given).__name__}")
    return given[0], given[1]


def near(a: Tensor, b: Tensor, within: float = 1e-4) -> bool:
    return torch.allclose(a, b, atol=within, rtol=within)
