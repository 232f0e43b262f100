"""How many tasks it takes to learn from context: the exact errors of linear attention trained on a finite set of tasks.

One layer of linear attention reads N examples and predicts xᵀ Γ h with h = 1/N Σ y_i x_i, where Γ (D, D) is what it
learns. Let it be trained on endless prompts of M fixed tasks w_1 … w_M, with x from N(0, I) and noise of variance σ².
Its best Γ follows from two moments of h. Given w, E h = w, and by the fourth moments of normal inputs
E h hᵀ = (1 + 1/N) w wᵀ + (|w|² + σ²)/N · I. So with R = 1/M Σ w wᵀ

    Γ = R ((1 + 1/N) R + (tr R + σ²)/N · I)⁻¹

This ridge solution pulls every context towards the span of the M tasks: with M < D it is blind outside of that span.
Where M, N and D grow with κ = M/D and α = N/D fixed, D·R follows the law of Marchenko and Pastur; `limit_errors` has
the two errors. For long contexts the error on new tasks becomes max(0, 1 - κ): the change lies at one task a dimension.

Source: Lu et al. 2025 (2405.11751), whose model this is, in the limit of many training contexts. Where we differ: the
formulas for finite D are derived here and need no limit; the square of y, which their features have besides h, is left
out (in their limit it counts for nothing); x has variance 1 and w variance 1/D. Symbols: D inputs, N examples, M tasks,
σ noise.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.checks import check_sizes, check_tensors


class Errors(NamedTuple):
    """Mean square errors, without the noise of the answer that is asked for.

    Attributes:
        stored: on the tasks that were trained on.
        new: on tasks drawn from N(0, I/D).
    """

    stored: float
    new: float


def optimal_matrix(tasks: Float[Tensor, "m d"], n: int, noise: float) -> Float[Tensor, "d d"]:
    """Γ of linear attention trained on endless prompts of these tasks, in float64.

    Args:
        tasks: (M, D).
        n: N, the examples of a prompt.
        noise: σ.

    Raises:
        TypeError: tasks is not a Tensor.
        ValueError: tasks that are not (M, D); n below 1 or noise below 0.
    """
    tasks = _checked(tasks, n, noise)
    R = tasks.mT @ tasks / len(tasks)  # (D, D)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    h_square = (1 + 1 / n) * R + (R.trace() + noise**2) / n * eye  # E h hᵀ
    return torch.linalg.solve(h_square, R).mT  # E w hᵀ = R


def errors(matrix: Float[Tensor, "d d"], tasks: Float[Tensor, "m d"], n: int, noise: float) -> Errors:
    """The exact errors of the prediction xᵀ Γ h for any Γ, on stored and on new tasks.

    Args:
        matrix: Γ (D, D).
        tasks: those that count as stored (M, D).
        n: N.
        noise: σ.

    Raises:
        TypeError: matrix or tasks is not a Tensor.
        ValueError: shapes that do not fit; n below 1 or noise below 0.
    """
    tasks = _checked(tasks, n, noise)
    check_tensors({"matrix": matrix})
    d = tasks.shape[1]
    if matrix.shape != (d, d):
        raise ValueError(f"matrix must be (D, D) = {(d, d)}, got {tuple(matrix.shape)}")
    G, eye = matrix.to(tasks.dtype), torch.eye(d, dtype=tasks.dtype, device=tasks.device)

    def error(R: Tensor) -> float:
        """E |w - Γ h|² for tasks with E w wᵀ = R."""
        h_square = (1 + 1 / n) * R + (R.trace() + noise**2) / n * eye
        return (R.trace() - 2 * (G @ R).trace() + (G @ h_square @ G.mT).trace()).item()

    return Errors(error(tasks.mT @ tasks / len(tasks)), error(eye / d))


def limit_errors(kappa: float, alpha: float, noise: float) -> Errors:
    """The two errors where D is large, M = κ D and N = α D.

    With c = (1 + σ²)/α and m(c) = E 1/(λ + c) over the eigenvalues λ of D·R, the error on stored tasks is c (1 - c m)
    and that on new ones 1 - 2 (1 - c m) + (1 + c)(1 - 2 c m + c² m₂), with m₂ = E 1/(λ + c)² = -dm/dc.

    Args:
        kappa: κ, tasks a dimension, above 0.
        alpha: α, examples a dimension, above 0.
        noise: σ.

    Raises:
        ValueError: kappa or alpha not above 0, or noise below 0.
    """
    for name, value in {"kappa": kappa, "alpha": alpha}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    c, g = (1 + noise**2) / alpha, 1 / kappa
    b = 1 - g + c
    root = math.sqrt(b * b + 4 * g * c)
    m = (root - b) / (2 * g * c)  # g c m² + (1 - g + c) m = 1, the law of Marchenko and Pastur
    m2 = m * (1 + g * m) / root  # -dm/dc
    return Errors(c * (1 - c * m), 1 - 2 * (1 - c * m) + (1 + c) * (1 - 2 * c * m + c * c * m2))


def _checked(tasks: Tensor, n: int, noise: float) -> Tensor:
    """The tasks in float64."""
    check_tensors({"tasks": tasks})
    if tasks.ndim != 2 or not len(tasks) or not tasks.is_floating_point():
        raise ValueError(f"tasks must be floating point (M, D), got {tasks.dtype} {tuple(tasks.shape)}")
    check_sizes(n=n)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be 0 or more, got {noise}")
    return tasks.double()
