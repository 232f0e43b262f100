"""Prompts of a function: examples (x, f(x)) with noise, for functions and inputs of any family.

    prompts(64, 16, 5, noise=0.25)                              # random linear functions of standard normal inputs
    prompts(64, 16, 5, functions=linear(sparse(1)))             # of one input alone
    prompts(64, 16, 5, functions=linear(stored(tasks)))         # of a finite set of tasks
    prompts(64, 16, 5, functions=relu_network(20))              # not linear
    prompts(64, 16, 5, inputs=partial(normal, mean=2.0))        # shifted inputs

A family of functions draws a function for each prompt; a family of inputs draws what the functions are given. Over
standard normal inputs every family here has E f(x)² = 1, so that errors can be compared.

Sources: Garg et al. 2022 (2208.01066), sections 3 and 4; a finite set of tasks: Raventós et al. 2023 (2306.15063),
section 2. Where we differ: weights have variance 1/D, not 1, for the scale just named. Symbols: B prompts, N examples,
D inputs, M stored tasks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.checks import check_sizes

Inputs: TypeAlias = Callable[[int, int, int, torch.Generator | None], Tensor]
"""(B, N, D, generator) -> x (B, N, D)."""
Weights: TypeAlias = Callable[[int, int, torch.Generator | None], Tensor]
"""(B, D, generator) -> one vector of weights a prompt, (B, D)."""
Functions: TypeAlias = Callable[[int, int, torch.Generator | None], Callable[[Tensor], Tensor]]
"""(B, D, generator) -> a function from x (B, N, D) to f(x) (B, N), another in each of the B rows."""


class Prompts(NamedTuple):
    """Examples of B functions.

    Attributes:
        x: inputs (B, N, D).
        y: answers (B, N), with noise: what a model reads.
        target: answers (B, N) without noise.
    """

    x: Tensor
    y: Tensor
    target: Tensor


# --- inputs --------------------------------------------------------------------------------------------------------


def normal(
    batch: int,
    n: int,
    d: int,
    generator: torch.Generator | None = None,
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    dims: int | None = None,
) -> Float[Tensor, "b n d"]:
    """Normal inputs (B, N, D); by `functools.partial` shifted, scaled, or of the first few dimensions alone.

    Args:
        batch: B.
        n: N.
        d: D.
        generator: where the randomness comes from.
        mean: of every dimension.
        scale: the standard deviation of every dimension.
        dims: the dimensions after the first `dims` are 0, as in the beginning of a curriculum; None for all.
    """
    x = mean + scale * torch.randn(batch, n, d, generator=generator)
    if dims is not None:
        x[..., dims:] = 0
    return x


# --- weights of linear functions -----------------------------------------------------------------------------------


def dense(batch: int, d: int, generator: torch.Generator | None = None) -> Float[Tensor, "b d"]:
    """Every weight normal, with variance 1/D."""
    return torch.randn(batch, d, generator=generator) / math.sqrt(d)


def sparse(count: int) -> Weights:
    """A family of weights of which `count`, drawn anew for each prompt, are not 0.

    Raises:
        ValueError: count below 1; when drawn, count above D.
    """
    check_sizes(count=count)

    def draw(batch: int, d: int, generator: torch.Generator | None = None) -> Tensor:
        if count > d:
            raise ValueError(f"count must be at most the number of inputs, {d}, got {count}")
        kept = torch.rand(batch, d, generator=generator).argsort(1) < count
        return torch.randn(batch, d, generator=generator) * kept / math.sqrt(count)

    return draw


def stored(tasks: Float[Tensor, "m d"]) -> Weights:
    """A family of weights that are drawn, each as often, from the rows of a table.

    Args:
        tasks: M vectors of weights (M, D).

    Raises:
        ValueError: tasks that are not (M, D), or none; when drawn, another D.
    """
    if tasks.ndim != 2 or not len(tasks):
        raise ValueError(f"tasks must be (M, D) with M of 1 or more, got {tuple(tasks.shape)}")

    def draw(batch: int, d: int, generator: torch.Generator | None = None) -> Tensor:
        if d != tasks.shape[1]:
            raise ValueError(f"tasks must have as many weights as there are inputs, {d}, got {tasks.shape[1]}")
        return tasks[torch.randint(len(tasks), (batch,), generator=generator)]

    return draw


# --- functions -----------------------------------------------------------------------------------------------------


def linear(weights: Weights = dense) -> Functions:
    """The family f(x) = w · x.

    Args:
        weights: the family of w: `dense`, `sparse(count)` or `stored(tasks)`.
    """

    def draw(batch: int, d: int, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
        w = weights(batch, d, generator)
        return lambda x: torch.einsum("bnd,bd->bn", x, w)

    return draw


def quadratic(batch: int, d: int, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
    """The family f(x) = Σ w_i (x_i² - 1) / √2: no linear function of x is of any use."""
    w = dense(batch, d, generator)
    return lambda x: torch.einsum("bnd,bd->bn", (x.square() - 1) / math.sqrt(2), w)


def relu_network(hidden: int) -> Functions:
    """The family of networks with one hidden layer: f(x) = a · relu(V x).

    Raises:
        ValueError: hidden below 1.
    """
    check_sizes(hidden=hidden)

    def draw(batch: int, d: int, generator: torch.Generator | None = None) -> Callable[[Tensor], Tensor]:
        v = torch.randn(batch, hidden, d, generator=generator) / math.sqrt(d)
        a = torch.randn(batch, hidden, generator=generator) * math.sqrt(2 / hidden)
        return lambda x: torch.einsum("bnh,bh->bn", torch.einsum("bnd,bhd->bnh", x, v).relu(), a)

    return draw


def prompts(
    batch: int,
    n: int,
    d: int,
    *,
    functions: Functions | None = None,
    inputs: Inputs = normal,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Prompts:
    """N examples of each of B functions.

    Args:
        batch: B.
        n: N.
        d: D.
        functions: their family; `linear()` where left out.
        inputs: the family of the inputs.
        noise: the standard deviation of what is added to the answers.
        generator: where the randomness comes from.

    Returns:
        x (B, N, D), y (B, N) and the answers without noise (B, N), float32.

    Raises:
        ValueError: a size below 1, noise below 0, or what the families refuse.
    """
    check_sizes(batch=batch, n=n, d=d)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a number of 0 or more, got {noise}")
    function = (linear() if functions is None else functions)(batch, d, generator)
    x = inputs(batch, n, d, generator)
    target = function(x)
    return Prompts(x, target + noise * torch.randn(batch, n, generator=generator), target)


def curriculum(
    step: int, steps: int, *, dims: tuple[int, int], lengths: tuple[int, int], rises: float = 0.5
) -> tuple[int, int]:
    """How many dimensions and how many examples the prompts of a step have: few at first, all later.

    Source: 2208.01066, appendix A.2, where both grow in steps of equal length.

    Args:
        step: 0 for the first of the steps.
        steps: how many there are.
        dims: the number of dimensions at first and at last.
        lengths: the number of examples at first and at last.
        rises: the share of the steps after which both have their last value.

    Returns:
        (dimensions, examples).

    Raises:
        ValueError: a step that is not one of 0 to steps - 1, or rises outside of (0, 1].
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in 0 to steps - 1, got {step} of {steps}")
    if not 0 < rises <= 1:
        raise ValueError(f"rises must be above 0 and at most 1, got {rises}")
    share = min(1.0, step / (rises * steps))
    first, last = zip(dims, lengths)
    d, n = (low + int(share * (high - low) + 1e-9) for low, high in zip(first, last))
    return d, n
