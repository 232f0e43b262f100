"""Checks of the exercises on the Continuous Thought Machine."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor

from nondual.recent import Synchronisation
from nondual.recent.ctm_parts import Sums


def check_one_tick(one_tick: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    p = 5
    judge = Synchronisation(torch.arange(2 * p).view(2, p), 2 * p)
    r = torch.tensor([0.0, 0.3, 1.0, 2.5, 0.0])
    alpha, beta, sums = torch.zeros(p), torch.zeros(p), judge.new_state(1)
    with torch.no_grad():
        judge.decay.copy_(r)
        for tick in range(1, 4):
            z = torch.randn(1, 2 * p)
            left, right = z[0].view(2, p)
            given = one_tick(alpha.clone(), beta.clone(), left.clone(), right.clone(), r.clone())
            if not isinstance(given, tuple | list) or len(given) != 3:
                raise NotYetError(f"it should return S, alpha and beta, and returns {type(given).__name__}")
            found = [tensor(name, x, (p,)) for name, x in zip(("S", "alpha", "beta"), given)]
            (synchronised, now), before = judge(z, sums), sums
            exact = (synchronised[0], now.products[0], now.weights)
            compare(tick, found, exact, before, left * right, r)
            (alpha, beta), sums = exact[1:], now


def compare(tick: int, found: list[torch.Tensor], exact: Any, before: Sums, product: torch.Tensor, r: Any) -> None:
    """Name the mistake, if there is one."""
    (s, alpha, beta), (exact_s, exact_alpha, exact_beta), kept = found, exact, torch.exp(-r)
    when = f"at tick {tick} "
    if near(alpha, before.products[0] + product) and not near(alpha, exact_alpha):
        raise NotYetError(when + "alpha is a sum in which nothing decays: multiply what was there by e^-r")
    if near(alpha, (before.products[0] + product) * kept) and not near(alpha, exact_alpha):
        raise NotYetError(when + "the new product has decayed too: let only what was there decay")
    if not near(alpha, exact_alpha):
        raise NotYetError(when + f"alpha should be {exact_alpha[1]:.4f} for the second pair, and is {alpha[1]:.4f}")
    if near(beta, before.weights + 1) and not near(beta, exact_beta):
        raise NotYetError(when + "beta counts ticks: let it decay by e^-r as alpha does")
    if not near(beta, exact_beta):
        raise NotYetError(when + f"beta should be {exact_beta[1]:.4f} for the second pair, and is {beta[1]:.4f}")
    if near(s, exact_alpha / exact_beta) and not near(s, exact_s):
        raise NotYetError(when + "S is divided by beta: divide by its root")
    if near(s, exact_alpha) and not near(s, exact_s):
        raise NotYetError(when + "S is alpha itself: divide by the root of beta")
    if not near(s, exact_s):
        raise NotYetError(when + f"S should be {exact_s[1]:.4f} for the second pair, and is {s[1]:.4f}")


def check_when_to_stop(when_to_stop: Callable[..., Any]) -> None:
    rows = {
        "one that is sure at tick 2, and then less": [0.1, 0.8, 0.5, 0.9],
        "one that is sure from the first tick": [0.9, 0.9, 0.9, 0.9],
        "one that is never sure": [0.1, 0.6, 0.3, 0.2],
        "one that reaches the threshold exactly": [0.1, 0.2, 0.75, 0.8],
        "one that is sure at the last tick": [0.1, 0.2, 0.3, 0.8],
    }
    exact = torch.tensor([2, 1, 4, 3, 4])
    found = tensor("the ticks", when_to_stop(torch.tensor(list(rows.values())), 0.75), (5,))
    if found.dtype != torch.int64:
        raise NotYetError(f"the ticks should be int64, and are {found.dtype}")
    if torch.equal(found, exact):
        return
    if torch.equal(found, exact - 1):
        raise NotYetError("ticks are counted from 0: the first is 1")
    for row, (name, ticks) in enumerate(zip(rows, exact.tolist())):
        if found[row] != ticks:
            raise NotYetError(f"{name} takes {found[row]}, and should take {ticks}")
