"""The memory that both ways of the CPU engine use: chunks, shapes of results, large tensors in huge pages."""

import ctypes
import functools
import mmap
from collections.abc import Callable
from typing import TypeVarTuple, cast

import torch
from torch import Tensor

from nondual.ops.dtypes import accumulation_dtype

Given = TypeVarTuple("Given")  # each of them Tensor, or Tensor | None
CHUNK = 64  # steps between two saved states
LARGE = 8 * 2**20  # bytes: from here on malloc may give memory back to the system and take it anew at every call
HUGE_PAGE = 2 * 2**20

# --- tensors ---------------------------------------------------------------------------------------------------------


@functools.cache
def madvise() -> Callable[[int, int, int], int] | None:
    """The system's madvise, or None where it has no huge pages."""
    try:
        function = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
    except (OSError, AttributeError, TypeError):
        return None
    if function:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor, dense; where it is large, in huge pages if the system has them.

    The first touch of each page costs a page fault: for 32 MB 8,192 of them in pages of 4 KiB, and 16 in pages of
    2 MiB. Only whole huge pages within the tensor are asked for, so that it takes no more memory.
    """
    x = like.new_empty(shape, dtype=dtype)
    start, size = x.data_ptr(), x.numel() * x.element_size()
    if size >= LARGE and (advise := madvise()):
        first = -(-start // HUGE_PAGE) * HUGE_PAGE
        advise(first, (start + size - first) // HUGE_PAGE * HUGE_PAGE, mmap.MADV_HUGEPAGE)
    return x


def copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense copy."""
    return empty(x, *x.shape, dtype=dtype).copy_(x)


def dense(*tensors: *Given) -> tuple[*Given]:
    """The tensors, copied where they are not contiguous."""
    given = cast("tuple[Tensor | None, ...]", tensors)
    return cast("tuple[*Given]", tuple(x if x is None or x.is_contiguous() else copy(x) for x in given))


def wide(like: Tensor, *tensors: *Given) -> tuple[*Given]:
    """All numbers in float32, or in float64 where `like` is; booleans as they are."""
    dtype = accumulation_dtype(like.dtype)
    given = cast("tuple[Tensor | None, ...]", tensors)
    cast_up = (x if x is None or x.dtype in (torch.bool, dtype) else copy(x, dtype) for x in given)
    return cast("tuple[*Given]", tuple(cast_up))


# --- the results of the forward pass ---------------------------------------------------------------------------------


def shapes(u: Tensor, A: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of y (B, L, D), the last state (B, D, N), and the checkpoints, the states between chunks (B, chunks - 1, D, N).

    The checkpoints are flat, and two numbers longer than needed. torch asks of every size whether it is 0 or 1, and a
    graph compiled or exported for any length would otherwise be held to one chunk, or to several.
    """
    (batch, length, channels), states = u.shape, A.shape[1]
    between = batch * ((length - 1) // CHUNK) * channels * states
    return (batch, length, channels), (batch, channels, states), (between + 2,)


def empty_outputs(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the three results of the forward pass, in u's dtype, which is float32 or float64."""
    y, last, checkpoints = (empty(u, *shape) for shape in shapes(u, A))
    checkpoints[-2:] = 0
    return y, last, checkpoints


def between_chunks(checkpoints: Tensor, u: Tensor, A: Tensor) -> Tensor:
    """The checkpoints as (B, chunks - 1, D, N), as a view."""
    return checkpoints[:-2].view(u.shape[0], (u.shape[1] - 1) // CHUNK, *A.shape)
