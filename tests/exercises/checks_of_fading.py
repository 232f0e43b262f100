"""Checks of the exercise on keys that are let go."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, tensor
from torch import Tensor


def check_kept(kept: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, bound, epsilon in ((40, 0.5, 0.1), (97, 2.0, 0.01), (80, 1.0, 0.5), (1, 1.0, 0.1)):
        log_forget = -torch.rand(n, dtype=torch.float64, generator=generator)
        given = tensor("the result", kept(log_forget.clone(), bound, epsilon), (n,))
        if given.dtype != torch.int64:
            raise NotYetError(f"the result should be of int64, and is of {str(given.dtype).removeprefix('torch.')}")
        right = _counted(log_forget, bound, epsilon)
        if torch.equal(given, right):
            continue
        _name_the_mistake(given, log_forget, bound, epsilon, right)
        i = int((given != right).nonzero()[0])
        raise NotYetError(f"step {i} of {n} keeps {int(right[i])} keys, and not {int(given[i])}")


def _counted(
    log_forget: Tensor, bound: float, epsilon: float, *, own_gate: bool = False, summed: bool = True
) -> Tensor:
    """The right answer step by step; or with the key's own gate counted too, or each bound taken by itself."""
    out = []
    for i in range(len(log_forget)):
        decay = torch.stack([log_forget[j + (not own_gate) : i + 1].sum() for j in range(i + 1)])
        bounds = (2 * bound + decay).exp()
        goes = (bounds.cumsum(0) if summed else bounds) <= epsilon
        out.append(i + 1 - min(int(goes.sum()), i))
    return torch.tensor(out)


def _name_the_mistake(given: Tensor, log_forget: Tensor, bound: float, epsilon: float, right: Tensor) -> None:
    steps = torch.arange(1, len(log_forget) + 1)
    known = {
        "a weight is bounded by e^(2 bound + d): one bound for its score, one for the query's own": _counted(
            log_forget, bound / 2, epsilon
        ),
        "each bound is compared with epsilon by itself: it is their sum that may not exceed it": _counted(
            log_forget, bound, epsilon, summed=False
        ),
        "a key's own gate fades what came before it, and not the key: the sum begins at j + 1": _counted(
            log_forget, bound, epsilon, own_gate=True
        ),
        "these are the keys that are gone: count those that stay": steps - right,
        "nothing is let go": steps,
        "the query's own key is not counted": right - 1,
    }
    for says, wrong in known.items():
        if torch.equal(given, wrong):
            raise NotYetError(says)
