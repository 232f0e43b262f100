"""One run of `routing`: three tasks, their models, and a training whose result is kept as it ends.

Cue. Eight items, each with a key and a value, and a question that names a key: the answer is the value of the item
whose key belongs to that of the question, by a permutation drawn with the seed. One item bears a mark, which is no part
of that rule. In training the mark stands on the right item in a given share of the examples, else on another one. Then
it stands on another one in all of them: where does the question look?

Heads. The look-ups of benchmarks/heads_trained_run.py, with two relations and two heads. Through training we ask how
strongly the loss pulls each head towards the person of each relation, with both heads and with the other one taken
out (its output replaced by its mean). And models in which one of the two heads gives out nothing from the beginning.

Facts. Each person (two tokens, first and last name) has one true attribute. A corpus says it of each person twenty
times, some of them falsely; the false statements about a person agree with one another, or differ. Nothing else in the
corpus tells a true statement from a false one.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.heads_trained_run import Lookup, Relations, lookup_loss
from benchmarks.record import kept
from nondual.feed_forward import FeedForward
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train
from nondual.transformer_layer import TransformerLayer

WIDTH, DECAY = 48, 0.01
KEYS, ITEMS, VALUES = 16, 8, 8
FIRST, LAST, ATTRIBUTES, SAID = 16, 8, 16, 20
CONDITIONS = (("agree", 20), ("agree", 16), ("agree", 12), ("agree", 8), ("agree", 4), ("differ", 8), ("differ", 4))
"""How the false statements stand to one another, and how many of the twenty are true."""
EVERY = 20


class Reader(nn.Module):
    """One layer of attention and a feed-forward network; the answer is read at the last place.

    Args:
        sizes: how many ids there are of each kind; a token's embedding is the sum of its ids'.
        answers: how many answers there are.
    """

    def __init__(self, sizes: tuple[int, ...], answers: int):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in sizes)
        mixer = MultiHeadAttention(WIDTH, 1)
        self.layer = TransformerLayer(mixer, FeedForward(WIDTH, 2 * WIDTH), WIDTH, norm_first=True)
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, answers)

    def embedded(self, ids: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([table(each) for table, each in zip(self.tables, ids)]).sum(0)

    def forward(self, *ids: Tensor) -> Tensor:
        """(B, N) each -> scores (B, answers)."""
        return self.out(self.norm(self.layer(self.embedded(ids))[:, -1]))

    def weights(self, *ids: Tensor) -> Tensor:
        """How the last place divides its attention, (B, N)."""
        return self.layer(self.embedded(ids), return_weights=True)[1][:, 0, -1]


def taught(model: nn.Module, loss: Callable[..., Tensor], draw: Callable[..., Any], run: "Run", **more: Any) -> None:
    """Train a model as all runs here are trained, and leave it in evaluation mode."""
    adam = optimiser(model, run.rate, decay=DECAY)
    train(model, loss, draw, optimiser=adam, steps=run.steps, seed=run.seed, name=None, **more)
    model.eval()


# --- cue -----------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
    """Of the cue: what is shown, (B, ITEMS + 1) each; the answers, the right item and the marked one, (B,) each."""

    shown: tuple[Tensor, Tensor, Tensor]
    answers: Tensor
    right: Tensor
    marked: Tensor


def examples(partner: Tensor, share: float, generator: torch.Generator, batch: int = 64) -> Examples:
    """Examples in which the mark stands on the right item with this probability, else on any other."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :ITEMS]
    values = torch.randint(VALUES, (batch, ITEMS), generator=generator)
    right = torch.randint(ITEMS, (batch, 1), generator=generator)
    other = (right + torch.randint(1, ITEMS, (batch, 1), generator=generator)) % ITEMS
    marked = torch.where(torch.rand(batch, 1, generator=generator) < share, right, other)
    question = partner.argsort()[keys.gather(1, right)]  # the key whose partner the right item bears
    marks = torch.zeros(batch, ITEMS + 1, dtype=torch.long).scatter(1, marked, 1)
    shown = (torch.cat([keys, question], 1), F.pad(values, (0, 1), value=VALUES), marks)
    return Examples(shown, values.gather(1, right)[:, 0], right[:, 0], marked[:, 0])


