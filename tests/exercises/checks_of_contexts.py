"""Checks of the exercises on learning from examples in the context."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor
from torch import Tensor

# --- learning in context -------------------------------------------------------------------------------------------


def check_matrices(matrices: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for d, n, rate in ((3, 7, 0.1), (1, 2, 0.5), (5, 4, 0.02)):
        w0 = torch.randn(d)
        given = matrices(w0.clone(), rate)
        if not isinstance(given, tuple | list) or len(given) != 4:
            raise NotYetError(f"it should return four matrices, and returns {type(given).__name__}")
        names = ("W_q", "W_k", "W_v", "W_o")
        w_q, w_k, w_v, w_o = (tensor(name, w, (d + 1, d + 1)) for name, w in zip(names, given))
        x, y, question = torch.randn(n, d), torch.randn(n), torch.randn(d)
        tokens = torch.cat([x, y[:, None]], 1)
        asked = torch.cat([question, torch.zeros(1)])
        changed = change(tokens, asked, w_q, w_k, w_v, w_o)
        if not near(changed[:d], torch.zeros(d)):
            raise NotYetError("the first D numbers change: let W_o write into the last alone")

        def step(start: Tensor, x: Tensor = x, y: Tensor = y, rate: float = rate) -> Tensor:
            return rate * (y - x @ start) @ x

        right, found = -(step(w0) @ question), changed[d]
        if near(found, right):
            inside = change(tokens, tokens[0], w_q, w_k, w_v, w_o)[d]
            if near(inside, -(step(w0) @ x[0])):
                continue
            raise NotYetError("a question is right, and an example is not: its y should not enter the scores")
        if near(found, -right):
            raise NotYetError("the sign is turned: the last number should change by -Δw · x")
        if near(found, -(step(torch.zeros(d)) @ question)):
            raise NotYetError("this is the step from 0: each value should be y_i - w0 · x_i")
        if near(found, -(step(-w0) @ question)):
            raise NotYetError("the values are y_i + w0 · x_i: they should be what w0 still misses")
        if near(found * rate, right):
            raise NotYetError("the size of the step is missing")
        if near(found * n, right):
            raise NotYetError("it is divided by the number of examples: the step is on the sum, not on the mean")
        raise NotYetError(f"of {n} examples the last number changes by {found:.4g}, and should by {right:.4g}")


def change(tokens: Tensor, asked: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor) -> Tensor:
    """W_o Σ v_i (k_i · q): what linear attention adds to one token."""
    return w_o @ ((tokens @ w_v.T).T @ (tokens @ w_k.T @ (w_q @ asked)))


# --- examples in the prompt ----------------------------------------------------------------------------------------


def check_put(put: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for b, n, e in ((3, 5, 2), (1, 1, 4), (4, 4, 3)):
        x, vectors, at = torch.randn(b, n, e), torch.randn(b, e), torch.randint(n, (b,))
        before = x.clone()
        found = tensor("the result", put(x, at, vectors), (b, n, e))
        if not torch.equal(x, before):
            raise NotYetError("x itself has changed: copy it first")
        right = torch.stack([torch.cat([r[:i], v[None], r[i + 1 :]]) for r, i, v in zip(x, at.tolist(), vectors)])
        if torch.equal(found, right):
            continue
        elsewhere = torch.ones(b, n, dtype=torch.bool)
        elsewhere[torch.arange(b), at] = False
        if not torch.equal(found[elsewhere], x[elsewhere]):
            raise NotYetError("other positions change too: each row has one position of its own")
        if torch.equal(found, x):
            raise NotYetError("nothing has changed")
        raise NotYetError("row i should have vectors[i] at its position, and has another vector there")


# --- recognition as an aim -----------------------------------------------------------------------------------------


def check_recall(recall: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n, d, m, noise in ((3, 2, 4, 0.5), (0, 3, 5, 0.3), (2, 1, 2, 2.0)):
        x, tasks, shares = torch.randn(n, d), torch.randn(m, d), torch.rand(m).softmax(-1)
        y = x @ tasks[0] + noise * torch.randn(n)
        found = tensor("the mean", recall(x, y, tasks, shares, noise), (d,))
        off = (y[:, None] - x @ tasks.T).square().sum(0)

        def mean(scores: Tensor, tasks: Tensor = tasks) -> Tensor:
            return scores.softmax(-1) @ tasks

        if near(found, mean(shares.log() - off / (2 * noise**2))):
            continue
        if near(found, mean(-off / (2 * noise**2))):
            raise NotYetError(
                "the shares do not count: before any example the mean is that of the tasks by their shares"
            )
        if near(found, mean(shares - off / (2 * noise**2))):
            raise NotYetError("the shares are added to the scores: it is their logarithm that should be")
        if near(found, tasks[(shares.log() - off / (2 * noise**2)).argmax()]):
            raise NotYetError("this is the likeliest task: every task counts, by its probability")
        if near(found, mean(shares.log() - off / (2 * noise))):
            raise NotYetError("the misses are divided by twice the noise: it should be twice its square")
        raise NotYetError(f"after {n} examples the mean is {found.tolist()}, and is not by Bayes' rule")
