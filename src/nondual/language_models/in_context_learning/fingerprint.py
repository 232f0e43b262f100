"""One hash of all that a model has learnt, to show that reading a context changes none of it."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes of a model's parameters and buffers, in the order of its state.

    Two models have the same fingerprint only if every number of their state_dict is the same to the bit.

    Args:
        model: any module.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
