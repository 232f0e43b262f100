"""Predictors in closed form, which say what a learner makes of the first examples of a prompt, for each length of it.

    least_squares       the shortest weights that fit best
    ridge               the mean of w given the examples where w is normal: Bayes' rule
    stored_tasks        the mean of w given the examples where w is one of a finite set of tasks: Bayes' rule again
    gradient_descent    k steps from zero on the mean square error

All take x (B, N, D) and y (B, N), and give weights (B, N, D) in float64: those at place i come from the examples
before i alone, of which there are i. `predict` turns them into answers. So they stand beside a causal model that sees
the same.

Sources: Garg et al. 2022 (2208.01066), section 4; Raventós et al. 2023 (2306.15063), equations 3 and 4 (stored tasks:
dMMSE, the discrete minimum mean square error estimator); Akyürek et al. 2022 (2211.15661), section 4. Symbols: B
prompts, N examples, D inputs, M stored tasks.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nondual.ops.checks import check_tensors


def predict(weights: Float[Tensor, "b n d"], x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """w_i · x_i at each place: (B, N), in float64."""
    return (weights * x.double()).sum(-1)


def least_squares(x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """The weights with the least square error on the examples before each place; of those, the shortest.

    Args:
        x: (B, N, D).
        y: (B, N).

    Raises:
        TypeError: x or y is not a Tensor.
        ValueError: x or y of another shape, or not floating point.
    """
    x, y = _checked(x, y)
    weights = torch.zeros_like(x)
    for i in range(1, x.shape[1]):
        weights[:, i] = torch.einsum("bdn,bn->bd", torch.linalg.pinv(x[:, :i]), y[:, :i])
    return weights


def ridge(x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"], penalty: float) -> Float[Tensor, "b n d"]:
    """(Xᵀ X + penalty · I)⁻¹ Xᵀ y of the examples before each place.

    For weights drawn from N(0, τ² I) and noise of variance σ² this is the mean of w given the examples, with penalty
    σ² / τ².

    Args:
        x: (B, N, D).
        y: (B, N).
        penalty: above 0.

    Raises:
        TypeError: x or y is not a Tensor.
        ValueError: x or y of another shape, or not floating point; a penalty not above 0.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalty must be above 0, got {penalty}; for none use least_squares")
    gram, moment, _ = _before(*_checked(x, y))
    return torch.linalg.solve(gram + penalty * torch.eye(x.shape[-1], dtype=gram.dtype), moment)


def stored_tasks(
    x: Float[Tensor, "b n d"],
    y: Float[Tensor, "b n"],
    tasks: Float[Tensor, "m d"],
    noise: float,
) -> Float[Tensor, "b n d"]:
    """The mean of the stored tasks, each weighed by its probability given the examples before each place.

    All tasks have the same probability before the first example. With many examples or little noise nearly all weight
    is on the task that fits best.

    Args:
        x: (B, N, D).
        y: (B, N).
        tasks: M vectors of weights (M, D).
        noise: the standard deviation of the noise, above 0.

    Raises:
        TypeError: x, y or tasks is not a Tensor.
        ValueError: x, y or tasks of another shape; a noise not above 0.
    """
    x, y = _checked(x, y)
    check_tensors({"tasks": tasks})
    if tasks.ndim != 2 or tasks.shape[1] != x.shape[2] or not len(tasks):
        raise ValueError(f"tasks must be (M, {x.shape[2]}) with M of 1 or more, got {tuple(tasks.shape)}")
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be above 0, got {noise}")
    # --8<-- [start:stored]
    tasks = tasks.to(x.dtype)
    off = (y[..., None] - x @ tasks.mT).square()  # (B, N, M)
    probability = (-_sums_before(off) / (2 * noise**2)).softmax(-1)
    return probability @ tasks
    # --8<-- [end:stored]


def gradient_descent(
    x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"], *, steps: int, rate: float | Float[Tensor, " n"]
) -> Float[Tensor, "b n d"]:
    """Steps from w = 0 on 1/(2i) Σ (w · x - y)², over the i examples before each place.

    Args:
        x: (B, N, D).
        y: (B, N).
        steps: k, 0 or more.
        rate: the step size η, one for all places or one for each (N,).

    Raises:
        TypeError: x or y is not a Tensor.
        ValueError: x, y or rate of another shape, or not floating point; steps below 0.
    """
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    x, y = _checked(x, y)
    if isinstance(rate, Tensor):
        if rate.shape != x.shape[1:2]:
            raise ValueError(f"rate must be a number or (N,) = ({x.shape[1]},), got {tuple(rate.shape)}")
        rate = rate.to(x.dtype)[:, None]
    gram, moment, count = _before(x, y)
    gram, moment = gram / count[:, None, None], moment / count[:, None]
    weights = torch.zeros_like(x)
    for _ in range(steps):
        weights = weights + rate * (moment - torch.einsum("bnde,bne->bnd", gram, weights))
    return weights


def _before(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ x xᵀ (B, N, D, D) and Σ y x (B, N, D) of the examples before each place, and how many, at least 1, (N,)."""
    outer = torch.einsum("bnd,bne->bnde", x, x).flatten(2)
    count = torch.arange(x.shape[1], dtype=x.dtype, device=x.device).clamp(min=1)
    return _sums_before(outer).unflatten(2, (x.shape[2], -1)), _sums_before(y[..., None] * x), count


def _sums_before(each: Tensor) -> Tensor:
    """(B, N, ·) -> at place i the sum of those before i."""
    return F.pad(each.cumsum(1)[:, :-1], (0, 0, 1, 0))


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and y in float64."""
    check_tensors({"x": x, "y": y})
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (B, N, D), got {x.dtype} {tuple(x.shape)}")
    if y.shape != x.shape[:2] or not y.is_floating_point():
        raise ValueError(f"y must be floating point (B, N) = {tuple(x.shape[:2])}, got {y.dtype} {tuple(y.shape)}")
    return x.double(), y.double()
