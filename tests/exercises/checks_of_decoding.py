"""Checks of the exercises on decoding: a step with a cache, and the mask of a prefix."""

import math
from collections.abc import Callable
from typing import Any

import torch
from checking import NotYetError, near, tensor


def check_step(step: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    for n, d in ((0, 3), (1, 2), (4, 3), (6, 5)):
        q, k, v = torch.randn(3, d)
        keys, values = torch.randn(2, n, d)
        given = step(q.clone(), k.clone(), v.clone(), keys.clone(), values.clone())
        if not isinstance(given, tuple | list) or len(given) != 3:
            raise NotYetError("three things should come back: what the token takes in, the keys, the values")
        out = tensor("what the token takes in", given[0], (d,))
        if torch.is_tensor(given[1]) and given[1].shape == (n, d):
            raise NotYetError("the new key and value are not kept: the next step could not see this token")
        after = [tensor(what, x, (n + 1, d)) for what, x in (("the keys", given[1]), ("the values", given[2]))]
        all_keys, all_values = torch.cat([keys, k[None]]), torch.cat([values, v[None]])
        if n and near(after[0], torch.cat([k[None], keys])):
            raise NotYetError("the new key comes first: it should come last, as the tokens stand in the text")
        if not near(after[0], all_keys) or not near(after[1], all_values):
            raise NotYetError("keys and values should be those of before, unchanged, and then the new ones")
        scores = all_keys @ q / math.sqrt(d)
        if near(out, scores.softmax(0) @ all_values):
            continue
        if near(out, (scores * math.sqrt(d)).softmax(0) @ all_values):
            raise NotYetError("the scores are not divided by the root of D")
        if n and near(out, scores[:-1].softmax(0) @ values):
            raise NotYetError("the token does not see itself: its own key and value belong to the sum")
        if near(out, scores @ all_values):
            raise NotYetError("the scores are not made into weights: take their softmax")
        raise NotYetError(f"with {n} tokens before it the token does not take in what it should")


def check_prefix_mask(prefix_mask: Callable[..., Any]) -> None:
    for n, prefix in ((4, 0), (5, 2), (5, 5), (6, 1), (1, 0), (1, 1)):
        given = tensor("the mask", prefix_mask(n, prefix), (n, n))
        if given.dtype != torch.bool:
            raise NotYetError(f"the mask should be of bool, got {given.dtype}")
        query, key = torch.arange(n)[:, None], torch.arange(n)
        causal, before = key <= query, key < prefix
        if torch.equal(given, causal | before):
            continue
        if torch.equal(given, ~(causal | before)):
            raise NotYetError("it is the wrong way round: True is where attending is allowed")
        if torch.equal(given, causal):
            raise NotYetError("it is only causal: within the prefix the earlier tokens see the later ones too")
        if torch.equal(given, (key < query) | before):
            raise NotYetError("after the prefix no token sees itself")
        if torch.equal(given, causal | (key <= prefix)):
            raise NotYetError("the prefix is one token too long: its tokens are 0 to prefix - 1")
        if torch.equal(given, causal | (query < prefix)):
            raise NotYetError("tokens of the prefix see what comes after it")
        raise NotYetError(f"of {n} tokens with a prefix of {prefix} the wrong pairs are allowed")
