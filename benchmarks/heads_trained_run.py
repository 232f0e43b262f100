"""One run of `heads_trained`: the two tasks, the models, and a training whose result is kept as it ends.

Repeats: p distinct random tokens, again and again, p drawn anew for each row. To name the next token one must find the
token after an earlier occurrence of this one, which takes two steps: a head that tells each position which token came
before it, and in a later layer a head that looks for the position told of this token (an induction head; Olsson et al.
2022, 2209.11895).

Look-ups: as `nondual.tasks.relation`, with several relations. N persons stand in a random order, each with a random
card; person c must name the cards of the persons at which c looks, one for each relation. Who looks at whom is fixed by
a permutation for each relation, drawn with the seed, and no two of them agree anywhere.
"""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from nondual.analysis import all_heads, composition_score, mean_values, profile, record_heads, replace_heads, weights_of
from nondual.feed_forward import FeedForward
from nondual.language_models.causal import CausalLM
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train
from nondual.transformer_layer import MixerBlock, TransformerLayer

VOCABULARY, LENGTH, PERIODS, WIDTH, HEADS = 64, 48, (12, 24), 64, 4
PERSONS, CARDS, SHIFTS, NARROW = 32, 8, (1, 5, 11, 18), 48
ARMS = ("two layers", "two layers, feed-forward", "first layer sees itself only", "one layer")
DECAY, EVERY = 0.01, 10


# --- repeats -------------------------------------------------------------------------------------------------------


def repeats(generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """(ids (B, LENGTH), periods (B, 1)): p distinct random tokens, again and again."""
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (batch, 1), generator=generator)
    tokens = torch.rand(batch, VOCABULARY, generator=generator).argsort(1)
    return tokens.gather(1, torch.arange(LENGTH) % periods), periods


def itself_only(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **more: Any) -> Any:
    """Attention in which each position sees itself alone."""
    return attention(q, k, v, mask=torch.eye(q.shape[-2], dtype=torch.bool), **more)


def without_offset(offset: int):
    """Attention in which no position sees the one that is `offset` before it."""

    def op(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, **more: Any) -> Any:
        at = torch.arange(q.shape[-2])
        return attention(q, k, v, mask=at[:, None] - at[None] != offset, **more)

    return op


def causal_model(arm: str) -> CausalLM:
    """A small causal model of an arm of the comparison; the first, third and fourth have as many parameters."""

    def layer(i: int) -> nn.Module:
        alone = arm == "first layer sees itself only" and i == 0
        # One layer with heads twice as wide has the parameters of two.
        d_head = WIDTH // HEADS * (2 if arm == "one layer" else 1)
        op = itself_only if alone else attention
        mixer = MultiHeadAttention(WIDTH, HEADS, d_head=d_head, causal=True, op=op)
        if arm == "two layers, feed-forward":
            return TransformerLayer(mixer, FeedForward(WIDTH, 2 * WIDTH), WIDTH, norm_first=True)
        return MixerBlock(mixer, WIDTH, norm=nn.LayerNorm)

    n_layers = 1 if arm == "one layer" else 2
    return CausalLM(VOCABULARY, WIDTH, n_layers, layer=layer, max_len=LENGTH, norm=nn.LayerNorm)


@torch.no_grad()
def losses(model: CausalLM, ids: Tensor, periods: Tensor) -> tuple[float, float]:
    """Nats per token where the answer stands earlier in the row, and where it cannot be known."""
    scores = model(ids)[:, :-1]
    each = F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").unflatten(0, (len(ids), -1))
    seen = torch.arange(LENGTH - 1) >= periods
    return each[seen].mean().item(), each[~seen].mean().item()


def halfway(steps: list[float], values: list[float]) -> float:
    """The step at which values first pass the middle between their first and last, on lines between the points."""
    middle = (values[0] + values[-1]) / 2
    points = list(zip(steps, values))
    for (before, low), (after, high) in pairwise(points):
        if (low - middle) * (high - middle) <= 0 and low != high:
            return before + (after - before) * (middle - low) / (high - low)
    return points[-1][0]


