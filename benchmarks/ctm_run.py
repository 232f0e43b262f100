"""One run of `ctm`: pictures or bits, a Continuous Thought Machine or one of its twins, a training, what it then shows.

Tasks:

    fashion   Fashion-MNIST as in benchmarks/vit_run.py: 55,000 pictures to train on, 5,000 choose rates, 10,000 test
    digits    scikit-learn's 1,797 digits, split as there: 1,197, 200 and 400
    parity    rows of BITS random bits; at each place, whether the ones up to there are odd in number (the paper's
              task, with fewer bits); every row is new, and 2,000 that were set aside are scored

Two small convolutions, and a learned vector for each place, make the features of a picture: 7 x 7 places on fashion,
4 x 4 on digits, each of which knows 7 x 7 or 5 x 5 pixels around it. What is far apart is joined by the ticks alone.

Arms, all with the same features, attention, ticks and loss:

    CTM                    private neuron-level models; synchronisation asks and answers
    LSTM                   an LSTM cell in place of neurons: its state asks and answers; as many parameters
    states                 the CTM, but the neurons' present states ask and answer in place of synchronisation
    shared                 the CTM, but one neuron-level model for all neurons (so it has fewer parameters)
    CTM, T ticks           the CTM trained with another number of ticks
"""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import keep
from benchmarks.vit_run import task_of
from nondual.recent.ctm import ContinuousThoughtMachine, Thoughts, certainty, two_tick_loss
from nondual.recent.ctm_parts import Sums, Synchronisation, random_pairs
from nondual.self_attention import MultiHeadAttention
from nondual.training import optimiser, train

FEATURES, D_MODEL, D_INPUT, HEADS, MEMORY, PAIRS = 32, 64, 32, 4, 8, 64
BITS, BATCH, DECAY = 8, 32, 0.05
TICKS = {"fashion": 8, "digits": 8, "parity": 10}
CHANNELS, STRIDES, SIDE = 16, {"fashion": (2, 2), "digits": (1, 2)}, {"fashion": 7, "digits": 4}
OUT = {"fashion": 10, "digits": 10, "parity": (BITS, 2)}
SCORED = 2000  # rows of parity


class Inputs(NamedTuple):
    """Pictures (N, 1, S, S) or bits (N, BITS), and the answers (N,) or (N, BITS)."""

    x: Tensor
    y: Tensor


def parity(count: int, generator: torch.Generator) -> Inputs:
    """Random bits (count, BITS), and at each place whether the ones so far are odd in number."""
    bits = torch.randint(2, (count, BITS), generator=generator)
    return Inputs(bits, bits.cumsum(1) % 2)


@cache
def parts_of(task: str) -> dict[str, Inputs]:
    """What is trained on (nothing for parity, which is drawn anew), what chooses rates, and what is tested."""
    if task == "parity":
        tune, test = (parity(SCORED, torch.Generator().manual_seed(seed)) for seed in (10**6, 10**6 + 1))
        return {"tune": tune, "test": test}
    of = task_of(task)
    return {name: Inputs(*getattr(of, name)) for name in ("train", "tune", "test")}


def draw(task: str, generator: torch.Generator) -> Inputs:
    """A batch to train on."""
    if task == "parity":
        return parity(BATCH, generator)
    x, y = parts_of(task)["train"]
    chosen = torch.randint(len(y), (BATCH,), generator=generator)
    return Inputs(x[chosen], y[chosen])


# --- the models ----------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    """(B, 1, S, S) -> (B, N, FEATURES): two convolutions of 3 x 3 with batch norm and ReLU, and a vector a place."""

    def __init__(self, task: str):
        super().__init__()
        side = SIDE[task]
        pairs = zip((1, CHANNELS), (CHANNELS, FEATURES), STRIDES[task])
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in pairs
            )
        )
        self.places = nn.Parameter(torch.randn(side**2, FEATURES) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).mT + self.places


