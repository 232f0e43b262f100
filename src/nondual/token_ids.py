"""Token ids where they enter a model: checked once, by one function."""

import torch
from jaxtyping import Integer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nondual.ops.checks import check_tensors
from nondual.ops.impl import refuses_transforms


def check_ids(name: str, ids: Integer[Tensor, "b n"], size: int) -> Integer[Tensor, "b n"]:
    """ids as an embedding of `size` rows takes them, in int32 or int64; refused where they do not fit it.

    Args:
        name: what the caller calls them, for the errors.
        ids: (B, N), of any integer dtype.
        size: the number of rows; each id is below it.

    Raises:
        TypeError: ids that are not a tensor.
        ValueError: ids that are not integers (B, N), or one out of range. The range is left to torch's own embedding
            where values cannot be looked at.
    """
    check_tensors({name: ids})
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers (B, N), got {ids.dtype} {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        ids = ids.long()
    if has_values(ids) and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < size:
            raise ValueError(f"{name} must lie in 0 to {size - 1}, got {low} to {high}")
    return ids


def has_values(x: Tensor) -> bool:
    """Whether the numbers in x can be looked at: not while it is compiled or exported, on meta, or inside vmap."""
    unseen = torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor)
    return not unseen and not refuses_transforms(x)