def repeats_run(arm: str, rate: float, seed: int, steps: int, batch: int = 32) -> dict[str, Any]:
    """Train a model on repeats, and say what its heads do before, meanwhile and afterwards."""
    torch.manual_seed(seed)
    model = causal_model(arm)
    ids, periods = repeats(torch.Generator().manual_seed(999), 24)
    curve: dict[str, list[Any]] = {"step": [], "repeats": [], "first": [], "induction": [], "previous": []}

    def look() -> dict[str, float]:
        found = profile(weights_of(model, ids), ids)
        known, unknown = losses(model, ids, periods)
        curve["step"].append(EVERY * len(curve["step"]))
        curve["repeats"].append(round(known, 4))
        curve["first"].append(round(unknown, 4))
        for name in ("induction", "previous"):
            curve[name].append(_rounded(found[name]))
        return {"repeats": known}

    before = _profile(model, ids)
    look()
    train(
        model,
        lambda drawn: model.loss(drawn[0]),
        partial(repeats, batch=batch),
        optimiser=optimiser(model, rate, decay=DECAY),
        steps=steps,
        seed=seed,
        measure=look,
        log_every=EVERY,
        name=None,
    )
    model.eval()
    known, unknown = losses(model, ids, periods)
    result = {
        "parameters": sum(x.numel() for x in model.parameters()),
        "repeats": round(known, 4),
        "first": round(unknown, 4),
        "before": before,
        "after": _profile(model, ids),
        "curve": curve,
    }
    with torch.no_grad(), record_heads(model) as record:
        model(ids)
    result["without_head"] = {}
    for pair in all_heads(model):
        with replace_heads(model, mean_values(record, [pair], by_position=True)):
            result["without_head"]["{}.{}".format(*pair)] = round(losses(model, ids, periods)[0], 4)
    if arm.startswith("two layers"):
        first, second = (layer.mixer for layer in model.layers)
        assert isinstance(first, MultiHeadAttention) and isinstance(second, MultiHeadAttention)
        result["composition"] = [
            [{k: round(x, 4) for k, x in composition_score((first, i), (second, j)).items()} for j in range(HEADS)]
            for i in range(HEADS)
        ]
        result["without_offset"] = {}
        for offset in (1, 2, 3):
            first.op = without_offset(offset)
            result["without_offset"][str(offset)] = round(losses(model, ids, periods)[0], 4)
        strongest = max(range(HEADS), key=lambda head: curve["induction"][-1][1][head])
        result["half_loss"] = round(halfway(curve["step"], curve["repeats"]), 1)
        result["half_induction"] = round(halfway(curve["step"], [x[1][strongest] for x in curve["induction"]]), 1)
        strongest = max(range(HEADS), key=lambda head: curve["previous"][-1][0][head])
        result["half_previous"] = round(halfway(curve["step"], [x[0][strongest] for x in curve["previous"]]), 1)
    if arm != "two layers":  # the curves of all heads are drawn of that arm alone
        last = len(model.layers) - 1
        curve["induction"] = [max(x[last]) for x in curve["induction"]]
        curve["previous"] = [max(x[0]) for x in curve["previous"]]
    return result


def _profile(model: CausalLM, ids: Tensor) -> dict[str, Any]:
    found = profile(weights_of(model, ids), ids)
    return {name: _rounded(found[name]) for name in ("previous", "same", "induction", "distance", "entropy")}


def _rounded(x: Tensor) -> list[Any]:
    return [[round(value, 3) for value in row] for row in x.tolist()]


# --- look-ups ------------------------------------------------------------------------------------------------------


