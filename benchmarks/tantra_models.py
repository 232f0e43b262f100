"""What norms, lengths and the residual path do in two trained models, MiniLM and SmolLM2 (essay B).

    cosines     scores made cosines: how often another key comes first, and what that costs. The temperature, one for
                the whole model, is chosen on other texts. Beside it each head's queries and keys, or one of the two,
                are given the mean length that they have in this head, so that the head's own scale stays
    stream      the scale of the residual stream before every layer and after the last, and its cosine with the input
    input       whether a token's own embedding is still the nearest to its vector: as it stands, and after a linear map
                from the stream to the input that was fitted on other passages (ridge regression)

SmolLM2 reads passages of Shakespeare, MiniLM sentences with ambiguous words.

    nox -s bench -- tantra_models           some three minutes of one core
    nox -s bench -- tantra_models --tiny    a few short passages, which writes nothing
"""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.intervals import bootstrap
from benchmarks.record import write
from benchmarks.sweeps import highest, lowest
from nondual.data import BANK, SENSES, shakespeare
from nondual.ops.attention import attention
from nondual.pretrained import minilm, our_smollm2

PASSAGES, LENGTH, FITTED, CHOOSING = 32, 256, 20, 4
"""Passages of SmolLM2, their tokens; the first serve the linear map, and of these the first choose the temperature."""
SHARPNESS = (6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
RIDGE = 1e-3
"""Of the mean squared length of the stream's directions."""


# --- attention with other lengths ----------------------------------------------------------------------------------


def cosines(sharpness: float) -> Callable[..., Any]:
    """An op whose scores are cosines times this."""

    def op(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return attention(F.normalize(q, dim=-1) * sharpness, F.normalize(k, dim=-1), v, **more, scale=1.0)

    return op


def of_mean_length(queries: bool, keys: bool) -> Callable[..., Any]:
    """An op that gives a head's queries, or keys, the mean length that they have in this head and passage."""

    def even(x: Tensor) -> Tensor:
        length = x.norm(dim=-1, keepdim=True)
        return x / length * length.mean(-2, keepdim=True)

    def op(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        return attention(even(q) if queries else q, even(k) if keys else k, v, **more)

    return op


class Counting:
    """Plain attention that counts for how many queries another key is first by cosine than by dot product."""

    def __init__(self) -> None:
        self.shares: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
        each = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        if more.get("causal"):
            seen = seen.tril()
        asked = slice(1, None) if more.get("causal") else slice(None)  # the first sees one key alone
        first = [
            (a @ b.mT).masked_fill(~seen, -math.inf).argmax(-1)[..., asked]
            for a, b in ((q, each), (F.normalize(q, dim=-1), F.normalize(each, dim=-1)))
        ]
        self.shares.append((first[0] != first[1]).float().mean((0, 2)))  # (H,)
        return attention(q, k, v, **more)


def put(layers: nn.ModuleList, op: Callable[..., Any]) -> None:
    for layer in layers:
        layer.mixer.op = op


# --- SmolLM2 -------------------------------------------------------------------------------------------------------


def passages(tokenizer: Any, n: int, length: int) -> Tensor:
    """Passages (n, length) of as many plays as there are, each from its middle."""
    plays = list(shakespeare().values())
    rows = []
    for i in range(n):
        text = plays[i % len(plays)]
        start = len(text) // 2 + 4 * length * (i // len(plays)) * 2
        rows.append(tokenizer(text[start : start + 8 * length])["input_ids"][:length])
    return torch.tensor(rows)


@torch.no_grad()
def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats for each token of every passage: (B,)."""
    each = [F.cross_entropy(model(row[None])[0, :-1], row[1:]) for row in ids]
    return torch.stack(each)


@torch.no_grad()
def streams(model: Any, ids: Tensor) -> Tensor:
    """What every layer reads, and what the last one leaves: (layers + 1, B, N, E)."""
    out = []
    for row in ids:
        x = model.embeddings(row[None])
        each = [x]
        for layer in model.layers:
            each.append(layer(each[-1]))
        out.append(torch.cat(each))
    return torch.stack(out, 1)


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def mapped_back(x: Tensor, first: Tensor, fitted: int) -> Tensor:
    """The input as a linear map reads it from the stream x (B, N, E), fitted on the first passages."""
    of, to = (each[:fitted, 1:].flatten(0, 1).double() for each in (x, first))
    gram = of.T @ of
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return (x[fitted:, 1:].double() @ torch.linalg.solve(gram + penalty, of.T @ to)).float()


def smollm2(tiny: bool) -> dict[str, Any]:
    model, tokenizer = our_smollm2()
    n, length, fitted, choosing = (4, 24, 2, 1) if tiny else (PASSAGES, LENGTH, FITTED, CHOOSING)
    ids, depth = passages(tokenizer, n, length), len(model.layers)
    plain = [layer.mixer.op for layer in model.layers]
    held = ids[fitted:]

    found: dict[str, Any] = {"parameters": parts(model, "embeddings")}
    true = losses(model, held)
    counting = Counting()
    put(model.layers, counting)
    losses(model, held)
    shares = torch.stack(counting.shares).view(len(held), depth, -1).mean(0)
    tried = {}
    for sharpness in SHARPNESS[:2] if tiny else SHARPNESS:
        put(model.layers, cosines(sharpness))
        tried[sharpness] = losses(model, ids[:choosing]).mean().item()
    best = lowest(tried)
    changed = {"cosines": cosines(best)} | {
        name: of_mean_length(*which)
        for name, which in (("both", (True, True)), ("queries", (True, False)), ("keys", (False, True)))
    }
    more = {}
    for name, op in changed.items():
        put(model.layers, op)
        middle, low, high = bootstrap(losses(model, held) - true)
        more[name] = {"mean": round(middle, 3), "interval": [round(low, 3), round(high, 3)]}
    for layer, op in zip(model.layers, plain):
        layer.mixer.op = op
    found["cosines"] = {
        "another key first": round(shares.mean().item(), 4),
        "by head": [round(each, 3) for each in shares.flatten().tolist()],
        "tried": {f"{each:g}": round(value, 3) for each, value in tried.items()},
        "sharpness": best,
        "loss": round(true.mean().item(), 3),
        "more loss": more,
    }

    x = streams(model, ids)
    vocabulary = F.normalize(model.embeddings.weight.detach(), dim=-1)

    def named(vectors: Tensor) -> float:
        nearest = torch.cat([(F.normalize(row, dim=-1) @ vocabulary.T).argmax(-1) for row in vectors])
        return (nearest == held[:, 1:].flatten()).float().mean().item()

    new = ~torch.isin(held[:, 1:], ids[:fitted])  # tokens that the fit has not met

    def named_new(vectors: Tensor) -> float:
        nearest = (F.normalize(vectors[new], dim=-1) @ vocabulary.T).argmax(-1)
        return (nearest == held[:, 1:][new]).float().mean().item()

    at = range(depth + 1) if not tiny else (0, depth)
    back = {i: mapped_back(x[i], x[0], fitted) for i in at}
    found["stream"] = {
        "scale": [round(median(each[:, 1:].flatten().tolist()), 4) for each in rms(x)],
        "first token": [round(each[:, 0].mean().item(), 3) for each in rms(x)],
        "cosine with the input": [round(F.cosine_similarity(each, x[0], dim=-1)[:, 1:].mean().item(), 4) for each in x],
        "nearest": {i: round(named(x[i][fitted:, 1:]), 4) for i in at},
        "nearest after a map": {i: round(named(back[i]), 4) for i in at},
        "of tokens not met": {i: round(named_new(back[i]), 4) for i in at},
        "tokens not met": int(new.sum()),
        "tokens": held[:, 1:].numel(),
    }
    return found


# --- MiniLM --------------------------------------------------------------------------------------------------------


def nearest(x: Tensor) -> Tensor:
    """Of each vector (B, E) of unit length the other that is nearest."""
    return (x @ x.T).fill_diagonal_(-2.0).argmax(-1)


@torch.no_grad()
def of_minilm(tiny: bool) -> dict[str, Any]:
    encoder = minilm()
    sentences = [one for senses in (BANK, *SENSES.values()) for each in senses.values() for one in each]
    chosen, held = sentences[:: 2 if not tiny else 40], sentences[1 :: 2 if not tiny else 40]
    layers = encoder.model.encoder.layers
    plain = [layer.mixer.op for layer in layers]
    true, to_choose = encoder.encode(held), encoder.encode(chosen)
    counting = Counting()
    put(layers, counting)
    for one in held:  # one at a time: no padding
        encoder.encode([one])
    shares = torch.stack(counting.shares).view(len(held), len(layers), -1).mean(0)
    tried = {}
    for sharpness in SHARPNESS:
        put(layers, cosines(sharpness))
        tried[sharpness] = (encoder.encode(chosen) * to_choose).sum(-1).mean().item()
    best = highest(tried)
    changed = {"cosines": cosines(best), "both": of_mean_length(True, True)}
    moved = {}
    for name, op in changed.items():
        put(layers, op)
        out = torch.cat([encoder.encode([one]) for one in held])
        middle, low, high = bootstrap((out * true).sum(-1))
        moved[name] = {
            "cosine with the true vector": {"mean": round(middle, 4), "interval": [round(low, 4), round(high, 4)]},
            "same nearest sentence": round((nearest(out) == nearest(true)).float().mean().item(), 4),
        }
    for layer, op in zip(layers, plain):
        layer.mixer.op = op
    read, real = encoder.layers(held)
    x = read[:, real]
    return {
        "parameters": parts(encoder.model, "token", "position", "segment"),
        "cosines": {
            "another key first": round(shares.mean().item(), 4),
            "by head": [round(each, 3) for each in shares.flatten().tolist()],
            "tried": {f"{each:g}": round(value, 4) for each, value in tried.items()},
            "sharpness": best,
            "moved": moved,
            "sentences": len(held),
        },
        "stream": {
            "scale": [round(each.median().item(), 4) for each in rms(x)],
            "cosine with the input": [round(F.cosine_similarity(each, x[0], dim=-1).mean().item(), 4) for each in x],
        },
    }


def parts(model: nn.Module, *tables: str) -> dict[str, int]:
    """How many parameters there are, and where."""
    each = dict.fromkeys(("embeddings", "attention", "feed-forward", "norms"), 0)
    for name, parameter in model.named_parameters():
        kind = (
            "embeddings"
            if name.startswith(tables)
            else "attention"
            if ".mixer." in name
            else "feed-forward"
            if ".feed_forward." in name
            else "norms"
        )
        each[kind] += parameter.numel()
    return each


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    tiny = "--tiny" in options
    figures = {"minilm": of_minilm(tiny), "smollm2": smollm2(tiny)}
    if not tiny:
        setup = {"passages": PASSAGES, "tokens": LENGTH, "fitted": FITTED, "choosing": CHOOSING}
        write("tantra_models", "nox -s bench -- tantra_models", figures, setup=setup)
