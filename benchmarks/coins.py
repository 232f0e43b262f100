"""A real language model reads flips of coins written as words, beside Bayes' rule.

Each coin's bias is drawn evenly from 0 to 1. SmolLM2-135M-Instruct, with frozen weights, reads "heads, tails, heads, …"
under three openings; after each flip we take the share of `heads` of what it gives to the two words together. Beside
it, the exact probability for that prior (Laplace's rule), one that never moves from one half, and one that expects the
last flip again. Of Beta(a, a) with flips that count less the longer ago they were, the a and the half-life are fitted
on half of the coins and judged on the other half.

    nox -s bench -- coins            two minutes of one core
    nox -s bench -- coins --tiny     few and short ones, which writes nothing to docs/measured
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.intervals import bootstrap
from benchmarks.record import write
from nondual.language_models.in_context_learning import coins, fingerprint
from nondual.language_models.in_context_learning.coins import HEAD

OPENINGS = ("Flips of one coin: ", "A coin that may be biased is flipped again and again: ", "")
"""What stands before the flips; with the last, nothing does."""
COINS, FLIPS, BATCH = 32, 64, 8


def texts(ids: Tensor, opening: str) -> list[str]:
    """Each row of flips as words, with a comma after each."""
    words = ("tails", "heads")
    return [opening + ",".join([f" {words[i]}" for i in row] + [""]).strip() for row in ids[:, 1:].tolist()]


@torch.no_grad()
def read(model: Any, tokenizer: Any, ids: Tensor, opening: str) -> tuple[Tensor, Tensor]:
    """After 1 to N flips: the share of heads (B, N), and what the two words get together (B, N)."""
    heads, tails = (tokenizer.encode(f" {word}", add_special_tokens=False) for word in ("heads", "tails"))
    comma = tokenizer.encode(",", add_special_tokens=False)
    assert len(heads) == len(tails) == len(comma) == 1, "each word and the comma must be one token"
    shares, known = [], []
    for part in ids.split(BATCH):
        tokens = tokenizer(texts(part, opening), return_tensors="pt", add_special_tokens=False)["input_ids"]
        told = model(tokens).logits.softmax(-1)
        at = (tokens == comma[0]).nonzero()[:, 1].view(len(part), -1)[:, -(ids.shape[1] - 1) :]
        two = torch.stack([told[..., tails[0]], told[..., heads[0]]], -1).gather(1, at[..., None].expand(-1, -1, 2))
        known.append(two.sum(-1))
        shares.append(two[..., 1] / two.sum(-1))
    return torch.cat(shares).double(), torch.cat(known).double()


def divergence(exact: Tensor, said: Tensor) -> Tensor:
    """Of two probabilities of a head, in nats."""
    return exact * (exact / said).log() + (1 - exact) * ((1 - exact) / (1 - said)).log()


def fading(ids: Tensor, a: float, half_life: float) -> Tensor:
    """After 1 to N flips, as Beta(a, a) has it, if a flip counts half as much for every half_life flips after it."""
    decay = 0.5 ** (1 / half_life)
    heads, seen = torch.zeros(len(ids), dtype=torch.float64), 0.0
    found = []
    for flip in ids[:, 1:].unbind(1):
        heads, seen = decay * heads + (flip == HEAD).double(), decay * seen + 1
        found.append((a + heads) / (2 * a + seen))
    return torch.stack(found, 1)


def fitted(ids: Tensor, said: Tensor) -> dict[str, Any]:
    """The a and the half-life nearest to what the model says on the first half; how near they are on the second."""
    half = len(ids) // 2
    grid = [(a, life) for a in (0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0) for life in (1, 2, 4, 8, 16, 32, 64, 1e9)]

    def off(rows: slice, a: float, life: float) -> float:
        return divergence(fading(ids[rows], a, life), said[rows]).mean().item()

    a, life = min(grid, key=lambda pair: off(slice(half), *pair))
    return {
        "a": a,
        "half-life": life if life < 1e9 else None,
        "divergence": round(off(slice(half, None), a, life), 5),
        "of Laplace's rule there": round(off(slice(half, None), 1.0, 1e9), 5),
    }


def interval(each: Tensor) -> dict[str, float]:
    """The mean over the coins (C,), and its 95 % interval by drawing the coins anew."""
    return {name: round(x, 5) for name, x in zip(("mean", "low", "high"), bootstrap(each))}


def judged(model: Any, tokenizer: Any, ids: Tensor, opening: str) -> dict[str, Any]:
    """One opening: divergences from the exact probability, over all numbers of flips and by number."""
    said, known = read(model, tokenizer, ids, opening)
    exact = coins.posterior_predictive(ids)[:, 1:]
    last = torch.where(ids[:, 1:] == HEAD, 0.9, 0.1).double()
    others = {"the model": said, "one half always": torch.full_like(exact, 0.5), "the last flip again, 0.9": last}
    late = slice(ids.shape[1] // 2, None)
    x, y = exact[:, late].flatten(), said[:, late].flatten()
    return {
        "divergence": {name: interval(divergence(exact, one).mean(1)) for name, one in others.items()},
        "the model - one half always": {
            name: interval((divergence(exact, said) - divergence(exact, torch.full_like(exact, 0.5)))[:, part].mean(1))
            for name, part in {"first eight flips": slice(8), "last eight flips": slice(-8, None)}.items()
        },
        "by flips": {
            name: [round(v, 5) for v in divergence(exact, one).mean(0).tolist()] for name, one in others.items()
        },
        "fitted": fitted(ids, said),
        "correlation in the second half": round(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), 4),
        "what both words get": round(known[:, late].mean().item(), 4),
        "some": {"exact": [round(v, 3) for v in x[::16].tolist()], "said": [round(v, 3) for v in y[::16].tolist()]},
    }


def main(options: list[str]) -> None:
    from nondual.pretrained import smollm2

    torch.set_num_threads(1)
    model, tokenizer = smollm2()
    before = fingerprint(model)
    count, n = (4, 6) if "--tiny" in options else (COINS, FLIPS)
    ids = coins.flips(count, n, generator=torch.Generator().manual_seed(0))
    openings = OPENINGS[:1] if "--tiny" in options else OPENINGS
    figures: dict[str, Any] = {
        "openings": {opening: judged(model, tokenizer, ids, opening) for opening in openings},
        "unchanged": fingerprint(model) == before,
        "settings": {"coins": count, "flips": n},
    }
    if "--tiny" in options:
        print(list(figures), list(figures["openings"][openings[0]]))
        return
    write("coins", "nox -s bench -- coins", figures, threads=1)
