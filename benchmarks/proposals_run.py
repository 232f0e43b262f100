"""One run of `proposals`: a small model with one mechanism, one task, trained once to the end.

All of it follows docs/measured/protocol.md. The model has two layers of width 64 with four heads; arms differ in the
mixer, in what joins its queries and keys, or in the width of the feed-forward part where parameters are given back.
Inputs are one or several rows of ids whose vectors are added up; scores come from a matrix of their own.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plays import drawn, in_numbers, windows
from benchmarks.recall_run import size
from benchmarks.record import kept, run_file
from benchmarks.steps import steps_of_training
from nondual.attention_mechanism import AdditiveAttention
from nondual.connections import LayerCall, stream
from nondual.data.gita import gita
from nondual.efficient_attention.linear_attention import DeltaNet, LinearAttentionMixer
from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.efficient_attention.sparse_attention import SparseAttention, fixed, local
from nondual.extensions import (
    DecayingAttention,
    EnergyFlow,
    HeadFusion,
    PersistentScores,
    Roles,
    TalkingHeads,
    alone,
    fixed_point,
)
from nondual.ops import masks
from nondual.ops.attention import attention
from nondual.recurrent import LSTM, Recurrent
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.tasks import conjunction, copying, induction, recall, selective_copying, successors
from nondual.transformer import FeedForward, TransformerLayer

WIDTH, LAYERS, HEADS, WIDE, CONTEXT = 64, 2, 4, 256, 128
HEAD = WIDTH // HEADS
FRESH, FRESH_SEED = 256, 9999
HELD_OUT, WINDOWS = ("macbeth", "the-tempest"), 64
CHECKS = (16, 8, 4, 2, 1)
"""A model is judged after this part of its steps: a sixteenth, an eighth, and so on to the whole."""
SPIKE, BEFORE = 1.5, 20
"""A step is a spike when its loss exceeds the median of the 20 before it by more than a half."""


# --- tasks ---------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What is asked, and of what.

    Attributes:
        inputs: for each row of ids how many kinds there are.
        scores: among how many answers is chosen.
        draw: (batch, generator) -> (the rows of ids, each (B, N), answers (B, Q)), which belong to the last Q places.
        fresh: batches to be judged on.
        steps: of a training.
        batch: sequences for each step.
        chance: the share of right answers by guessing; for text the bits of its single characters.
        text: whether the outcome is bits for each character.
    """

    inputs: tuple[int, ...]
    scores: int
    draw: Callable[[int, torch.Generator], tuple[tuple[Tensor, ...], Tensor]]
    fresh: Callable[[], Iterator[tuple[tuple[Tensor, ...], Tensor]]]
    steps: int
    batch: int
    chance: float
    text: bool = False


