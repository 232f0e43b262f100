"""What the scans and the convolution before them refuse alike: a shape, a dtype or a device that does not fit."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_tensors(required: Mapping[str, object], optional: Mapping[str, object] | None = None) -> None:
    """Refuse what is not a tensor, such as a numpy array, a list or a number.

    Args:
        required: arguments by name, each of which must be a Tensor.
        optional: arguments by name, each of which must be a Tensor or None.

    Raises:
        TypeError: the first that is not.
    """
    for name, x in required.items():
        if not isinstance(x, Tensor):
            raise _no_tensor(name, x)
    for name, x in (optional or {}).items():
        if x is not None and not isinstance(x, Tensor):
            raise _no_tensor(name, x)


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1.

    Args:
        sizes: by name.

    Raises:
        ValueError: the first that is.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")


def check_shapes(expected: dict[str, tuple[Tensor | None, tuple[int, ...], str]]) -> None:
    """Refuse a tensor of another shape than the one named beside it, in numbers and in letters.

    Raises:
        ValueError: the first that differs.
    """
    for name, (x, shape, letters) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {letters} = {shape}, got {tuple(x.shape)}")


def check_kinds(timed: dict[str, Tensor | None], others: dict[str, Tensor | None], reset: Tensor | None) -> None:
    """Refuse what is not real and floating, what is timed and not of the first one's dtype, what is on another device.

    Args:
        timed: what is of one dtype, as what comes with every step; the first of them sets dtype and device.
        others: parameters and states, of any floating dtype.
        reset: True where a sequence begins.

    Raises:
        ValueError: the first that differs.
    """
    if reset is not None and reset.dtype != torch.bool:
        raise ValueError(f"reset must be boolean, True where a sequence begins, got {reset.dtype}")
    lead, first = next((name, x) for name, x in timed.items() if x is not None)
    for name, x in (timed | others).items():
        if x is not None and not x.is_floating_point():
            kind = "real, " if x.is_complex() else ""
            raise ValueError(f"{name} must be {kind}floating point, got {x.dtype}")
        if name in timed and x is not None and x.dtype != first.dtype:
            raise ValueError(
                f"{name} must have the dtype of {lead}, {first.dtype}, got {x.dtype}; convert it with .to({lead}.dtype)"
            )
    for name, x in (timed | others | {"reset": reset}).items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name} must be on the device of {lead}, {first.device}, got {x.device}")


def check_chunk(chunk: object) -> None:
    """Refuse what is no number of steps, nor None for the engine's own.

    Raises:
        ValueError: what it must be, and what it is.
    """
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be an integer of 1 or more, or None for the engine's own, got {chunk!r}")


def _no_tensor(name: str, x: object) -> TypeError:
    kind = type(x).__name__
    remedy = "from_numpy" if kind == "ndarray" else "tensor"
    return TypeError(f"{name} must be a Tensor, got {kind}; use torch.{remedy}({name})")