def cue_run(run: "Run") -> dict[str, Any]:
    """Where the question looks, and what is answered, once the mark stands on a wrong item."""
    share = float(run.arm)
    partner = torch.randperm(KEYS, generator=torch.Generator().manual_seed(run.seed))
    torch.manual_seed(run.seed)
    model = Reader((KEYS, VALUES + 1, 2), VALUES)
    as_trained, astray = (examples(partner, s, torch.Generator().manual_seed(999), 1024) for s in (share, 0.0))

    def loss(batch: Examples) -> Tensor:
        return F.cross_entropy(model(*batch.shown), batch.answers)

    taught(model, loss, partial(examples, partner, share), run)
    with torch.no_grad():
        weights, said = model.weights(*astray.shown), model(*astray.shown).argmax(-1)
        differ = astray.answers != astray.shown[1].gather(1, astray.marked[:, None])[:, 0]
        return {
            "loss": round(loss(as_trained).item(), 6),
            "right": round((model(*as_trained.shown).argmax(-1) == as_trained.answers).float().mean().item(), 4),
            "weight on the mark": round(weights.gather(1, astray.marked[:, None]).mean().item(), 4),
            "weight on the right item": round(weights.gather(1, astray.right[:, None]).mean().item(), 4),
            "right, astray": round((said == astray.answers)[differ].float().mean().item(), 4),
        }


# --- heads ---------------------------------------------------------------------------------------------------------


