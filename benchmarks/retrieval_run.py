"""One run of `retrieval`: a small model, trained once, on what attention looks up and on what it computes.

relevance   Keys with values are shown, and the value of a key is asked that a fixed map gives for the key in the
            question: the same key, the opposite one, or the next on a ring. Arms differ in how queries and keys are
            made of the vectors that are compared.
largest     Numbers are read, and the largest is named. No positions.
count       Tokens of two kinds are read, and those of the first kind are counted. No positions. The arm without a
            start token reads the same rows.
steps       A ball lies under the first of five cups, and cups are swapped; where is the ball? Arms are asked at the
            end alone, or after every swap, or read what they wrote after every swap.
data        A training set of n sequences that is never added to: recall of pairs, and a rule of three neighbours.
            Arms differ in what mixes the positions, and have as many parameters as attention, to a per cent.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.recall_run import Batch, Reader, attending, lstm, size
from benchmarks.record import kept, run_file
from nondual.feed_forward import FeedForward
from nondual.relative_positions import Rotary
from nondual.tasks import recall
from nondual.training import optimiser, train

BATCH, WIDTH, HIDDEN, CHECKS = 32, 32, 128, 5

# --- what is asked -------------------------------------------------------------------------------------------------

KINDS, VALUES, QUESTIONS = 12, 8, 8
"""Of relevance: every key is shown, so that the one that is asked for is always there."""
MAPS: dict[str, tuple[int, ...]] = {
    "same": tuple(range(KINDS)),
    "opposite": tuple(i ^ 1 for i in range(KINDS)),
    "next": tuple((i + 1) % KINDS for i in range(KINDS)),
}
NUMBERS, MOST = 32, 8
CUPS, SWAPS = 5, 16
PAIRS_OF_CUPS = torch.combinations(torch.arange(CUPS))
"""(10, 2): the two cups of each swap."""
TOKENS, PLACES = 4, 3
RULE = torch.randint(TOKENS, (TOKENS,) * PLACES, generator=torch.Generator().manual_seed(0))
"""The answer to three neighbours: a table drawn once."""
ROW = {"recall": 12, "rule": 16}


def relevance(which: str, batch: int, generator: torch.Generator) -> Batch:
    """Keys and values (B, M + Q), and the value (B, Q) of the key that the map gives for each question."""
    keys, values, answers = recall(batch, KINDS, keys=KINDS, values=VALUES, questions=QUESTIONS, generator=generator)
    back = torch.tensor(MAPS[which]).argsort()
    return (torch.cat([keys[:, :KINDS], back[keys[:, KINDS:]]], 1), values), answers


def largest(batch: int, generator: torch.Generator, n: int | None = None) -> Batch:
    """n numbers and a question mark (B, n + 1), and the largest (B, 1); 2 to 8 of them where n is left out."""
    n = n or int(torch.randint(2, MOST + 1, (1,), generator=generator))
    numbers = torch.randint(NUMBERS, (batch, n), generator=generator)
    return (F.pad(numbers, (0, 1), value=NUMBERS),), numbers.amax(1, keepdim=True)


def count(start: bool, batch: int, generator: torch.Generator, n: int | None = None) -> Batch:
    """Tokens 0 and 1 (B, n), after a start token 2 or not, and how many are 0 (B, 1): 0 to 8, in rows of 8 to 16."""
    n = n or int(torch.randint(MOST, 2 * MOST + 1, (1,), generator=generator))
    counts = torch.randint(MOST + 1, (batch, 1), generator=generator)
    ids = (torch.rand(batch, n, generator=generator).argsort(1) >= counts).long()
    return (F.pad(ids, (1, 0), value=2) if start else ids,), counts


def shells(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Swaps (B, n), each one of 10, and under which cup the ball is after each of them (B, n)."""
    swaps = torch.randint(len(PAIRS_OF_CUPS), (batch, SWAPS), generator=generator)
    ball, seen = torch.zeros(batch, dtype=torch.long), []
    for a, b in PAIRS_OF_CUPS[swaps].permute(1, 2, 0):
        ball = torch.where(ball == a, b, torch.where(ball == b, a, ball))
        seen.append(ball)
    return swaps, torch.stack(seen, 1)


CUP_IDS = len(PAIRS_OF_CUPS) + 1
"""Ids of steps: 10 swaps, a question mark, and from here on the cups."""