def made_up(
    inputs: tuple[int, ...],
    scores: int,
    draw: Callable[..., Any],
    steps: int = 300,
    batch: int = 16,
    fresh: int = FRESH,
) -> Task:
    """A task whose sequences are drawn anew at each step."""

    def rows(batch: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        *given, answers = draw(batch, generator=generator)
        return tuple(given), answers

    def asked() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        given, answers = rows(fresh, torch.Generator().manual_seed(FRESH_SEED))
        return zip(zip(*(row.split(128) for row in given)), answers.split(128))

    return Task(inputs, scores, rows, asked, steps, batch, 1 / scores)


def of_text(train: Tensor, held_out: Tensor, kinds: int) -> Task:
    """The next character of a text."""

    def rows(batch: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor]:
        ids = drawn(train, batch, CONTEXT, generator)
        return (ids[:, :-1],), ids[:, 1:]

    def fresh() -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        for part in held_out.split(16):
            yield (part[:, :-1],), part[:, 1:]

    shares = train.bincount(minlength=kinds) / len(train)
    return Task((kinds,), kinds, rows, fresh, 300, 16, float(torch.special.entr(shares).sum()) / math.log(2), True)


@cache
def shakespeare_task() -> Task:
    plays = in_numbers(HELD_OUT)
    held_out = torch.cat([windows(plays.of[name], CONTEXT, WINDOWS // 2) for name in HELD_OUT])
    return of_text(plays.train, held_out, len(plays.alphabet))


@cache
def gita_task() -> Task:
    """The Gita in Latin letters; its last two chapters are held out."""
    verses = gita()
    late = [verse.number.split(".")[0] in ("17", "18") for verse in verses]
    texts = ["\n".join(" ".join(v.iast) for v, last in zip(verses, late) if last is which) for which in (False, True)]
    alphabet = sorted(set("".join(texts)))
    train, held_out = (torch.tensor([alphabet.index(c) for c in text]) for text in texts)
    return of_text(train, windows(held_out, CONTEXT, WINDOWS), len(alphabet))


TASKS: dict[str, Callable[[], Task]] = {
    "copy": lambda: made_up((10,), 8, partial(copying, length=16)),
    "reverse": lambda: made_up((10,), 8, partial(copying, length=16, latest_first=True)),
    "selective copy": lambda: made_up((10,), 8, partial(selective_copying, length=32, tokens=8)),
    "induction": lambda: made_up((32,), 32, partial(induction, length=24)),
    "recall": lambda: made_up((32, 9), 8, partial(recall, pairs=16)),
    "conjunction": lambda: made_up((8, 8, 9), 8, partial(conjunction, rows=4, columns=3)),
    "direction": lambda: made_up((32,), 16, partial(successors, ring=12), steps=600, batch=32, fresh=1024),
    "long range": lambda: made_up((10,), 8, partial(copying, length=8, gap=96)),
    "Shakespeare": shakespeare_task,
    "Gita": gita_task,
}
MADE_UP = tuple(name for name in TASKS if name not in ("Shakespeare", "Gita"))
SEEN_BOTH_WAYS = ("recall", "conjunction", "direction")
"""The tasks that the arms without causality meet."""
SEEN_OPEN = ("recall", "conjunction")
"""The tasks that the fusions whose gates start open meet."""


# --- arms ----------------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """What an arm's layers are made of.

    Attributes:
        op: what joins queries and keys, made anew for each layer; None for plain attention.
        mixer: in place of an attention with this op, made by the layer's number and whether it is causal.
        places: "learned" positions, "rotary" ones, or "none" besides what the mixer knows.
        causal: no position sees a later one.
        tied: one projection for queries and keys.
        as_wide: widen or narrow the feed-forward part until the model has as many parameters as its control.
        persistent: scores are carried on to the next layer.
    """

    op: Callable[[], Any] | None = None
    mixer: Callable[[int, bool], nn.Module] | None = None
    places: str = "learned"
    causal: bool = True
    tied: bool = False
    as_wide: bool = False
    persistent: bool = False


def flow(_: int, causal: bool) -> nn.Module:
    return EnergyFlow(WIDTH, HEADS, causal=causal)


def decaying(_: int, __: bool, *, forgets: bool = True, rotary: bool = True) -> nn.Module:
    return DecayingAttention(WIDTH, HEADS, forgets=forgets, positions=Rotary(HEAD) if rotary else None)


class Additive(nn.Module):
    """Additive attention within one sequence: every position asks all positions up to its own."""

    def __init__(self, _: int, __: bool):
        super().__init__()
        self.attend, self.out = AdditiveAttention(WIDTH, WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E)."""
        return self.out(self.attend(x, x, masks.causal(x.shape[1], device=x.device))[0])


def opened(fusion: HeadFusion) -> HeadFusion:
    """The same, with a gate that starts at 1, so that heads meet from the first step on: tanh(1) = 0.76."""
    nn.init.ones_(fusion.gate)
    return fusion


def lstm(_: int, __: bool) -> nn.Module:
    return Recurrent(WIDTH, LSTM(WIDTH, WIDTH))


def mamba2(_: int, __: bool) -> nn.Module:
    return Mamba2(WIDTH, d_state=64, d_head=HEAD)


def hybrid(i: int, _: bool) -> nn.Module:
    """Mamba first, attention after it."""
    return Mamba(WIDTH) if i == 0 else MultiHeadAttention(WIDTH, HEADS, bias=False, causal=True)


CONTINUOUS = {
    "base": Arm(),
    "symmetric": Arm(lambda: Roles(HEADS, 0.0)),
    "one projection": Arm(tied=True, as_wide=True),
    "base, rotary": Arm(places="rotary"),
    "symmetric, rotary": Arm(lambda: Roles(HEADS, 0.0), places="rotary"),
    "learned share": Arm(lambda: Roles(HEADS, 0.5, learned=True)),
    "flow": Arm(mixer=flow, as_wide=True),
}
BOTH_WAYS = {
    f"{name}, both ways": CONTINUOUS[name]._replace(causal=False)
    for name in ("base", "symmetric", "one projection", "learned share", "flow")
}
FUSION = {
    "talking heads": Arm(lambda: TalkingHeads(HEADS)),
    "fusion": Arm(lambda: HeadFusion(HEAD)),
    "fusion, fixed point": Arm(lambda: HeadFusion(HEAD, solver=fixed_point(1e-4))),
    "fusion, placebo": Arm(lambda: HeadFusion(HEAD, couple=alone)),
}
FUSION_OPEN = {
    "fusion, open": Arm(lambda: opened(HeadFusion(HEAD))),
    "fusion, open, placebo": Arm(lambda: opened(HeadFusion(HEAD, couple=alone))),
}
LIBERATING = {  # queries and keys are normalised in all of them, so that the first is their control
    "normalised": Arm(mixer=partial(decaying, forgets=False), places="none", as_wide=True),
    "decay": Arm(mixer=decaying, places="none"),
    "persistence": Arm(mixer=partial(decaying, forgets=False), places="none", as_wide=True, persistent=True),
    "decay and persistence": Arm(mixer=decaying, places="none", persistent=True),
    "decay, no positions": Arm(mixer=partial(decaying, rotary=False), places="none"),
}
# --8<-- [start:arc]
ARC = {
    "LSTM": Arm(mixer=lstm, places="none", as_wide=True),
    "additive": Arm(mixer=Additive, as_wide=True),
    "window of 16": Arm(lambda: SparseAttention(local(16), block=16)),
    "fixed, stretches of 16": Arm(lambda: SparseAttention(fixed(16), block=16)),
    "linear": Arm(mixer=lambda _, __: LinearAttentionMixer(WIDTH, HEADS), as_wide=True),
    "delta rule": Arm(mixer=lambda _, __: DeltaNet(WIDTH, HEADS), as_wide=True),
    "Mamba": Arm(mixer=lambda _, __: Mamba(WIDTH), places="none", as_wide=True),
    "Mamba-2": Arm(mixer=mamba2, places="none", as_wide=True),
    "hybrid": Arm(mixer=hybrid, as_wide=True),
}
# --8<-- [end:arc]
SECTIONS = {
    "continuous": CONTINUOUS | BOTH_WAYS,
    "self_liberating": LIBERATING,
    "head_fusion": FUSION | FUSION_OPEN,
    "arc": ARC,
}
"""The arms of each section of the protocol, by the name of its chapter."""
ARMS = {name: arm for arms in SECTIONS.values() for name, arm in arms.items()}
MEETS = (
    dict.fromkeys(ARMS, tuple(TASKS)) | dict.fromkeys(BOTH_WAYS, SEEN_BOTH_WAYS) | dict.fromkeys(FUSION_OPEN, SEEN_OPEN)
)
"""The tasks that each arm meets."""


def control_of(arm: str) -> str:
    """What an arm is compared with, and of whose size it is."""
    if arm in LIBERATING:
        return "normalised"
    return next((f"base{end}" for end in (", both ways", ", rotary") if arm.endswith(end)), "base")


class Reader(nn.Module):
    """Rows of ids, whose vectors are added up, positions, layers, a norm, and scores."""

    def __init__(self, task: Task, arm: Arm, wide: int = WIDE):
        super().__init__()
        self.inputs = nn.ModuleList(nn.Embedding(kinds, WIDTH) for kinds in task.inputs)
        self.places = nn.Embedding(CONTEXT, WIDTH) if arm.places == "learned" else None
        self.layers = nn.ModuleList(
            TransformerLayer(self.mixer(arm, i), FeedForward(WIDTH, wide), WIDTH, norm_first=True)
            for i in range(LAYERS)
        )
        self.connection = PersistentScores(LAYERS) if arm.persistent else stream
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, task.scores)
        for one in (*self.inputs, *([] if self.places is None else [self.places])):
            nn.init.normal_(one.weight, std=WIDTH**-0.5)  # type: ignore[arg-type]

    @staticmethod
    def mixer(arm: Arm, i: int) -> nn.Module:
        """The mixer of layer i."""
        if arm.mixer is not None:
            return arm.mixer(i, arm.causal)
        op = attention if arm.op is None else arm.op()
        positions = Rotary(HEAD) if arm.places == "rotary" else None
        mixer = MultiHeadAttention(WIDTH, HEADS, bias=False, causal=arm.causal, op=op, positions=positions)
        if arm.tied:
            mixer.k_proj = mixer.q_proj
        return mixer

    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        """The rows of ids, each (B, N) -> scores (B, N, answers)."""
        x = torch.stack([one(row) for one, row in zip(self.inputs, given)]).sum(0)
        if self.places is not None:
            x = x + self.places.weight[: x.shape[1]]
        x = self.connection(x, [LayerCall(layer, {}) for layer in self.layers])
        return self.head(self.norm(x))


def model_of(task: Task, name: str, seed: int) -> Reader:
    """A new model; what it shares with its control by name and shape begins as the control of this seed does."""
    arm, control, wide = ARMS[name], control_of(name), WIDE
    if arm.as_wide:
        wanted = size(Reader(task, ARMS["decay" if name in LIBERATING else control]))
        each = LAYERS * (2 * WIDTH + 1)  # parameters of one more hidden unit in every layer
        wide += round((wanted - size(Reader(task, arm))) / each)
    torch.manual_seed(seed)
    model = Reader(task, arm, wide)
    if control != name:
        start = dict(model_of(task, control, seed).named_parameters())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key in start and start[key].shape == parameter.shape:
                    parameter.copy_(start[key])
    return model


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once, and where its result is kept."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int | None
    folder: Path

    @property
    def file(self) -> Path:
        return run_file(self.folder, self.task, self.arm, self.rate, self.seed, self.steps or "all")


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless that was done before; keep what it ended with."""
    return kept(run.file, trained, run)


def steps_of(task: str, arm: str) -> int:
    """The steps of a whole training: twice as many where loss by position is measured afterwards."""
    return TASKS[task]().steps * (2 if task == "Shakespeare" and arm in LIBERATING else 1)


def trained(run: Run) -> dict[str, Any]:
    """The outcome, and what else is kept of each run."""
    return fitted(run)[1]


def fitted(run: Run) -> tuple[Reader, dict[str, Any]]:
    """The model at the end of its training, and what is kept of the run."""
    task, began = TASKS[run.task](), time.process_time()
    model = model_of(task, run.arm, run.seed)
    steps = steps_of(run.task, run.arm) if run.steps is None else run.steps
    losses: list[float] = []
    curve: list[float] = []
    failed: str | None = None
    checks = [max(steps // part, 1) for part in CHECKS]

    def drawn_loss(generator: torch.Generator) -> Tensor:
        return loss_of(model, *task.draw(task.batch, generator))

    try:
        for i, loss in enumerate(steps_of_training(model, drawn_loss, run.rate, steps, run.seed), 1):
            losses.append(loss)
            if not math.isfinite(loss):
                failed = "the loss is not finite"
            elif i in checks:
                curve += [judged(model, task)] * checks.count(i)
    except RuntimeError as error:  # a fixed point that was not reached
        failed = str(error)
    if not failed and not all(math.isfinite(each) for each in curve):
        failed = "an outcome is not finite"
    if failed:  # from then on it counts as guessing
        known = [each for each in curve if math.isfinite(each)]
        curve = known + [task.chance] * (len(CHECKS) - len(known))
    ended = {
        "rate": run.rate,
        "seed": run.seed,
        "outcome": round(curve[-1] if task.text else mean(curve), 5),
        "curve": [round(each, 5) for each in curve],
        "failed": failed,
        "spikes": spikes(losses),
        "loss": [round(each, 4) for each in losses[:: max(steps // 20, 1)]],
        "shares": [one.share.tolist() for one in model.modules() if isinstance(one, Roles)],
        "heads": meetings(model, task),
        "parameters": size(model),
        "seconds": round(time.process_time() - began, 1),
    }
    return model, ended


@torch.no_grad()
def meetings(model: Reader, task: Task) -> dict[str, Any] | None:
    """How far the heads of each layer came to meet, and what the model is worth where they are kept apart again.

    Gates are given as tanh(g); mixing matrices as the norm of what lies off their diagonal over that of the whole.
    """
    model = copy.deepcopy(model)
    gates = [one.gate for one in model.modules() if isinstance(one, HeadFusion)]
    mixings = [each for one in model.modules() if isinstance(one, TalkingHeads) for each in (one.before, one.after)]
    if not gates and not mixings:
        return None
    found = {
        "gates": [round(float(gate.tanh()), 4) for gate in gates],
        "mixings": [round(float((each - each.diag().diag()).norm() / each.norm()), 4) for each in mixings],
    }
    for gate in gates:
        gate.zero_()
    for each in mixings:
        each.copy_(each.diag().diag())
    try:
        return {**found, "apart": round(judged(model, task), 5)}
    except RuntimeError as error:  # a fixed point that was not reached
        return {**found, "apart": str(error)}


def loss_of(model: nn.Module, given: tuple[Tensor, ...], answers: Tensor) -> Tensor:
    """Cross-entropy at the places where an answer is due, in nats."""
    said = model(given)[:, -answers.shape[1] :]
    return F.cross_entropy(said.flatten(0, 1), answers.flatten())


@torch.no_grad()
def judged(model: nn.Module, task: Task) -> float:
    """The share of right answers, or for text the bits for each character. No arm behaves otherwise in training."""
    total, count = 0.0, 0
    for given, answers in task.fresh():
        if task.text:
            total += loss_of(model, given, answers).item() / math.log(2) * answers.numel()
        else:
            said = model(given)[:, -answers.shape[1] :].argmax(-1)
            total += (said == answers).sum().item()
        count += answers.numel()
    return total / count


def spikes(losses: list[float]) -> int:
    """How many losses exceed the median of those before them by more than a half."""
    return sum(losses[i] > SPIKE * median(losses[i - BEFORE : i]) for i in range(BEFORE, len(losses)))
