"""Checks of the exercises on how a text is cut."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor
from torch import Tensor

from nondual.chunking import smooth, upsample


def check_spread(spread: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n, e, share in ((1, 3, 1.0), (7, 5, 1.0), (12, 4, 0.4), (30, 2, 0.3)):
        cut = torch.rand(n) < share
        cut[0] = True
        p = torch.where(cut, 0.5 + torch.rand(n) / 2, torch.rand(n) / 2)
        p[0] = 1.0
        z = torch.randn(int(cut.sum()), e)
        given = tensor("the result", spread(z.clone(), p.clone(), cut.clone()), (n, e))
        smoothed = smooth(z[None], p[None, cut])[0]
        if near(given, upsample(smoothed, cut[None], torch.zeros(1, e))[0]):
            continue
        _name_the_mistake(given, z, p, cut)
        raise NotYetError(f"of {n} positions in {len(z)} pieces, some read something else")


def _back(s: Tensor, cut: Tensor) -> Tensor:
    return s[cut.cumsum(0) - 1]


def _name_the_mistake(given: Tensor, z: Tensor, p: Tensor, cut: Tensor) -> None:
    share = p[cut]
    right = smooth(z[None], share[None])[0][0]
    swapped = smooth(z[None], torch.cat([share[:1], 1 - share[1:]])[None])[0][0]
    raw = torch.cat([z[:1], share[1:, None] * z[1:] + (1 - share[1:, None]) * z[:-1]])
    first = smooth(z[None], p[None, : len(z)])[0][0]
    known = {
        "the pieces are not smoothed: each is mixed with the one before it": _back(z, cut),
        "the shares are swapped: P_j goes with z_j, and 1 - P_j with what was there before": _back(swapped, cut),
        "each piece is mixed with z of the one before it: it is s, which is mixed itself": _back(raw, cut),
        "the probabilities are those of the first positions: P is p at the cuts": _back(first, cut),
        "each position reads the piece before its own: a piece begins at its cut": right[
            (cut.cumsum(0) - 2).clamp(min=0)
        ],
    }
    for says, wrong in known.items():
        if near(given, wrong):
            raise NotYetError(says)
