"""Checks of the exercises on the roles of query and key."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor


def check_antisymmetric_share(antisymmetric_share: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    w_q, w_k = torch.randn(2, 7, 3, dtype=torch.float64)
    swap = torch.tensor([[0.0, 1], [-1, 0]], dtype=torch.float64)
    for case, q, k, right in (
        ("for W_Q = W_K", w_q, w_q, 0.0),
        ("for W_K = W_Q times an antisymmetric matrix", w_q[:, :2], w_q[:, :2] @ swap, 1.0),
        ("for two random matrices", w_q, w_k, None),
    ):
        m = q @ k.T
        part, size = (m - m.T) / 2, m.square().sum()
        right = float(part.square().sum() / size) if right is None else right
        found = antisymmetric_share(q.clone(), k.clone())
        try:
            found = float(found)
        except (TypeError, ValueError) as error:
            raise NotYetError(f"the result should be a number, got {type(found).__name__}") from error
        if abs(found - right) < 1e-6:
            continue
        if abs(found - (1 - right)) < 1e-6:
            raise NotYetError(f"{case}: this is the share of the symmetric part")
        if abs(found - right**0.5) < 1e-6:
            raise NotYetError(f"{case}: this is a ratio of norms: square them")
        if abs(found - 4 * right) < 1e-6:
            raise NotYetError(f"{case}: A is half of M less its transpose")
        raise NotYetError(f"{case} the share should be {right:.3f}, got {found:.3f}")


def check_step(step: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    for n, e, d in ((3, 5, 2), (1, 4, 4), (6, 3, 3)):
        g, size = torch.randn(n, e, dtype=torch.float64), 0.1
        w_q, w_k = torch.randn(2, e, d, dtype=torch.float64)
        q, k = g @ w_q, g @ w_k
        weights = (q @ k.T / d**0.5).softmax(-1)
        asking, asked = weights @ k @ w_q.T, weights.T @ q @ w_k.T
        found = tensor("the result", step(g.clone(), w_q.clone(), w_k.clone(), size), (n, e))
        if near(found, g + size * (asking + asked)):
            continue
        case = f"for {n} tokens: "
        if near(found, g - size * (asking + asked)):
            raise NotYetError(case + "the energy rises: go against the gradient")
        if near(found, asking + asked) or near(found, size * (asking + asked)):
            raise NotYetError(case + "this is the way of the step: add it to g")
        if near(found, g + size * asking):
            raise NotYetError(case + "each token moves only because it asks: it is a key, too")
        if near(found, g + size * asked):
            raise NotYetError(case + "each token moves only because it is asked: it asks, too")
        if near(found, g + size * (asking + weights @ q @ w_k.T)):
            raise NotYetError(case + "as a key a token is moved by the column of weights, not by its row")
        if near(found, g + size * (asking + asked) / d**0.5):
            raise NotYetError(case + "1/β before the sum and β in the exponent cancel: the gradient has no √D left")
        raise NotYetError(case + "the step differs from the right one")
