"""Spelling with and without attention: a fixed vector, equal weights, additive attention, and a transformer.

The tasks and the four models are described in benchmarks/spelling_run.py. All models of a task have as many parameters,
to 2 %, and are trained on the same words in the same order for the same number of updates.

Each model's rate is chosen on its own: it is trained to the end with one seed at each rate of a grid, and again at the
next rate beyond the grid where the best is at its edge. At the best rate it is trained with other seeds, which had no
part in the choice. A seed fixes the first weights and the order of the words, so that two models are paired by it.

    nox -s bench -- spelling        some 35 minutes of one core
    nox -s bench -- spelling --tiny a few updates of a few models, which writes nothing to docs/measured

A run is kept as it ends, in `runs/spelling` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import math
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.spelling_run import ARMS, Run, carry_out
from nondual.store import cache_folder

STEPS = {"spelling": 1000, "gita": 500, "reversal": 800}
RATES = (2e-3, 4e-3, 8e-3)
SWEEP_SEED, BEYOND = 0, 2
SEEDS = {"spelling": tuple(range(1, 9)), "gita": tuple(range(1, 5)), "reversal": tuple(range(1, 5))}


class Arm(NamedTuple):
    """A model and a task: the runs that choose its rate, and those that are reported."""

    task: str
    model: str
    steps: int
    seeds: tuple[int, ...]
    folder: Path

    def run(self, rate: float, seed: int) -> Run:
        return Run(self.task, self.model, rate, seed, self.steps, self.folder)

    def sweep(self, rates: tuple[float, ...] = RATES) -> list[Run]:
        """The runs that choose the rate, carried out: the grid, and up to BEYOND rates more where the best is at an
        edge.
        """
        runs = [self.run(rate, SWEEP_SEED) for rate in rates]
        for run in runs:
            carry_out(run)
        for _ in range(BEYOND):
            best, tried = best_rate(runs), [run.rate for run in runs]
            if min(tried) < best < max(tried):
                break
            runs.append(self.run(best / 2 if best == min(tried) else best * 2, SWEEP_SEED))
            carry_out(runs[-1])
        return runs

    def runs(self) -> list[Run]:
        """The runs at the best rate, carried out."""
        rate = best_rate(self.sweep())
        runs = [self.run(rate, seed) for seed in self.seeds]
        for run in runs:
            carry_out(run)
        return runs


def best_rate(runs: list[Run]) -> float:
    """The rate whose run ended with the lowest loss on the words to choose on."""
    return min(runs, key=lambda run: (run.result() or {})["tune_loss"]).rate


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "spelling"
    folder.mkdir(parents=True, exist_ok=True)
    only = next((x.removeprefix("--only=").split(",") for x in options if x.startswith("--only=")), None)
    for task in STEPS:
        for model in ARMS:
            if only is None or f"{task}/{model}" in only:
                Arm(task, model, 20 if tiny else STEPS[task], SEEDS[task], folder).runs()
