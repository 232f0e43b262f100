"""Learning from examples in the context, beside what can be computed: least squares, Bayes' rule, gradient descent.

functions   A small transformer reads examples of a linear function, x and y with noise, and says each next y. It is
            trained on endless tasks (a task is a vector of weights), or on 16 of them; and tested on new tasks, on the
            stored ones, and on families of functions and inputs that it was not trained on, after 0 to 31 examples,
            twice as many as in training. Beside it on the same prompts: least squares, ridge (the exact
            posterior mean for endless tasks), stored tasks (that for a finite set), and k steps of gradient descent,
            at the rate that is best for this number of steps and examples.
map         Where a model lies between three corners: stored tasks, ridge, and one step of gradient descent; with one
            layer of linear attention, trained on endless tasks with all its matrices free.
layer       That layer in 16 dimensions, trained on 4, 16 or 64 tasks, beside the exact errors of the best such layer.
coins       A small GPT reads flips of coins whose bias is drawn from Beta(1, 1), or from Beta(4, 4), beside the exact
            probability of a head; after 0 to 256 flips, eight times as many as in training.

Each arm is trained to the end at every rate of a grid with one seed, and at rates beyond it where the best is at the
edge. The best is the one with the lowest error on new prompts like those of its own training. At that rate it is
trained with other seeds, which had no part in the choice. The layer's rate is chosen with 16 tasks for all of its
arms, and that of the coins with Beta(1, 1) for both. A seed fixes the table of tasks, the first weights and the
batches.

    nox -s bench -- in_context           some twenty minutes of one core
    nox -s bench -- in_context --tiny    a few steps of a few, which writes nothing to docs/measured

A run is kept as it ends, in `runs/in_context` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.in_context_run import (
    BATCH,
    COIN_BATCH,
    COINS,
    DESCENT,
    FAMILIES,
    FIRST,
    FLIPS,
    HEADS,
    LAYER_D,
    LAYER_N,
    LAYER_NOISE,
    LAYERS,
    LENGTH,
    LONGEST,
    LONGEST_FLIPS,
    MAPPED,
    NOISE,
    PENALTY,
    TESTED,
    WIDTH,
    D,
    Run,
    best_rates,
    carry_out,
    predictors,
    rounded,
    tested,
)
from benchmarks.intervals import by_seeds
from benchmarks.record import write
from benchmarks.sweeps import grown, lowest
from nondual.language_models.in_context_learning import limit_errors
from nondual.store import cache_folder

SWEEP_SEED, SEEDS = 0, (1, 2, 3)
TASKS = (0, 16)
"""How many tasks a transformer is trained on, 0 for endless ones."""
LAYER_TASKS = (4, 16, 64)
RATES = {"functions": (2e-3, 4e-3, 8e-3), "layer": (3e-3, 1e-2, 3e-2), "coins": (2e-3, 4e-3, 8e-3)}
STEPS = {"functions": 2500, "layer": 1000, "coins": 1000}


def swept(task: str, folder: Path, tiny: bool) -> tuple[dict[float, float], float]:
    """The error of the sweep's seed by rate, and the best rate; at an edge, two beyond it are tried at most."""
    kind = task.split()[0]
    steps, rates = (4, RATES[kind][:1]) if tiny else (STEPS[kind], RATES[kind])
    found = grown(lambda rate: carry_out(Run(task, rate, SWEEP_SEED, steps, folder))["loss"], rates, beyond=2)
    return found, lowest(found)


def arm(task: str, folder: Path, tiny: bool, rate: float | None = None) -> dict[str, Any]:
    """An arm's sweep, unless its rate is given, and its runs with other seeds."""
    sweep, best = swept(task, folder, tiny) if rate is None else ({}, rate)
    steps = 4 if tiny else STEPS[task.split()[0]]
    runs = [carry_out(Run(task, best, seed, steps, folder)) for seed in (SEEDS[:1] if tiny else SEEDS)]
    print(task, sweep, best, [run["loss"] for run in runs], flush=True)
    told = {"rate": best, "sweep": {str(rate): loss for rate, loss in sweep.items()}, "steps": steps, "runs": runs}
    return told | ({"edge": best in (min(sweep), max(sweep))} if sweep else {})


