"""Checks of the exercise on heads that meet."""

import math
from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor
from torch import Tensor


def check_fused(fused: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for heads, d, gate in ((2, 3, 0.8), (4, 5, -0.6), (3, 1, 1.5)):
        o, w_a, w_b, w_c = (torch.randn(n, d, dtype=torch.float64) for n in (heads, d, d, d))
        given = tensor("the result", fused(o.clone(), w_a.clone(), w_b.clone(), w_c.clone(), gate), (heads, d))
        scores, values = (o @ w_a) @ (o @ w_b).T / d**0.5, o @ w_c
        if near(given, update(o, among_others(scores), values, math.tanh(gate))):
            continue
        _name_the_mistake(given, o, scores, values, gate)
        raise NotYetError(f"for {heads} heads of width {d} the result differs from the right one")


def update(o: Tensor, weights: Tensor, values: Tensor, by: float) -> Tensor:
    """O and what its heads take by these weights (H, H)."""
    return o + by * torch.tanh(weights @ values)


def among_others(scores: Tensor, dim: int = -1) -> Tensor:
    """The softmax of scores (H, H) over the other heads."""
    own = torch.eye(len(scores), dtype=torch.bool)
    return scores.masked_fill(own, -torch.inf).softmax(dim)


def _name_the_mistake(given: Tensor, o: Tensor, scores: Tensor, values: Tensor, gate: float) -> None:
    right, by = among_others(scores), math.tanh(gate)
    known = {
        "each head looks at itself too: leave its own score out before the softmax": update(
            o, scores.softmax(-1), values, by
        ),
        "the weights of a row should sum to 1: the softmax runs over the columns here": update(
            o, among_others(scores, 0), values, by
        ),
        "a row of P belongs to the head that asks, by W_A: these are the columns": update(
            o, among_others(scores.T), values, by
        ),
        "scores are divided by √D": update(o, among_others(scores * o.shape[-1] ** 0.5), values, by),
        "this is what is taken alone: add it to O": update(o, right, values, by) - o,
        "the gate goes through tanh": update(o, right, values, gate),
        "what is taken goes through tanh before the gate": o + by * right @ values,
        "heads take O W_C from one another, and not O": update(o, right, o, by),
    }
    for says, wrong in known.items():
        if near(given, wrong):
            raise NotYetError(says)
