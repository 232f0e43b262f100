"""What the host side of every Triton kernel shares: memory layout, block sizes, and which chip it is.

An operation's own Triton package imports torch, triton, math, itself and this file.
"""

import torch
from torch import Tensor


def block_size(width: int) -> int:
    """The power of two, 16 or more, that holds `width` numbers; 16 is the least that `tl.dot` takes."""
    return max(16, 1 << (width - 1).bit_length())


def contiguous_rows(x: Tensor) -> Tensor:
    """x with the numbers of its last axis side by side in memory, copied only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def chip_of(device: torch.device) -> str:
    """The architecture of a device, as tables of tile sizes name it: "sm_90" for Hopper, "sm_100" for Blackwell,
    "gfx942" for AMD, "sm_80" for every other GPU, and where there is none."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def multiprocessors(device: torch.device, otherwise: int) -> int:
    """How many multiprocessors a CUDA device has; `otherwise` where the device is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else otherwise


def strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """The strides of tensors under the names that a kernel gives them.

    Args:
        axes: a letter for each of the first axes: strides("bhn", q=q, dk=dk) is {"s_qb": …, "s_qh": …, "s_qn": …,
            "s_dkb": …, "s_dkh": …, "s_dkn": …}, to be given to a launch by `**`.
        tensors: each with at least as many axes.
    """
    return {f"s_{name}{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}
