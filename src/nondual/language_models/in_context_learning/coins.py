"""Coins of unknown bias: sequences of flips, and what exactly is to be believed after each of them.

The bias of each coin is drawn from Beta(a, b). After h heads and t tails the belief about it is Beta(a + h, b + t), and
the next flip is a head with probability (a + h) / (a + b + h + t): Bayes' rule, in closed form (Laplace's rule of
succession for a = b = 1). Symbols: B coins, N flips.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nondual.ops.checks import check_sizes, check_tensors

TAIL, HEAD, BEGIN = 0, 1, 2
"""The three tokens; a sequence begins with BEGIN, after which the first flip is predicted."""
VOCABULARY = 3


def flips(
    batch: int, n: int, *, a: float = 1.0, b: float = 1.0, generator: torch.Generator | None = None
) -> Int[Tensor, "b m"]:
    """Token ids of N flips of each of B coins, with BEGIN before them: (B, N + 1).

    Args:
        batch: B.
        n: N.
        a: the bias of a coin is drawn from Beta(a, b).
        b: see a.
        generator: where the randomness comes from.

    Raises:
        ValueError: batch or n below 1, or a or b not above 0.
    """
    check_sizes(batch=batch, n=n)
    _check_prior(a, b)
    shapes = torch.tensor([[a], [b]], dtype=torch.float64).expand(2, batch)
    one, two = torch.ops.aten._standard_gamma(shapes.contiguous(), generator)
    bias = one / (one + two)  # of two Gamma variables: Beta(a, b)
    drawn = torch.rand(batch, n, dtype=torch.float64, generator=generator) < bias[:, None]
    return torch.cat([torch.full((batch, 1), BEGIN), drawn.long()], 1)


def posterior_predictive(ids: Int[Tensor, "b m"], *, a: float = 1.0, b: float = 1.0) -> Float[Tensor, "b m"]:
    """The exact probability of a head after each token of `flips`, given all before it: (B, N + 1), float64.

    Args:
        ids: (B, N + 1): BEGIN, then flips.
        a: the bias of a coin was drawn from Beta(a, b).
        b: see a.

    Raises:
        TypeError: ids is not a Tensor.
        ValueError: ids that are not as `flips` makes them, or a or b not above 0.
    """
    check_tensors({"ids": ids})
    _check_prior(a, b)
    if ids.ndim != 2 or ids.is_floating_point() or (ids[:, :1] != BEGIN).any() or (ids[:, 1:] > HEAD).any():
        raise ValueError(f"ids must be integers (B, N + 1), {BEGIN} and then flips, got {ids.dtype} {tuple(ids.shape)}")
    heads = (ids == HEAD).double().cumsum(1)
    seen = torch.arange(ids.shape[1], dtype=torch.float64, device=ids.device)
    return (a + heads) / (a + b + seen)


def divergence(exact: Float[Tensor, "*b"], scores: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """The Kullback-Leibler divergence, in nats, of a model's prediction from the exact one: 0 where they agree.

    Args:
        exact: the exact probability of a head, above 0 and below 1.
        scores: the model's scores (…, 3) for TAIL, HEAD and BEGIN; what it gives to BEGIN counts as wrong.
    """
    said = scores.double().log_softmax(-1)
    p = exact.double()
    return p * (p.log() - said[..., HEAD]) + (1 - p) * ((1 - p).log() - said[..., TAIL])


def _check_prior(a: float, b: float) -> None:
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ValueError(f"a and b must be above 0, got {a} and {b}")