class Bits(nn.Module):
    """(B, BITS) -> (B, BITS, FEATURES): a vector for the bit, and one for its place."""

    def __init__(self):
        super().__init__()
        self.bits = nn.Embedding(2, FEATURES)
        self.places = nn.Parameter(torch.randn(BITS, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.bits(x) + self.places


def backbone(task: str) -> nn.Module:
    """What makes features of a task's inputs."""
    return Bits() if task == "parity" else Convolutions(task)


class States(Synchronisation):
    """Reads the present state of the first neuron of each pair."""

    def forward(self, z: Tensor, state: Sums) -> tuple[Tensor, Sums]:
        return z[:, self.pairs[0]], state


class SharedModels(nn.Module):
    """One neuron-level model for all neurons, of the shape of the private ones."""

    def __init__(self, d_model: int, memory: int, d_hidden: int = 8):
        super().__init__()
        self.first, self.second = nn.Linear(memory, 2 * d_hidden), nn.Linear(d_hidden, 2)

    def forward(self, history: Tensor) -> Tensor:
        return F.glu(self.second(F.glu(self.first(history), -1)), -1)[..., 0]


def machine(task: str, arm: str = "CTM", ticks: int | None = None) -> ContinuousThoughtMachine:
    """The CTM of a task, or one of its twins that differ in one part."""

    def read_out() -> Synchronisation:
        if arm == "states":
            return States(torch.arange(D_MODEL).expand(2, -1), D_MODEL)
        return Synchronisation(random_pairs(D_MODEL, PAIRS), D_MODEL)

    model = ContinuousThoughtMachine(
        FEATURES,
        OUT[task],
        d_model=D_MODEL,
        d_input=D_INPUT,
        n_heads=HEADS,
        ticks=ticks or TICKS[task],
        memory=MEMORY,
        action=read_out(),
        output=read_out(),
        backbone=backbone(task),
        **({"neurons": SharedModels} if arm == "shared" else {}),
    )
    if arm == "states":
        for read in (model.action, model.output):
            read.decay.requires_grad_(False)  # nothing decays there
    return model


class LSTMThinker(nn.Module):
    """An LSTM cell that asks for features by attention at every tick, and whose state is read as the prediction."""

    def __init__(self, task: str, width: int, ticks: int | None = None):
        super().__init__()
        self.ticks, self.out = ticks or TICKS[task], OUT[task] if isinstance(OUT[task], tuple) else (OUT[task],)
        self.backbone = backbone(task)
        self.to_features = nn.Sequential(nn.Linear(FEATURES, D_INPUT), nn.LayerNorm(D_INPUT))
        self.to_query = nn.Linear(width, D_INPUT)
        self.attention = MultiHeadAttention(D_INPUT, HEADS)
        self.cell = nn.LSTMCell(D_INPUT, width)
        self.to_prediction = nn.Linear(width, torch.Size(self.out).numel())
        self.first = nn.Parameter(torch.empty(2, width).uniform_(-1, 1) / width**0.5)

    def forward(self, x: Tensor, *, ticks: int | None = None) -> Thoughts:
        heard = self.attention.project(self.to_features(self.backbone(x)))
        h, c = (row.expand(len(x), -1) for row in self.first)
        predictions, states = [], []
        for _ in range(ticks or self.ticks):
            seen = self.attention(self.to_query(h)[:, None], heard)
            h, c = self.cell(seen[:, 0], (h, c))
            predictions.append(self.to_prediction(h).unflatten(-1, self.out))
            states.append(h)
        found = torch.stack(predictions, 1)
        return Thoughts(found, torch.stack([certainty(p) for p in predictions], 1), torch.stack(states, 1), None)


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@cache
def lstm_width(task: str) -> int:
    """The width at which the LSTM has as many parameters as the CTM, or just fewer."""
    most = parameters(machine(task))
    return max(width for width in range(8, 256) if parameters(LSTMThinker(task, width)) <= most)


def model_of(task: str, arm: str) -> nn.Module:
    """A new model of an arm, its numbers drawn from torch's own generator."""
    arm, _, ticks = arm.partition(", ")
    number = int(ticks.split()[0]) if ticks else None
    return LSTMThinker(task, lstm_width(task), number) if arm == "LSTM" else machine(task, arm, number)


# --- what it shows -------------------------------------------------------------------------------------------------


@torch.no_grad()
def think(model: nn.Module, inputs: Inputs, ticks: int | None = None) -> Thoughts:
    """The thoughts about all inputs, in parts."""
    found = [model(part, ticks=ticks) for part in inputs.x.split(1000)]
    return Thoughts(*(torch.cat(each) for each in zip(*(thoughts[:3] for thoughts in found))), None)


def right(thoughts: Thoughts, y: Tensor) -> Tensor:
    """(B, T), the share of the answers that are right at each tick: 0 or 1 where there is one answer."""
    same = (thoughts.predictions.argmax(-1) == y[:, None]).float()
    return same.flatten(2).mean(-1) if same.ndim > 2 else same


def surest(thoughts: Thoughts, table: Tensor) -> Tensor:
    """(B, T) -> (B,), at the most certain tick."""
    return table.gather(1, thoughts.certainties.argmax(1, keepdim=True))[:, 0]


def stopping_ticks(certainties: Tensor, threshold: float) -> Tensor:
    """(B, T) -> (B,) from 1: the first tick that is sure enough, or the last."""
    enough = certainties >= threshold
    return torch.where(enough.any(1), enough.int().argmax(1) + 1, certainties.shape[1])


def stopped(thoughts: Thoughts, table: Tensor, threshold: float) -> tuple[float, float, float]:
    """Stopping at a threshold: mean ticks; the share right; and the share right with the same ticks dealt at random.

    An input that is never sure enough takes all ticks and answers as at its most certain one. The third is what the
    same numbers of ticks give if each input had another's: what is won above it is won by knowing when to stop.
    """
    ticks = stopping_ticks(thoughts.certainties, threshold)
    at = torch.where((thoughts.certainties >= threshold).any(1), ticks - 1, thoughts.certainties.argmax(1))
    of_each = table.gather(1, at[:, None])[:, 0]
    dealt = table.mean(0)[at].mean()
    return ticks.float().mean().item(), of_each.mean().item(), dealt.item()


# --- one training --------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once to the end, and where its result and weights are kept."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path
    scored: int = 10_000
    """How many inputs of each part are scored, at the most."""

    @property
    def file(self) -> Path:
        arm = self.arm.replace(", ", "-").replace(" ", "-")
        return self.folder / f"{self.task}_{arm}_{self.rate:g}_{self.seed}_{self.steps}.json"

    def result(self) -> dict[str, Any]:
        """What the run ended with."""
        return json.loads(self.file.read_text())

    def model(self) -> nn.Module:
        """The trained model."""
        model = model_of(self.task, self.arm)
        model.load_state_dict(torch.load(self.file.with_suffix(".pt"), weights_only=True))
        return model.eval()


def carry_out(run: Run) -> dict[str, Any]:
    """Train on one thread, and keep the result; a run that has ended is not made again."""
    if run.file.exists():
        return run.result()
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model = model_of(run.task, run.arm)

    def loss(batch: Inputs) -> Tensor:
        thoughts = model(batch.x)
        return two_tick_loss(thoughts.predictions, thoughts.certainties, batch.y)

    history = train(
        model,
        loss,
        partial(draw, run.task),
        optimiser=optimiser(model, run.rate, decay=DECAY),
        steps=run.steps,
        seed=run.seed,
        log_every=max(run.steps // 10, 1),
        name=None,
    )
    model.eval()
    parts = {name: Inputs(*(half[: run.scored] for half in parts_of(run.task)[name])) for name in ("tune", "test")}
    thoughts = think(model, parts["test"])
    table, tuned = right(thoughts, parts["test"].y), think(model, parts["tune"])
    torch.save(model.state_dict(), run.file.with_suffix(".pt"))
    keep(
        run.file,
        {
            "parameters": parameters(model),
            "rate": run.rate,
            "seed": run.seed,
            "tune": round(surest(tuned, right(tuned, parts["tune"].y)).mean().item(), 5),
            "test": round(surest(thoughts, table).mean().item(), 5),
            "by_tick": [round(x, 5) for x in table.mean(0).tolist()],
            "certainty_by_tick": [round(x, 5) for x in thoughts.certainties.mean(0).tolist()],
            "loss": [round(row["loss"], 4) for row in history],
        },
    )
    print(run.task, run.arm, run.rate, run.seed, run.result()["tune"], run.result()["test"], flush=True)
    return run.result()