class Relations(NamedTuple):
    """Who looks at whom: for each relation the person looked at, (relations, PERSONS)."""

    looks_at: Tensor

    @classmethod
    def drawn(cls, relations: int, seed: int) -> "Relations":
        ring = torch.randperm(PERSONS, generator=torch.Generator().manual_seed(seed))
        looks_at = torch.empty(relations, PERSONS, dtype=torch.long)
        for row, shift in zip(looks_at, SHIFTS):
            row[ring] = ring.roll(shift)
        return cls(looks_at)

    def draw(self, generator: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(persons (B, N), cards (B, N), answers (B, N, relations), where they stand (B, N, relations))."""
        persons = torch.rand(batch, PERSONS, generator=generator).argsort(1)
        cards = torch.randint(CARDS, (batch, PERSONS), generator=generator)
        place = persons.argsort(1)
        where = torch.stack([place.gather(1, row[persons]) for row in self.looks_at], -1)
        return persons, cards, torch.stack([cards.gather(1, x) for x in where.unbind(-1)], -1), where


class Lookup(nn.Module):
    """One layer of attention and a feed-forward network, and a read-out for each relation.

    The feed-forward network matters to a single head that is asked two relations. It can weigh the two cards unequally,
    and the network can then tell the heavier from the lighter. Two linear read-outs of their sum cannot: where each
    names a card that fills both places, the heavier card has the higher score in both.
    """

    def __init__(self, n_heads: int, relations: int, *, feed_forward: bool = True):
        super().__init__()
        self.persons, self.cards = nn.Embedding(PERSONS, NARROW), nn.Embedding(CARDS, NARROW)
        mixer = MultiHeadAttention(NARROW, n_heads)
        self.layer = (
            TransformerLayer(mixer, FeedForward(NARROW, 2 * NARROW), NARROW, norm_first=True)
            if feed_forward
            else MixerBlock(mixer, NARROW, norm=nn.LayerNorm)
        )
        self.norm, self.out = nn.LayerNorm(NARROW), nn.Linear(NARROW, relations * CARDS)

    @property
    def mixer(self) -> MultiHeadAttention:
        assert isinstance(self.layer.mixer, MultiHeadAttention)
        return self.layer.mixer

    def forward(self, persons: Tensor, cards: Tensor) -> Tensor:
        """(B, N) each -> (B, N, relations, CARDS), scores for each card."""
        x = self.layer(self.persons(persons) + self.cards(cards))
        return self.out(self.norm(x)).unflatten(-1, (-1, CARDS))

    def weights(self, persons: Tensor, cards: Tensor) -> Tensor:
        """The attention weights (B, H, N, N)."""
        x = self.persons(persons) + self.cards(cards)
        norm = self.layer.norm if isinstance(self.layer, MixerBlock) else self.layer.norm1
        return self.mixer(norm(x), return_weights=True)[1]


def lookup_loss(model: Lookup, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    persons, cards, answers, _ = drawn
    return F.cross_entropy(model(persons, cards).flatten(0, 2), answers.flatten())


@torch.no_grad()
def on_relations(model: Lookup, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The mean weight that each head puts on the person of each relation, (H, relations)."""
    persons, cards, _, where = drawn
    weights = model.weights(persons, cards)
    where = where[:, None].expand(-1, weights.shape[1], -1, -1)
    return weights.gather(3, where).mean((0, 2))


def lookup_run(
    n_heads: int, relations: int, rate: float, seed: int, steps: int, batch: int = 8, *, feed_forward: bool = True
) -> dict[str, Any]:
    """Train a model on look-ups, and say how often it names the card and where its heads look."""
    asked = Relations.drawn(relations, seed)
    torch.manual_seed(seed)
    model = Lookup(n_heads, relations, feed_forward=feed_forward)
    test = asked.draw(torch.Generator().manual_seed(999), 256)
    before = on_relations(model, test)
    train(
        model,
        partial(lookup_loss, model),
        partial(asked.draw, batch=batch),
        optimiser=optimiser(model, rate, decay=DECAY),
        steps=steps,
        seed=seed,
        log_every=steps,
        name=None,
    )
    model.eval()
    with torch.no_grad():
        right = (model(*test[:2]).argmax(-1) == test[2]).float().mean((0, 1))
        loss = lookup_loss(model, test).item()
    return {
        "parameters": sum(x.numel() for x in model.parameters()),
        "accuracy": round(right.mean().item(), 4),
        "each": [round(x, 4) for x in right.tolist()],
        "loss": round(loss, 4),
        "before": _rounded(before),
        "after": _rounded(on_relations(model, test)),
    }


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    task: str
    """"repeats" or "look-ups"."""
    arm: str
    """Of repeats one of ARMS; of look-ups "HEADS/RELATIONS", with "/linear" where there is no feed-forward network."""
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        arm = self.arm.replace(", ", "-").replace(" ", "-").replace("/", "-")
        return self.folder / f"{self.task}_{arm}_{self.rate}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any] | None:
        """What the run ended with, or None where it has not ended."""
        return json.loads(self.file.read_text()) if self.file.exists() else None


def carry_out(run: Run) -> None:
    """Train on one thread and keep the result; a run that has ended is not made again."""
    if run.file.exists():
        return
    torch.set_num_threads(1)
    if run.task == "repeats":
        found = repeats_run(run.arm, run.rate, run.seed, run.steps)
    else:
        heads, relations, *linear = run.arm.split("/")
        found = lookup_run(int(heads), int(relations), run.rate, run.seed, run.steps, feed_forward=not linear)
    keep(run.file, {"rate": run.rate, "seed": run.seed, **found})
    print(*run[:4], found.get("repeats", found.get("accuracy")), flush=True)
