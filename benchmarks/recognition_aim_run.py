"""One run of `recognition_aim`: a small transformer on stored tasks, trained once to the end, under one aim.

All of it follows section 4 of docs/measured/protocol.md. The model reads examples of a linear function, x and y with
noise, says each next y, and has a linear layer that names the stored task. Arms differ in what the name is asked for
and in how often each task comes:

    next                      no name is asked for
    task 0.1                  the stored task is named, with this weight beside the squared error
    random 0.1                a placebo: a name drawn by lot for each prompt, as often as the tasks come
    inputs 0.1                a placebo: a name that can be learned and tells nothing of the task, see `inputs_name`
    next, Zipf, and so on     the same with tasks that come by Zipf's law
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.recall_run import size
from benchmarks.record import kept, run_file
from nondual.extensions import Recogniser, recognition_index, recurring, zipf
from nondual.language_models.in_context_learning import InContextRegressor, predict, ridge, stored_tasks
from nondual.language_models.in_context_learning.functions import dense
from nondual.training import optimiser, train

D, M, LENGTH, NOISE = 4, 8, 10, 0.25
"""Inputs, stored tasks, pairs of a prompt, and the standard deviation of the noise."""
WIDTH, LAYERS, HEADS = 32, 2, 2
BATCH, STEPS = 16, 600
TESTED = 64
"""Prompts of each stored task; M times as many of new tasks."""


class Arm(NamedTuple):
    """What an arm is rewarded for.

    Attributes:
        name: what is to be named: "task", or a placebo "random" or "inputs"; "next" for nothing.
        weight: of the name's cross-entropy beside the mean squared error.
        law: whether tasks come by Zipf's law; all alike otherwise.
    """

    name: str
    weight: float = 0.0
    law: bool = False

    def __str__(self) -> str:
        return self.name + (f" {self.weight:g}" if self.weight else "") + (", Zipf" if self.law else "")

    @property
    def shares(self) -> Tensor:
        """How often each of the M tasks comes."""
        return zipf(M, 1.0 if self.law else 0.0)


class Run(NamedTuple):
    """One model, trained once, and where its result is kept."""

    arm: Arm
    rate: float
    seed: int
    steps: int
    folder: Path

    @property
    def file(self) -> Path:
        return run_file(self.folder, self.arm, self.rate, self.seed, self.steps)


def carry_out(run: Run) -> dict[str, Any]:
    """Train from the beginning, unless that was done before; keep what it ended with."""
    return kept(run.file, trained, run)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(seed: int) -> Tensor:
    """The stored tasks of a seed, (M, D)."""
    return dense(M, D, seeded(1000 + seed))


class Prompts(NamedTuple):
    """Prompts with the names of their tasks: x (B, N, D), y (B, N) with noise, target (B, N) without, which (B,)."""

    x: Tensor
    y: Tensor
    target: Tensor
    which: Tensor


def prompts(weights: Tensor, which: Tensor, generator: torch.Generator) -> Prompts:
    """Prompts of given tasks, weights (B, D)."""
    x = torch.randn(len(weights), LENGTH, D, generator=generator)
    target = torch.einsum("bnd,bd->bn", x, weights)
    return Prompts(x, target + NOISE * torch.randn(target.shape, generator=generator), target, which)


def inputs_name(x: Tensor) -> Tensor:
    """Which of M fixed directions the mean of a prompt's inputs lies nearest to, (B, N, D) -> (B,).

    Like the task it is known better with each example; unlike it, it does not help to say an answer.
    """
    directions = torch.nn.functional.normalize(torch.randn(M, D, generator=seeded(77)), dim=1)
    return (x.mean(1) @ directions.mT).argmax(1)


def trained(run: Run) -> dict[str, Any]:
    """Train one arm, and judge it on stored and on new tasks."""
    arm, tasks, began = run.arm, table(run.seed), time.process_time()
    torch.manual_seed(run.seed)
    model = Recogniser(InContextRegressor(D, WIDTH, LAYERS, HEADS), M)
    lots = seeded(5000 + run.seed)  # of its own, so that all arms of a seed meet the same inputs and tasks

    def draw(generator: torch.Generator) -> Prompts:
        """Prompts of stored tasks; the names that the arm asks for."""
        weights, which = recurring(BATCH, tasks, shares=arm.shares, generator=generator)
        drawn = prompts(weights, which, generator)
        if arm.name == "random":
            return drawn._replace(which=torch.multinomial(arm.shares, BATCH, replacement=True, generator=lots))
        return drawn._replace(which=inputs_name(drawn.x)) if arm.name == "inputs" else drawn

    try:
        train(
            model,
            lambda batch: model.loss(batch.x, batch.y, batch.which, reward=arm.weight),
            draw,
            optimiser=optimiser(model, run.rate),
            steps=run.steps,
            seed=run.seed,
            log_every=run.steps,
            name=None,
        )
        failed = None
    except FloatingPointError as error:  # it counts as one that always answers 0, and names nothing
        failed, model = str(error), Recogniser(InContextRegressor(D, WIDTH, LAYERS, HEADS), M)
        with torch.no_grad():
            for parameter in (*model.regressor.read_out.parameters(), *model.names.parameters()):
                parameter.zero_()
    return {
        "arm": str(arm),
        "rate": run.rate,
        "seed": run.seed,
        "failed": failed,
        **judged(model, tasks, run.seed),
        "parameters": size(model),
        "seconds": round(time.process_time() - began, 2),
    }


# --- what a model is judged by -------------------------------------------------------------------------------------


def asked(tasks: Tensor) -> dict[str, Prompts]:
    """Prompts of every stored task as often, and of as many new tasks."""
    which = torch.arange(M).repeat_interleave(TESTED)
    return {
        "stored": prompts(tasks[which], which, seeded(9999)),
        "new": prompts(dense(M * TESTED, D, seeded(9998)), torch.full((M * TESTED,), M), seeded(9997)),
    }


@torch.no_grad()
def judged(model: Recogniser, tasks: Tensor, seed: int) -> dict[str, Any]:
    """Errors after one example and more, the index, and the share of right names."""
    model.eval()
    given = asked(tasks)
    said = {kind: model(each.x, each.y) for kind, each in given.items()}
    found = outcomes({kind: each.answers for kind, each in said.items()}, given)
    for kind, each in given.items():
        r = recognition_index(said[kind].answers, each.x, each.y, tasks, noise=NOISE)
        found[f"index on {kind}"] = round(r[1:].mean().item(), 5)
    right = said["stored"].names[..., :M].argmax(-1) == given["stored"].which[:, None]
    found["named"] = [round(share, 4) for share in right.float().mean(0).tolist()]
    found["readable"] = readable(model, tasks, seed)
    return found


def outcomes(said: dict[str, Tensor], given: dict[str, Prompts]) -> dict[str, Any]:
    """The mean squared errors over the places from one example on; those of single stored tasks as well."""
    off = {kind: (said[kind] - each.target).square()[:, 1:].mean(1) for kind, each in given.items()}
    of_each = off["stored"].view(M, TESTED).mean(1)
    by_place = {kind: (said[kind] - each.target).square().mean(0) for kind, each in given.items()}
    return {
        "stored": round(of_each.mean().item(), 5),
        "stored, by Zipf": round((of_each.double() @ zipf(M).double()).item(), 5),
        "new": round(off["new"].mean().item(), 5),
        "of each task": [round(each, 5) for each in of_each.tolist()],
        "by place": {kind: [round(each, 5) for each in values.tolist()] for kind, values in by_place.items()},
    }


def readable(model: Recogniser, tasks: Tensor, seed: int) -> float:
    """The share of tasks that a linear layer fitted afterwards names, from what the model made of the last question.

    It is fitted by least squares to other prompts of the stored tasks, in the same way for all arms: this tells what
    the model knows of the task, whether or not it was asked.
    """
    which = torch.arange(M).repeat_interleave(2 * TESTED)
    fit, test = prompts(tasks[which], which, seeded(9996)), asked(tasks)["stored"]
    features, questions = (
        torch.cat([read, torch.ones(len(read), 1)], 1).double()
        for read in (model.regressor.read(each.x, each.y)[:, -1] for each in (fit, test))
    )
    gram = features.mT @ features + 1e-3 * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    names = torch.linalg.solve(gram, features.mT @ torch.eye(M, dtype=torch.float64)[which])
    return round(((questions @ names).argmax(1) == test.which).float().mean().item(), 4)


def corners(seed: int) -> dict[str, dict[str, Any]]:
    """The outcomes of the two predictors on the same prompts, and how often the likeliest task is the right one."""
    tasks = table(seed)
    given = asked(tasks)
    found = {
        "stored tasks": outcomes(
            {kind: predict(stored_tasks(x, y, tasks, NOISE), x) for kind, (x, y, _, _) in given.items()}, given
        ),
        "ridge": outcomes({kind: predict(ridge(x, y, D * NOISE**2), x) for kind, (x, y, _, _) in given.items()}, given),
    }
    x, y, _, which = given["stored"]
    off = (y[..., None] - x @ tasks.mT).square().cumsum(1)[:, :-1]  # after one example and more
    best = (off.argmin(-1) == which[:, None]).float().mean(0).tolist()
    found["stored tasks"]["named"] = [round(1 / M, 4), *(round(share, 4) for share in best)]
    return found
