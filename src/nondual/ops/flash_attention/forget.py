"""Forget gates: by how much a score has decayed when a query comes to a key, as sums that may be subtracted.

Source: Lin et al. 2025, "Forgetting Transformer" (2503.02130), section 3: the score of query i and key j gains the sum
of log f over the positions j + 1 … i, which is c_i - c_j with c the running sum of log f.

Where we differ: in float32 that difference is worth nothing after a while. After 4,000 gates of e^-50, c is about
-200,000 and known to 0.008, however weak the decay between two neighbours is. So c is summed in float64. And a gate of
0 has the logarithm -inf, whose differences are NaN: it is not summed. Instead each position knows the first key that it
can still see, and c begins anew there.

Symbols: B batch, H query heads, N queries, M keys, f_l the gate at position l. Query i stands at position i + M - N.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

CLOSED = -1e6
"""A gate whose logarithm is below this counts as 0, as exp(-1e6) does. A larger one would leave c no digits."""


class Forget(NamedTuple):
    """What `sums_of` makes of the gates."""

    sums: Float[Tensor, "b h m"]  # c in float64, from the last gate of 0 on
    first: Integer[Tensor, "b h m"]  # the position of that gate, 0 where there is none: the first key still seen


def sums_of(log_forget: Float[Tensor, "b h m"]) -> Forget:
    """c and the first key seen at each position, in plain torch: the gradient of c reaches log_forget by itself.

        log f    -1   -2   -∞   -4        c        0   -2    0   -4
                                          first    0    0    2    2

    The gradient of log f_l is then the sum of that of c from l to the next gate of 0, in float64; that of a gate of 0,
    and of the first one, which stands before no key, is 0.

    Args:
        log_forget: (B, H, M), 0 or less.
    """
    closed = log_forget < CLOSED
    places = torch.arange(log_forget.shape[-1], device=log_forget.device).expand(log_forget.shape)
    first = torch.where(closed, places, 0).cummax(-1).values
    sums = log_forget.double().masked_fill(closed, 0).cumsum(-1)
    return Forget(sums - sums.gather(-1, first), first)


def between(forget: Forget, queries: Tensor, keys: Tensor) -> Tensor:
    """c_i - c_j for some queries and keys, (B, H, queries, keys) in float64; -inf where the key is forgotten.

    Args:
        forget: the gates.
        queries: positions among the keys; those below 0, which see no key, are taken as 0.
        keys: positions.
    """
    queries = queries.clamp(min=0)
    sums, first = forget.sums, forget.first
    decay = sums[..., queries, None] - sums[..., None, keys]
    return decay.masked_fill(keys < first[..., queries, None], -torch.inf)
