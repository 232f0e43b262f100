"""Checks of the exercises on connections over depth."""

from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor

from nondual.recent.attention_residuals import DepthAttention, keys_of


def check_without(without: Callable[..., Any]) -> None:
    for i, j in ((5, 2), (3, 1), (4, 4), (1, 1), (6, 5)):
        given = tensor("the result", without(i, j), (i + 1,)).double()
        added = torch.randn(
            i + 1, 7, generator=torch.Generator().manual_seed(i)
        ).double()  # by the embeddings, each layer
        kept = added.cumsum(0)  # X_0 to X_i
        right = kept[-1] - added[j]
        found = given @ kept
        if near(found, right):
            continue
        case = f"for i = {i} and j = {j}: "
        if near(found, kept[-1]):
            raise NotYetError(case + "nothing is left out: X_i has what layer j added in it, so subtract it")
        if near(found, kept[-1] - kept[j]):
            raise NotYetError(case + "all that was there after layer j is taken out: what it read should stay")
        if near(found, kept[-1] + added[j]):
            raise NotYetError(case + "what layer j added is there twice: turn the signs")
        if i == j and near(found, kept[-1] + kept[j - 1]):
            raise NotYetError(case + "X_i and X_j are one here, and their weights add up to 0")
        if j < i and near(found, kept[-1] - added[j + 1]):
            raise NotYetError(case + f"what layer {j + 1} added is left out: X_0 are the embeddings, X_1 is layer 1's")
        raise NotYetError(case + "the weighted sum is not the stream without what layer j added")


def check_average(average: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for layers, b, n, e in ((3, 2, 5, 4), (1, 1, 1, 3), (4, 4, 4, 4)):
        vectors = [(1 + 3 * k) * torch.randn(b, n, e) for k in range(layers)]
        query = torch.randn(e)
        attention = DepthAttention(e)
        with torch.no_grad():
            attention.query.copy_(query)
            keys = [keys_of(x, eps=0.0) for x in vectors]
            right = attention(vectors, keys)
            weights = attention.weights(keys)[..., None]
        found = tensor("the result", average(query.clone(), [x.clone() for x in vectors]), (b, n, e))
        if near(found, right):
            continue
        stacked = torch.stack(vectors)
        raw = (stacked @ query).softmax(0)[..., None]
        scores = torch.stack(keys) @ query
        if near(found, (raw * stacked).sum(0)):
            raise NotYetError("long vectors get more weight: divide each by the root of its mean square for its key")
        if near(found, (weights * torch.stack(keys)).sum(0)):
            raise NotYetError("the keys are summed: the weights are for the vectors themselves")
        if near(found, stacked.mean(0)):
            raise NotYetError("all layers count alike: use the query")
        if near(found, stacked.sum(0)):
            raise NotYetError("this is the plain sum: weigh the layers")
        if n > 1 and near(found, (scores.softmax(-1)[..., None] * stacked).sum(0)):
            raise NotYetError("the softmax is over positions: it should be over layers")
        if near(found, (scores[..., None] * stacked).sum(0)):
            raise NotYetError("the scores are the weights: take their softmax over layers")
        lengths = stacked.norm(dim=-1, keepdim=True)
        if near(found, (((stacked / lengths) @ query).softmax(0)[..., None] * stacked).sum(0)):
            raise NotYetError("keys have length 1: divide by the root of the mean square, not of the sum")
        raise NotYetError(f"over {layers} layers of {b} x {n} positions the average differs from the right one")