def steps(form: str, batch: int, generator: torch.Generator) -> Batch:
    """The swaps, and what is asked of them.

    end      the swaps, a question mark               the last cup
    each     the swaps                                the cup after each swap
    written  the swaps, a question mark, and what was written so far: the cup after each swap but the last
    """
    swaps, cups = shells(batch, generator)
    asked = F.pad(swaps, (0, 1), value=len(PAIRS_OF_CUPS))
    if form == "end":
        return (asked,), cups[:, -1:]
    return (swaps if form == "each" else torch.cat([asked, CUP_IDS + cups[:, :-1]], 1),), cups


def sequences(task: str, batch: int, generator: torch.Generator) -> Batch:
    """Of data: rows and their answers, which belong to the last places."""
    if task == "recall":
        keys, values, answers = recall(batch, 8, keys=16, values=8, questions=4, generator=generator)
        return (keys, values), answers
    ids = torch.randint(TOKENS, (batch, ROW["rule"]), generator=generator)
    return (ids,), RULE[tuple(ids[:, i : i - PLACES + 1 or None] for i in range(PLACES))]


# --- the arms ------------------------------------------------------------------------------------------------------


def compared(projections: int) -> nn.Module:
    """One head: the vectors themselves are compared, or one projection of them, or two."""
    mixer = attending(WIDTH, 1, bias=False)
    if projections == 0:
        for linear in (mixer.q_proj, mixer.k_proj):
            nn.init.eye_(linear.weight)
            linear.requires_grad_(False)
    if projections == 1:
        mixer.k_proj = mixer.q_proj
    return mixer


class Convolution(nn.Module):
    """A filter over the last 4 places that also mixes channels."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv1d(WIDTH, WIDTH, 4, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E); no place sees a later one."""
        return self.filter(x.mT)[..., : x.shape[1]].mT


class LongConvolution(nn.Module):
    """Each channel's own filter over the last 16 places, which is the whole row, and then a projection."""

    def __init__(self):
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(WIDTH, 16) / 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, E) -> (B, N, E); no place sees a later one."""
        return self.out((F.pad(x, (0, 0, 15, 0)).unfold(1, 16, 1) * self.filter).sum(-1))


def feed_forward(hidden: int = HIDDEN) -> nn.Module:
    return FeedForward(WIDTH, hidden)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: attending(WIDTH, 4, positions=Rotary(WIDTH // 4)),
    "convolution of 4": Convolution,
    "convolution of 16": LongConvolution,
    "LSTM": lambda: lstm(WIDTH, WIDTH),
    "no mixing": lambda: nn.Linear(WIDTH, WIDTH),
}


def of_data(task: str, arm: str, hidden: int = HIDDEN) -> Reader:
    """Two mixers, each with a feed-forward network after it."""
    inputs = [16, 9] if task == "recall" else [TOKENS]
    blocks = [block for _ in range(2) for block in (MIXERS[arm](), feed_forward(hidden))]
    return Reader([nn.Embedding(n, WIDTH) for n in inputs], WIDTH, blocks, 8 if task == "recall" else TOKENS)


def model_of(task: str, arm: str) -> Reader:
    """A new model for an arm of a task."""
    part, _, which = task.partition(" ")
    if part == "data":
        which = which.split()[0]
        unit = size(of_data(which, arm, 2)) - size(of_data(which, arm, 1))
        more = size(of_data(which, "attention")) - size(of_data(which, arm))
        return of_data(which, arm, HIDDEN + round(more / unit))
    if part == "relevance":
        blocks = [compared(int(arm[0]))]
        if "network" in arm:
            blocks.insert(0, feed_forward())
        return Reader([nn.Embedding(KINDS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)], WIDTH, blocks, VALUES)
    if part == "steps":
        wide = 2 * WIDTH
        layers = 6 if "deep" in arm else 2
        blocks = [b for _ in range(layers) for b in (attending(wide, 4), FeedForward(wide, 4 * wide))]
        places = {"end": SWAPS + 1, "each": SWAPS, "written": 2 * SWAPS}[arm.split()[0]]
        return Reader([nn.Embedding(CUP_IDS + CUPS, wide)], wide, blocks, CUPS, places)
    kinds, answers = (NUMBERS + 1, NUMBERS) if part == "largest" else (3, MOST + 1)
    blocks = [attending(WIDTH, 4), feed_forward()]
    return Reader([nn.Embedding(kinds, WIDTH)], WIDTH, blocks, answers)


# --- one run -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One model, trained once, and where its result is kept. The task of data has n at its end: "data recall 128"."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return run_file(self.folder, self.task, self.arm, self.rate, self.seed, self.steps)


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless that was done before; keep what it ended with."""
    return kept(run.file, trained, run)


