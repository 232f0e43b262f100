"""Connections over depth compared: a deep, narrow GPT on characters of Shakespeare, six ways to join its layers.

The arms are those of benchmarks/depth_run.py. The plan, written before the first run:

    rates     each arm with one seed at three rates, extended by factors of two until the best is not at the edge; the
              rate with the fewest bits per character on a play held out for this is taken
    compared  each arm at its rate, six other seeds, scored once on two plays that had no part in anything before.
              A seed fixes the weights that the layers start with, and which windows are read in which order, so that
              the arms are paired by it
    cost      multiply-adds of a token by the formulas below, and the time of a step, forward and backward, the arms
              taking turns

All arms train for the same number of steps; the time of a step says what an arm's steps cost.

The plan was carried out once before, with 300 steps and three seeds. No arm then differed from the plain stream by
more than its interval, and all had learned little more than which character follows which (3.6 bits). Steps and seeds
were then doubled, the rest was left as it was. What differs later in training is still not seen.

    nox -s bench -- depth           some fifty minutes of one idle core
    nox -s bench -- depth --tiny    a few steps of a few runs, which writes nothing

A run is kept as it ends, in `runs/depth` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from benchmarks.depth_run import ARMS, BATCH, CONTEXT, HEADS, LAYERS, WIDTH, Run, carry_out, model_of, read
from benchmarks.heads_trained import difference
from benchmarks.record import alternate, ratio, write
from benchmarks.sweeps import grown
from benchmarks.sweeps import lowest as best_of
from nondual.store import cache_folder

RATES = (4e-3, 8e-3, 1.6e-2)
SWEEP_SEED, SEEDS, STEPS = 0, (1, 2, 3, 4, 5, 6), 600


class Plan(NamedTuple):
    """How long a training is, and where runs are kept."""

    steps: int
    folder: Path
    tiny: bool = False

    def run(self, arm: str, rate: float, seed: int) -> Run:
        return Run(arm, rate, seed, self.steps, self.folder, 2 if self.tiny else 10_000)


def sweep(plan: Plan, arm: str) -> dict[float, float]:
    """Rate -> bits per character on the play held out for it, the best of them not at the edge."""
    return grown(
        lambda rate: carry_out(plan.run(arm, rate, SWEEP_SEED))["tune"], RATES[: 1 if plan.tiny else None], best_of
    )


def carry_out_all(plan: Plan) -> dict[str, Any]:
    """Every run of the plan, and what came of it: for each arm its sweep, its seeds, and its difference from plain."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        start = time.perf_counter()
        swept = sweep(plan, arm)
        runs = [carry_out(plan.run(arm, best_of(swept), seed)) for seed in SEEDS[: 1 if plan.tiny else None]]
        arms[arm] = {
            "parameters": runs[0]["parameters"],
            "sweep": swept,
            "rate": best_of(swept),
            "seeds": [run["seed"] for run in runs],
            "held_out": [run["held_out"] for run in runs],
            "mean": round(mean(run["held_out"] for run in runs), 4),
            "trained_on": [run["trained_on"] for run in runs],
            "learned": [run["learned"] for run in runs],
        }
        print(f"{arm}: {time.perf_counter() - start:.0f} s", flush=True)
    for name, other in (("less_plain", "plain"), ("less_scaled", "scaled")):
        for arm, found in arms.items():
            if arm != other and len(found["held_out"]) > 1:
                found[name] = difference(found["held_out"], arms[other]["held_out"])
    return {"arms": arms}


# --- cost ----------------------------------------------------------------------------------------------------------


def multiply_adds(vocabulary: int) -> dict[str, int]:
    """Of one token, forward: the layers and scores of the model, and what each arm adds to them."""
    e, n = WIDTH, 2
    attention = 4 * e * e + 2 * e * (CONTEXT + 1) // 2  # causal: half of the context on average
    model = LAYERS * (attention + 8 * e * e) + vocabulary * e
    branches, sources = 2 * LAYERS, range(2, 2 * LAYERS + 2)
    return {
        "plain": model,
        "scaled": model + LAYERS * e,
        "denseformer": model + e * LAYERS * (LAYERS + 3) // 2,
        "attention residuals": model + 3 * e * sum(sources),  # mean square, score, sum
        "value residual": model + 2 * e * (LAYERS - 1),
        # norm 2, maps n + 2, all for n streams; read, mix, write
        "hyper-connections": model + branches * e * (n * (2 + n + 2) + n + n * n + n),
    }


def timings(rounds: int = 9) -> dict[str, Any]:
    """Of a training step without the optimiser: milliseconds, and each arm's time over plain in the same round."""
    torch.set_num_threads(1)
    text = read()
    ids = text.held_out[:BATCH]
    torch.manual_seed(0)
    models = {arm: model_of(arm, text.vocabulary) for arm in ARMS}

    def step(arm: str) -> None:
        models[arm].zero_grad()
        models[arm].loss(ids).backward()

    times = alternate({arm: partial(step, arm) for arm in ARMS}, rounds)
    return {
        arm: {"milliseconds": round(1000 * median(times[arm]), 2), "over_plain": ratio(times[arm], times["plain"])}
        for arm in ARMS
    }


def main(options: list[str]) -> None:
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if "--tiny" in options:
        with tempfile.TemporaryDirectory() as beside:
            carry_out_all(Plan(2, Path(beside), tiny=True))
        return
    folder = folder or cache_folder() / "runs" / "depth"
    folder.mkdir(parents=True, exist_ok=True)
    figures = carry_out_all(Plan(STEPS, folder))
    figures["multiply_adds"] = multiply_adds(read().vocabulary)
    figures["timings"] = timings()
    setup = {
        "layers": LAYERS,
        "width": WIDTH,
        "heads": HEADS,
        "context": CONTEXT,
        "batch": BATCH,
        "steps": STEPS,
        "sweep_seed": SWEEP_SEED,
        "training": "AdamW, betas 0.9 and 0.95, decay 0.1 on matrices, gradients clipped at 1; a tenth of the steps "
        "up, then along a cosine down to a tenth of the rate",
    }
    write("depth", "nox -s bench -- depth", figures, setup=setup)
