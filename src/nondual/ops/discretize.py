"""From a continuous linear system to one step of length Δ: the rules that the scans and the state space models share.

    h' = A h + B u   ->   h_t = Ā h_{t-1} + B̄ u_t

Source: Gu, Goel and Ré 2022 (2111.00396), section 2.3, for the bilinear rule; Gu and Dao 2023 (2312.00752), equation 4,
for zero-order hold, and its released code for the rule here called "zoh-euler". Symbols: Δ the step's length, A a
diagonal, real or complex.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Discretization = Literal["zoh-euler", "zoh"]


def discretize(
    delta: Tensor, A: Tensor, B: Tensor, rule: Discretization | Literal["bilinear"] = "zoh-euler"
) -> tuple[Tensor, Tensor]:
    """Ā and B̄ of one step of length delta, for a diagonal A, real or complex; the shapes broadcast.

    Args:
        delta: Δ.
        A: the diagonal.
        B: what the input is multiplied by.
        rule: "zoh" holds the input constant during the step and is then exact;
            "zoh-euler" takes Δ B for the input, which is exact to first order in Δ;
            "bilinear" is the trapezoidal rule.
    """
    # --8<-- [start:discretize]
    step = delta * A
    if rule == "bilinear":  # (1 - ΔA/2)⁻¹ (1 + ΔA/2) and (1 - ΔA/2)⁻¹ ΔB
        return (1 + step / 2) / (1 - step / 2), delta * B / (1 - step / 2)
    return torch.exp(step), delta * B * (phi(step) if rule == "zoh" else 1)
    # --8<-- [end:discretize]


def phi(x: Tensor) -> Tensor:
    """(eˣ - 1) / x, and 1 at 0, with all its derivatives: near 0 by its series."""
    near = x.abs() < 0.1
    far = torch.where(near, torch.ones_like(x), x)
    series = torch.ones_like(x)
    for k in range(12, 1, -1):  # Horner: 1 + x/2 (1 + x/3 (1 + x/4 (…)))
        series = 1 + torch.where(near, x, torch.zeros_like(x)) / k * series
    return torch.where(near, series, torch.expm1(far) / far)


def step_length(delta: Tensor, bias: Tensor | None = None, softplus: bool = False) -> Tensor:
    """The step lengths Δ: delta, its bias (D,) added, and the softplus of that if asked for."""
    delta = delta if bias is None else delta + bias
    return F.softplus(delta) if softplus else delta