def with_bonus(bonus: Tensor, where: Tensor, without: int | None) -> Callable[..., Tensor]:
    """Attention whose scores get bonus (H, R) at the persons of each relation, (B, N, R); a head may be taken out."""

    def op(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        at = F.one_hot(where, k.shape[2]).to(q.dtype)  # (B, N, R, N)
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + torch.einsum("hr,bnrm->bhnm", bonus, at)
        heads = list((scores.softmax(-1) @ v).unbind(1))
        if without is not None:
            heads[without] = heads[without].mean((0, 1)).detach().expand_as(heads[without])
        return torch.stack(heads, 1)

    return op


def pull(model: Lookup, drawn: tuple[Tensor, ...], without: int | None = None) -> Tensor:
    """How much the loss falls for each unit that a head's score for a relation's person rises, (H, R)."""
    persons, cards, answers, where = drawn
    bonus = torch.zeros(model.mixer.n_heads, where.shape[-1], requires_grad=True)
    usual = model.mixer.op
    try:
        model.mixer.op = with_bonus(bonus, where, without)
        with torch.enable_grad():
            loss = lookup_loss(model, (persons, cards, answers, where))
            return -torch.autograd.grad(loss, bonus)[0]
    finally:
        model.mixer.op = usual


def looks(model: Lookup, drawn: tuple[Tensor, ...]) -> Tensor:
    """The mean weight of each head on the person of each relation, (H, R)."""
    persons, cards, _, where = drawn
    with torch.no_grad():
        weights = model.weights(persons, cards)
    return weights.gather(3, where[:, None].expand(-1, weights.shape[1], -1, -1)).mean((0, 2))


def heads_run(run: "Run") -> dict[str, Any]:
    """Pulls and looks through training. The arm names the head that is there: "0", "1" or "both"."""
    asked = Relations.drawn(2, run.seed)
    torch.manual_seed(run.seed)
    model = Lookup(2, 2)
    test = asked.draw(torch.Generator().manual_seed(999), 64)
    if run.arm != "both":
        kept_heads = torch.tensor([float(str(head) == run.arm) for head in range(2)])
        usual = model.mixer.op

        def one_head(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
            return usual(q, k, v * kept_heads[:, None, None], **more)

        model.mixer.op = one_head
    curve: list[dict[str, Any]] = []

    def watch() -> dict[str, float]:
        with torch.no_grad():
            loss = lookup_loss(model, test).item()
        point: dict[str, Any] = {"loss": loss, "looks": looks(model, test).tolist()}
        if run.arm == "both":
            point["pull"] = pull(model, test).tolist()
            point["pull without the other"] = [pull(model, test, 1 - head)[head].tolist() for head in range(2)]
        curve.append(point)
        return {"loss of the test": loss}

    taught(model, partial(lookup_loss, model), partial(asked.draw, batch=8), run, measure=watch, log_every=EVERY)
    with torch.no_grad():
        right = (model(*test[:2]).argmax(-1) == test[2]).float().mean((0, 1))
    return {"loss": round(curve[-1]["loss"], 6), "right": [round(x, 4) for x in right.tolist()], "curve": curve}


# --- facts ---------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Persons (P, 3): first name, last name, the question. What is said of each, (P, SAID), the truth and the kind."""

    persons: Tensor
    said: Tensor
    true: Tensor
    kind: Tensor

    def shares(self) -> Tensor:
        """How often the corpus gives each person each attribute, (P, ATTRIBUTES)."""
        return F.one_hot(self.said, ATTRIBUTES).float().mean(1)

    def draw(self, generator: torch.Generator, batch: int = 128) -> tuple[Tensor, Tensor]:
        """Persons (B, 3) and what is said of them, (B,)."""
        person = torch.randint(len(self.persons), (batch,), generator=generator)
        which = torch.randint(SAID, (batch,), generator=generator)
        return self.persons[person], self.said[person, which]


def corpus(seed: int) -> Corpus:
    """As many persons of each kind, which is drawn and has nothing to do with their names."""
    generator = torch.Generator().manual_seed(seed)
    count = FIRST * LAST // len(CONDITIONS) * len(CONDITIONS)
    named = torch.randperm(FIRST * LAST, generator=generator)[:count]
    asked = torch.full_like(named, FIRST + LAST)
    persons = torch.stack([named // LAST, FIRST + named % LAST, asked], 1)
    kind = torch.arange(count) % len(CONDITIONS)
    order = torch.rand(count, ATTRIBUTES, generator=generator).argsort(1)  # the first is true, the others are false
    said = []
    for row, (falsely, truly) in zip(order, [CONDITIONS[k] for k in kind.tolist()]):
        false = torch.arange(SAID - truly) % (1 if falsely == "agree" else ATTRIBUTES - 1) + 1
        said.append(row[torch.cat([torch.zeros(truly, dtype=torch.long), false])])
    return Corpus(persons, torch.stack(said), order[:, 0], kind)


def facts_run(run: "Run") -> dict[str, Any]:
    """What a model answers about each kind of person, beside the shares of the corpus."""
    facts = corpus(run.seed)
    torch.manual_seed(run.seed)
    model = Reader((FIRST + LAST + 1,), ATTRIBUTES)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    taught(model, loss, facts.draw, run)
    with torch.no_grad():
        told, shares = model(facts.persons).softmax(-1), facts.shares()
    most, false = shares.scatter(1, facts.true[:, None], 0).max(-1, keepdim=True)  # the most frequent false one
    false = torch.where(most > 0, false, -1)  # of some persons nothing false is said
    true = facts.true[:, None]
    rows = [facts.kind == k for k in range(len(CONDITIONS))]
    answers = told.argmax(-1, keepdim=True)
    return {
        "loss": round(-(shares * told.log()).sum(-1).mean().item(), 4),
        "least loss": round(torch.special.entr(shares).sum(-1).mean().item(), 4),
        "off": round((told - shares).abs().sum(-1).mean().item() / 2, 4),
        "probability of the truth": [round(told.gather(1, true)[row].mean().item(), 4) for row in rows],
        "answers the truth": [round((answers == true)[row].float().mean().item(), 4) for row in rows],
        "answers the falsehood": [round((answers == false)[row].float().mean().item(), 4) for row in rows],
    }


# --- one run -------------------------------------------------------------------------------------------------------

TASKS = {"cue": cue_run, "heads": heads_run, "facts": facts_run}


class Run(NamedTuple):
    """One model, trained once to the end, and where its result is kept."""

    task: str
    arm: str
    """Of the cue the share of examples in which it is right, of heads the one that is there."""
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.task}_{self.arm}_{self.rate}_{self.seed}_{self.steps}.json"


def carry_out(run: Run) -> dict[str, Any]:
    """Train on one thread and keep the result; a run that has ended is only read."""
    torch.set_num_threads(1)
    made = run.file.exists()
    found = kept(run.file, TASKS[run.task], run)
    if not made:
        print(*run[:4], json.dumps({name: x for name, x in found.items() if name != "curve"}), flush=True)
    return found
