"""Checks of the exercises on memories that are trained while they read."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor
from torch import Tensor

from nondual.ops.ttt import ttt


def check_dual(dual: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n, d in ((1, 3), (7, 5), (16, 4)):
        q, k, v, w = torch.randn(n, d), torch.randn(n, d), torch.randn(n, d), torch.randn(d, d)
        rate = torch.rand(n) + 0.2
        given = tensor("the result", dual(q.clone(), k.clone(), v.clone(), rate.clone(), w.clone()), (n, d))
        views = [x[None, None] for x in (q, k, v)]
        right = ttt(*views, rate[None, None], [w[None]], mini_batch=n)[0][0, 0]
        if near(given, right):
            continue
        _name_the_mistake(given, q, k, v, rate, w)
        raise NotYetError(f"of {n} tokens, row {_first(given, right)} is the first that differs")


def _first(given: Tensor, right: Tensor) -> int:
    """The first row that differs, counted from 0."""
    return int((given - right).abs().amax(1).gt(1e-4).nonzero()[0])


def _name_the_mistake(given: Tensor, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, w: Tensor) -> None:
    errors, scores = k @ w - v, q @ k.T
    known = {
        "every token reads the steps of later ones too: let row t have no weight on what comes after it": q @ w
        - scores @ (rate[:, None] * errors),
        "a token is read before its own step: row t has a weight on t itself": q @ w
        - scores.tril(-1) @ (rate[:, None] * errors),
        "the steps go uphill: turn their sign": q @ w + scores.tril() @ (rate[:, None] * errors),
        "all rates are taken as 1: multiply the error of token s by rate s": q @ w - scores.tril() @ errors,
        "the rate of the token that is read multiplies all steps: rate s belongs to the error of token s": q @ w
        - rate[:, None] * (scores.tril() @ errors),
        "the steps are read, and the weights w that they start from are not: q w is missing": -scores.tril()
        @ (rate[:, None] * errors),
        "this is linear attention: the error is k w - v, and 0 - v only where w is 0": q @ w
        + scores.tril() @ (rate[:, None] * v),
        "the scores are between keys and keys: it is q that reads": q @ w - (k @ k.T).tril() @ (rate[:, None] * errors),
    }
    for says, wrong in known.items():
        if near(given, wrong):
            raise NotYetError(says)
    weights, outs = w, []
    for t in range(len(q)):
        weights = weights - rate[t] * torch.outer(k[t], k[t] @ weights - v[t])
        outs.append(q[t] @ weights)
    if near(given, torch.stack(outs)):
        raise NotYetError(
            "each gradient is taken at the weights after the step before it: in a mini-batch all are taken at w"
        )
