"""Is attention a weighting or a spotlight: weights that round to zero, fewer keys, other weights, fixed tables.

SmolLM2-135M-Instruct in our own classes reads stretches of eight plays, MiniLM the same plays. Five parts:

    zeros      how many weights are exactly zero as they are stored (float32, bfloat16, float16), by the number of keys
    spread     by layer and head: the number of keys that an even spread of the same entropy would have (exp H), the
               participation ratio 1 / Σ a², the largest weight and the weight on the first token
    fewer      the loss where each head of each layer keeps its k largest weights, rescaled to sum to 1: "largest";
               the first token and the k - 1 largest of the others: "first and largest"; the first token and the k - 1
               latest: "first and latest"; and the k largest, all given the same weight: "largest, even"
    disturbed  the loss where all weights are made flatter or sharper by a factor on the scores, or changed by noise on
               the scores (drawn for each head, or one drawing for all heads of a layer), mixed with an even spread, or
               mixed with themselves in random order. How much was changed is half the sum of the absolute changes of a
               row, against the intact weights of the layer on the same input; losses are compared at equal change
    fixed      the loss where each head has the mean of its table over other texts, or its table for one other text

Intervals are Student's t over texts, differences paired by text. Weights are computed from float32 scores, the softmax
in float32, and rounded when they are stored.

    nox -s bench -- meditation

Some 3 minutes of one core. Each part is kept under a hash of this file. --tiny runs everything on short texts, and
keeps nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.assignments_smollm2 import full, through
from benchmarks.entropy import PLAYS
from benchmarks.intervals import by_seeds
from benchmarks.record import write
from benchmarks.stages import carried_out
from nondual.analysis import weights_of
from nondual.analysis.attention_layers import attention_layers
from nondual.data import shakespeare
from nondual.ops import masks
from nondual.ops.attention import masked_softmax

SIZES = {"texts": 4, "long": 256, "fewer": 160, "disturbed": 128, "fixed": 64, "others": 12}
TINY = {"texts": 2, "long": 48, "fewer": 32, "disturbed": 24, "fixed": 16, "others": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEPT = (1, 2, 4, 8, 16, 32, 64)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "flatter": (0.85, 0.75, 0.65, 0.55),
    "sharper": (1.2, 1.4, 1.65, 2.0),
    "noise": (0.4, 0.65, 0.85, 1.1),
    "noise, one for all heads": (0.4, 0.65, 0.85, 1.1),
    "mixed with an even spread": (0.1, 0.2, 0.3, 0.4),
    "mixed with another order": (0.1, 0.2, 0.3, 0.4),
}
EQUAL = (0.1, 0.2)
EACH = 4  # every fourth layer has a fixed table alone

Change = Callable[[Tensor, Tensor, Tensor], Tensor]  # (scores, weights, seen) -> what stands in the weights' place


# --- the model -------------------------------------------------------------------------------------------------------


class Bench:
    """The model, and stretches of plays as tokens."""

    def __init__(self, model: Any, tokenizer: Any, sizes: dict[str, int]):
        self.model, self.tokenizer, self.sizes, self.plays = model, tokenizer, sizes, shakespeare()
        self.mixers: list[Any] = [layer.module for layer in attention_layers(model)]

    def text(self, which: int, length: int) -> Tensor:
        """The first tokens (1, length) of a stretch of play `which`."""
        text = self.plays[PLAYS[which]][20_000 : 20_000 + 6 * length]
        ids = torch.tensor([self.tokenizer(text)["input_ids"][:length]])
        assert ids.shape[1] == length
        return ids

    def losses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each next token, and whether the likeliest one was right, both (N - 1,)."""
        scores = self.model(ids)[0, :-1].float()
        return cross_entropy(scores, ids[0, 1:], reduction="none"), (scores.argmax(-1) == ids[0, 1:]).float()

    @contextmanager
    def changed(self, change: Change) -> Iterator[None]:
        """A context in which the weights of all heads are what `change` makes of them."""

        def op(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            q, k, v = full(q, k, v)
            scores, seen = q @ k.mT / math.sqrt(q.shape[-1]), masks.causal(q.shape[2])
            return change(scores, masked_softmax(scores, seen), seen) @ v

        with through(self.mixers, op):
            yield


def moved(before: Tensor, after: Tensor) -> float:
    """Half the sum of a row's absolute changes, mean over the rows that see more than one key, and over heads."""
    return float((after - before).abs().sum(-1)[..., 1:].mean() / 2)


def interval(each: Any) -> dict[str, float]:
    """The mean over texts or seeds, with its interval where there are three to eight of them."""
    each = [float(x) for x in each]
    found = by_seeds(each) or (mean(each), math.nan, math.nan)
    return dict(zip(("mean", "low", "high"), (round(x, 4) for x in found)))


# --- zeros, and how weights are spread -------------------------------------------------------------------------------


def counted(weights: Tensor, seen: Tensor) -> dict[str, Any]:
    """Of weights (..., N, M) in float32, at the keys that a query sees."""
    at = weights[seen.expand_as(weights)]
    found: dict[str, Any] = {"weights": at.numel(), "smallest": float(at[at > 0].log2().min())}
    found |= {f"zero in {name}": int((at.to(dtype) == 0).sum()) for name, dtype in DTYPES.items()}
    largest = weights.amax(-1, keepdim=True)
    relative = (weights / largest)[seen.expand_as(weights)]  # exp(score - highest score): what flash kernels multiply
    found |= {
        f"zero in {name}, before division": int((relative.to(dtype) == 0).sum()) for name, dtype in DTYPES.items()
    }
    for name, bits in (("float32", 24), ("bfloat16", 8)):  # alone it could not move a sum of numbers like its own
        found[f"below half a unit of {name}"] = int((at < 2.0 ** -(bits + 1)).sum())
    return found


def zeros(bench: Bench, part: str) -> dict[str, Any]:
    """By the number of keys that a query sees."""
    n, found = bench.sizes["long"], {}
    bins = [(a, b) for a, b in ((1, 16), (17, 64), (65, 256)) if a <= n]
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def count(_: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
        for a, b in bins:
            rows.setdefault((a, b), []).append(counted(weights[:, :, a - 1 : b], seen[a - 1 : b]))
        return weights

    if part == "SmolLM2":
        for which in range(bench.sizes["texts"]):
            with bench.changed(count):
                bench.model.hidden(bench.model.embeddings(bench.text(which, n)))
        masked = 1 - sum(row["weights"] for each in rows.values() for row in each) / (
            bench.sizes["texts"] * len(bench.mixers) * bench.mixers[0].n_heads * n * n
        )
        found["masked"] = round(masked, 4)
    else:
        from nondual.pretrained import minilm

        encoder = minilm()
        for which in range(bench.sizes["texts"]):
            ids = encoder.tokenizer.encode(bench.plays[PLAYS[which]][20_000:24_000]).ids[:n]
            weights = weights_of(encoder.model, torch.tensor([ids]))[:, 0]
            rows.setdefault((len(ids), len(ids)), []).append(counted(weights, torch.ones(len(ids), len(ids)).bool()))
    for (a, b), each in rows.items():
        total = {name: sum(row[name] for row in each) for name in each[0] if name != "smallest"}
        smallest = min(row["smallest"] for row in each)
        found[f"{a} to {b}"] = total | {"smallest above zero, as a power of 2": round(smallest, 1)}
    return found


def spread(bench: Bench, part: str) -> dict[str, Any]:
    """By layer and head, of the later half of each text's rows: means over rows and texts; the medians of all rows."""
    n = bench.sizes["long"]
    tables: dict[str, list[Tensor]] = {}
    every: dict[str, list[Tensor]] = {}

    def look(_: Tensor, weights: Tensor, __: Tensor) -> Tensor:
        late = weights[0, :, n // 2 :]  # (H, n / 2, n)
        rest = late[..., 1:] / late[..., 1:].sum(-1, keepdim=True).clamp(min=1e-30)
        rows = {
            "keys by entropy": torch.special.entr(late).sum(-1).exp(),
            "keys by participation": 1 / late.square().sum(-1),
            "keys by entropy, first token left out": torch.special.entr(rest).sum(-1).exp(),
            "largest": late.amax(-1),
            "first": late[..., 0],
            "first is largest": (late.argmax(-1) == 0).float(),
        }
        for name, of in rows.items():
            tables.setdefault(name, []).append(of.mean(-1))
            every.setdefault(name, []).append(of[:, :: max(n // 64, 1)].flatten())
        return weights

    texts = bench.sizes["texts"]
    for which in range(texts):
        with bench.changed(look):
            bench.model.hidden(bench.model.embeddings(bench.text(which, n)))
    found: dict[str, Any] = {"keys seen": [n // 2 + 1, n]}
    for name, each in tables.items():
        by_head = torch.stack(each).unflatten(0, (texts, -1))  # (texts, layers, H)
        quarters = torch.cat(every[name]).quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])).tolist()
        table = [[round(x, 3) for x in row] for row in by_head.mean(0).tolist()]
        found[name] = {"heads": table, "mean": interval(by_head.mean((1, 2)))}
        found[name]["rows, 10 25 50 75 90 percent"] = [round(x, 3) for x in quarters]
    largest = torch.cat(every["largest"])
    found["rows whose largest weight is above a half"] = round(float((largest > 0.5).float().mean()), 4)
    return found


# --- fewer keys ------------------------------------------------------------------------------------------------------


def rescaled(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


def largest(k: int, *, first: bool = False, even: bool = False) -> Change:
    """The k largest weights of each row; with `first` the first key is one of them; `even`: all the same."""

    def change(_: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
        order = weights.clone()
        if first:
            order[..., 0] = 2.0
        k_ = min(k, weights.shape[-1])
        keep = torch.zeros_like(weights).scatter(-1, order.topk(k_, -1).indices, 1.0) * seen
        return rescaled(keep if even else keep * weights)

    return change


def latest(k: int) -> Change:
    """The first key and the k - 1 latest."""

    def change(_: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
        at = torch.arange(weights.shape[-1])
        age = at[:, None] - at
        return rescaled(weights * (seen & ((age < k - 1) | (at == 0))))

    return change


FEWER: dict[str, Callable[[int], Change]] = {
    "largest": largest,
    "first and largest": lambda k: largest(k, first=True),
    "first and latest": latest,
    "largest, even": lambda k: largest(k, even=True),
}


def fewer(bench: Bench, part: str) -> dict[str, Any]:
    """The rise of the loss over the later half of each text, by how many keys each head keeps."""
    n = bench.sizes["fewer"]
    of: dict[int, list[float]] = {k: [] for k in KEPT}
    clean = []
    for which in range(bench.sizes["texts"]):
        ids = bench.text(which, n)
        clean.append(bench.losses(ids)[0][n // 2 :].mean())
        for k in KEPT:
            with bench.changed(FEWER[part](k)):
                of[k].append(float(bench.losses(ids)[0][n // 2 :].mean() - clean[-1]))
    return {"intact": interval(clean), **{str(k): interval(x) | {"each": rounded(x)} for k, x in of.items()}}


def rounded(each: list[float]) -> list[float]:
    return [round(x, 4) for x in each]


# --- other weights ---------------------------------------------------------------------------------------------------


def disturbance(kind: str, strength: float, draw: torch.Generator) -> Change:
    """What is made of the weights."""

    def change(scores: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
        if kind in ("flatter", "sharper"):
            return masked_softmax(scores * strength, seen)
        if kind.startswith("noise"):
            shape = (1, *scores.shape[-2:]) if "one" in kind else scores.shape[1:]
            return masked_softmax(scores + strength * torch.randn(shape, generator=draw), seen)
        if "even" in kind:
            other = seen / seen.sum(-1, keepdim=True)
        else:  # the row's own weights, each on a random key that the query sees
            place = torch.rand(weights.shape, generator=draw).masked_fill(~seen, 2.0).argsort(-1)
            other = torch.zeros_like(weights).scatter(-1, place, weights)
        return (1 - strength) * weights + strength * other

    return change


def disturbed(bench: Bench, part: str) -> dict[str, Any]:
    """How much of the weights was moved, their entropy, the rise of the loss, and next tokens right, by strength."""
    n, texts = bench.sizes["disturbed"], bench.sizes["texts"]
    seen_rows: list[tuple[float, float]] = []

    def watched(change: Change) -> Change:
        def run(scores: Tensor, weights: Tensor, seen: Tensor) -> Tensor:
            after = change(scores, weights, seen)
            seen_rows.append((moved(weights, after), float(torch.special.entr(after).sum(-1)[..., 1:].mean())))
            return after

        return run

    strengths = (None, *STRENGTHS[part])
    table = torch.zeros(texts, len(strengths), 4, dtype=torch.float64)  # moved, entropy, loss, right
    for which in range(texts):
        ids, draw = bench.text(which, n), torch.Generator().manual_seed(which)
        for i, strength in enumerate(strengths):
            seen_rows.clear()
            same: Change = lambda _, weights, __: weights  # noqa: E731
            with bench.changed(watched(same if strength is None else disturbance(part, strength, draw))):
                losses, right = bench.losses(ids)
            move, entropy = (mean(x) for x in zip(*seen_rows))
            table[which, i] = torch.tensor([move, entropy, float(losses.mean()), float(right.mean())])
    rise = table[:, :, 2] - table[:, :1, 2]
    found: dict[str, Any] = {"strengths": list(STRENGTHS[part])}
    for name, of in (("moved", table[..., 0]), ("entropy", table[..., 1]), ("right", table[..., 3]), ("rise", rise)):
        found[name] = [interval(of[:, i]) for i in range(len(strengths))]
    found["intact loss"] = interval(table[:, 0, 2])
    found["each at equal change"] = {str(at): between(table[..., 0], rise, at) for at in EQUAL}
    return found


def between(move: Tensor, rise: Tensor, at: float) -> list[float] | None:
    """For each text the rise where so much was moved, between the strengths on both sides of it."""
    found = []
    for x, y in zip(move.tolist(), rise.tolist()):
        i = next((i for i in range(1, len(x)) if x[i] >= at), None)
        if i is None:
            return None
        share = (at - x[i - 1]) / (x[i] - x[i - 1])
        found.append(round(y[i - 1] + share * (y[i] - y[i - 1]), 5))
    return found


def compared(found: dict[str, Any]) -> dict[str, Any]:
    """At equal change: the rise of each kind, and how far it lies above or below that of flatter weights."""
    told: dict[str, Any] = {}
    for at in map(str, EQUAL):
        each = {kind: of["each at equal change"][at] for kind, of in found.items()}
        reached = {kind: of for kind, of in each.items() if of is not None}
        told[at] = {kind: {"rise": interval(of)} for kind, of in reached.items()}
        for kind, other in (*((kind, "flatter") for kind in reached), ("noise, one for all heads", "noise")):
            if kind in reached and other in reached and kind != other:
                gap = [a - b for a, b in zip(reached[kind], reached[other])]
                told[at][kind][f"less {other}"] = interval(gap)
    return told


# --- fixed tables ----------------------------------------------------------------------------------------------------


def fixed(bench: Bench, part: str) -> dict[str, Any]:
    """The rise of the loss where tables come from other texts: in all layers, and in every fourth alone."""
    n, count = bench.sizes["fixed"], bench.sizes["others"]
    others = [play for play in bench.plays if play not in PLAYS][:count]
    tables = []
    for play in others:
        ids = torch.tensor([bench.tokenizer(bench.plays[play][20_000 : 20_000 + 6 * n])["input_ids"][:n]])
        tables.append(weights_of(bench.model, ids)[:, 0])  # (layers, H, N, N)
    average = torch.stack(tables).mean(0)
    rises: dict[str, list[float]] = {"mean table": [], "another text's table": []}
    alone: list[list[float]] = []
    clean, gone = [], []
    for which in range(bench.sizes["texts"]):
        ids = bench.text(which, n)
        intact = bench.losses(ids)[0].mean()
        clean.append(float(intact))
        own = weights_of(bench.model, ids)[:, 0]
        gone.append(moved(own, average))
        for name, table in (("mean table", average), ("another text's table", tables[which % len(tables)])):
            rises[name].append(float(bench_with(bench, ids, table, range(len(table))) - intact))
        alone.append([float(bench_with(bench, ids, average, [i]) - intact) for i in range(0, len(average), EACH)])
    found = {name: interval(of) | {"each": rounded(of)} for name, of in rises.items()}
    by_layer = [interval(of) for of in zip(*alone)]
    return {
        "texts": len(tables),
        "intact": interval(clean),
        "moved": interval(gone),
        "every fourth layer alone": by_layer,
        **found,
    }


def bench_with(bench: Bench, ids: Tensor, table: Tensor, layers: Any) -> Tensor:
    """The mean loss where these layers have their weights from the table (layers, H, N, N)."""
    calls = iter(range(len(table)))

    def change(_: Tensor, weights: Tensor, __: Tensor) -> Tensor:
        layer = next(calls)
        return table[layer].expand_as(weights) if layer in layers else weights

    with bench.changed(change):
        return bench.losses(ids)[0].mean()


# --- all together ----------------------------------------------------------------------------------------------------

STAGES: dict[str, tuple[Callable[[Bench, str], Any], tuple[str, ...]]] = {
    "zeros": (zeros, ("SmolLM2", "MiniLM")),
    "spread": (spread, ("all",)),
    "disturbed": (disturbed, tuple(STRENGTHS)),
    "fixed": (fixed, ("all",)),
    "fewer": (fewer, tuple(FEWER)),
}


@torch.inference_mode()
def measured(bench: Bench, tiny: bool) -> dict[str, Any]:
    """All figures."""
    parts = {name: few for name, (_, few) in STAGES.items()}
    found = carried_out(__file__, parts, lambda name, part: STAGES[name][0](bench, part), tiny)
    return found | {"at equal change": compared(found["disturbed"])}


def main(options: list[str]) -> None:
    from nondual.pretrained import our_smollm2

    torch.set_num_threads(1)
    tiny = "--tiny" in options
    bench = Bench(*our_smollm2(), TINY if tiny else SIZES)
    figures = measured(bench, tiny)
    if tiny:
        print("tiny", list(figures))
        return
    write("meditation", "nox -s bench -- meditation", figures, threads=1, setup={"plays": PLAYS, "sizes": SIZES})