def trained(run: Run) -> dict[str, Any]:
    """What a training ended with: "right" is the share by which rates are chosen."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model = model_of(run.task, run.arm)
    part, _, which = run.task.partition(" ")
    found = {"rate": run.rate, "seed": run.seed, "parameters": size(model)}
    if part == "data":
        return found | from_few(run, model, *which.split())
    draw: Callable[..., Batch] = {
        "relevance": partial(relevance, which),
        "largest": largest,
        "count": partial(count, run.arm == "start"),
        "steps": partial(steps, run.arm.split()[0]),
    }[part]
    fit(run, model, partial(draw, BATCH))
    fresh = torch.Generator().manual_seed(9999)
    if part in ("largest", "count"):
        n = {"largest": (8, 16, 32, 64), "count": (16, 32, 64, 128)}[part]
        by_length = {str(m): share(model, draw(512, fresh, n=m)) for m in n}
        return found | {"right": by_length[str(n[0])], "by_length": by_length}
    if part == "steps":
        by_step = tracked(model, run.arm)
        return found | {"right": by_step[-1], "by_step": by_step}
    return found | {"right": share(model, draw(512, fresh))}


def fit(run: Run, model: Reader, draw: Callable[[torch.Generator], Batch], measure: Any = None) -> None:
    train(
        model,
        partial(loss_of, model),
        draw,
        optimiser=optimiser(model, run.rate),
        steps=run.steps,
        seed=run.seed,
        measure=measure,
        log_every=max(run.steps // CHECKS, 1),
        name=None,
    )
    model.eval()


def loss_of(model: Reader, batch: Batch) -> Tensor:
    """Cross-entropy at the last places."""
    given, answers = batch
    return F.cross_entropy(model(given)[:, -answers.shape[1] :].flatten(0, 1), answers.flatten())


@torch.no_grad()
def share(model: Reader, batch: Batch) -> float:
    """Of the answers, the share that is right."""
    given, answers = batch
    return round((model(given)[:, -answers.shape[1] :].argmax(-1) == answers).double().mean().item(), 4)


@torch.no_grad()
def tracked(model: Reader, arm: str) -> list[float]:
    """The share of right cups, after each swap or at the end alone. The model reads what it wrote itself."""
    form = arm.split()[0]
    (ids,), cups = steps(form, 512, torch.Generator().manual_seed(9999))
    if form == "written":
        ids, said = ids[:, : SWAPS + 1], []
        for _ in range(SWAPS):
            row = F.pad(ids, (0, 2 * SWAPS - ids.shape[1]))  # no place sees a later one
            said.append(model((row,))[:, ids.shape[1] - 1].argmax(-1))
            ids = torch.cat([ids, CUP_IDS + said[-1][:, None]], 1)
        right = torch.stack(said, 1) == cups
    else:
        right = model((ids,))[:, -cups.shape[1] :].argmax(-1) == cups
    return [round(x, 4) for x in right.double().mean(0).tolist()]


def from_few(run: Run, model: Reader, task: str, n: str) -> dict[str, Any]:
    """Train on n sequences; what is right of fresh ones, at the check at which most of others was."""
    known = sequences(task, int(n), torch.Generator().manual_seed(run.seed))
    chosen_on, fresh = (sequences(task, 512, torch.Generator().manual_seed(seed)) for seed in (7777, 9999))
    checks: list[tuple[float, float]] = []

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randint(int(n), (BATCH,), generator=generator)
        return tuple(part[rows] for part in known[0]), known[1][rows]

    def measure() -> dict[str, float]:
        chosen = share(model, chosen_on)
        if not checks or chosen > checks[-1][0]:
            checks.append((chosen, share(model, fresh)))
        return {"chosen_on": chosen}

    fit(run, model, draw, measure)
    chosen, right = checks[-1]
    return {"right": chosen, "fresh": right, "known": share(model, known)}