def interval(values: list[float]) -> dict[str, float]:
    """The mean over the seeds, and its 95 % interval by Student's t where there are three or more."""
    told = {"mean": round(mean(values), 5)}
    if found := by_seeds(values):
        told |= {"low": round(found[1], 5), "high": round(found[2], 5)}
    return told


def index(run: dict[str, Any], prompts: str) -> float:
    """(far from ridge - far from stored tasks) / (their sum), over the places of training: 1 where it is stored tasks.

    Distances are mean squares of differences of predictions. -1 where the model says what ridge says.
    """
    told = run["distances"][prompts]
    of_ridge, of_stored = (sum(told[name][:LENGTH]) for name in ("ridge", "stored tasks"))
    return (of_ridge - of_stored) / (of_ridge + of_stored)


def over_places(errors: list[float], first: int, last: int) -> float:
    """The mean from after `first` to after `last` examples."""
    return mean(errors[first : last + 1])


def judged(arms: dict[str, Any]) -> dict[str, Any]:
    """What is read off the arms of functions: means over seeds with intervals."""
    found: dict[str, Any] = {}
    for name, told in arms.items():
        runs = told["runs"]
        found[name] = {
            "index": {
                kind: interval([index(run, kind) for run in runs])
                for kind in ("new", "stored")
                if all("stored tasks" in run["distances"].get(kind, {}) for run in runs)
            },
            "error on new tasks": {
                str(n): interval([run["errors"]["as trained"][n] for run in runs]) for n in (0, 1, 2, 5, 10, LENGTH - 1)
            },
            "distance from": {
                other: interval([mean(run["distances"]["new"][other][1:LENGTH]) for run in runs])
                for other in runs[0]["distances"]["new"]
            },
            "families": {
                family: interval([over_places(run["errors"][family], D, LENGTH - 1) for run in runs])
                for family in runs[0]["errors"]
            },
        }
    return found


def by_rule() -> dict[str, Any]:
    """The errors of the predictors, by family and number of examples, on the prompts that models are tested on."""
    found: dict[str, Any] = {}
    for name, given in FAMILIES.items():
        prompts = tested(**given)
        size = prompts.target.square().mean().item()
        said = predictors(prompts, None)
        found[name] = {
            "mean square of the answers": round(size, 4),
            **{who: rounded((x - prompts.target).square().mean(0)) for who, x in said.items()},
        }
    return found


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "in_context"
    torch.set_num_threads(1)
    functions = {str(count): arm(f"functions {count}", folder, tiny) for count in (TASKS[1:] if tiny else TASKS)}
    layers = {"16": arm("layer 16", folder, tiny)}
    for count in () if tiny else LAYER_TASKS:
        if count != 16:
            layers[str(count)] = arm(f"layer {count}", folder, tiny, layers["16"]["rate"])
    one = arm("layer 0", folder, tiny, layers["16"]["rate"])
    coined = {"1": arm("coins 1", folder, tiny)}
    if not tiny:
        coined["4"] = arm("coins 4", folder, tiny, coined["1"]["rate"])
    figures: dict[str, Any] = {
        "functions": {"arms": functions, "judged": judged(functions), "by rule": by_rule()},
        "one layer": one,
        "layers": {
            "arms": layers,
            "limit": {
                str(count): limit_errors(count / LAYER_D, LAYER_N / LAYER_D, LAYER_NOISE)._asdict()
                for count in LAYER_TASKS
            },
        },
        "coins": coined,
        "settings": {
            "d": D,
            "noise": NOISE,
            "penalty": PENALTY,
            "length": LENGTH,
            "longest": LONGEST,
            "width": WIDTH,
            "layers": LAYERS,
            "heads": HEADS,
            "batch": BATCH,
            "curriculum": FIRST,
            "tested": TESTED,
            "descent": {str(k): rounded(best_rates(k), 3) for k in DESCENT},
            "mapped": MAPPED,
            "layer": {"d": LAYER_D, "n": LAYER_N, "noise": LAYER_NOISE},
            "flips": FLIPS,
            "longest_flips": LONGEST_FLIPS,
            "coin_batch": COIN_BATCH,
            "coins": COINS,
        },
    }
    if tiny:
        print({name: list(found) for name, found in figures.items()})
        return
    write("in_context", "nox -s bench -- in_context", figures, threads=1)
