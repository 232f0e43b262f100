"""The dtype in which sums are kept: float32, or wider where the tensors are.

Half precision has 8 or 11 bits: a sum of a thousand terms kept in it loses most of what it adds. Every operation widens
its tensors by these two functions, and narrows the result.
"""

import torch
from torch import Tensor


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """What these dtypes and float32 promote to: float32 for half precision, float64 or complex where one of them is.

    Args:
        dtypes: one or more.
    """
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def at_least_float32(x: Tensor) -> Tensor:
    """x in `accumulation_dtype(x.dtype)`: x itself where it is float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
