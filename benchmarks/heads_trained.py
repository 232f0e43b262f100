"""Heads in small models trained here: when a role is found and by which head, and what many heads do that one cannot.

Two tasks, which benchmarks/heads_trained_run.py describes.

Repeats. Four models, of width 64 with four heads in a layer:

    two layers                     attention alone
    two layers, feed-forward       each with a feed-forward network (more parameters)
    first layer sees itself only   the first arm, but for one mask: its first layer moves nothing between positions
    one layer                      with heads twice as wide, so that it has the parameters of the first arm, to 1 %

Look-ups. One layer of width 48 with 1, 2, 4 or 12 heads, which have the same parameters and start from the same
numbers, asked one relation, two or four. Beside them 24 heads for one relation, where a head has 2 dimensions; and 1
and 2 heads without the feed-forward network for two relations.

The first arm of repeats is reported at a second rate too, and the moments at which its role forms are of both. So are
the arms of four relations; of the two rates each arm is compared at the one with the higher mean over its eight seeds.

Each arm is trained to the end at every rate of its task's grid with one seed. At the best of them it is trained with
other seeds, which had no part in the choice. A seed fixes the batches, and for look-ups the relations and the first
weights, so that two arms are paired by it.

    nox -s bench -- heads_trained        some twelve minutes of one core
    nox -s bench -- heads_trained --tiny a few steps of a few, which writes nothing to docs/measured

A run is kept as it ends, in `runs/heads_trained` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import multiprocessing
import os
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.heads_trained_run import (
    ARMS,
    CARDS,
    DECAY,
    HEADS,
    LENGTH,
    NARROW,
    PERIODS,
    PERSONS,
    VOCABULARY,
    WIDTH,
    Run,
    carry_out,
)
from benchmarks.intervals import by_seeds
from benchmarks.record import write
from nondual.store import cache_folder

STEPS = {"repeats": 500, "look-ups": 400}
RATES = {"repeats": (2e-3, 4e-3, 8e-3), "look-ups": (2e-3, 4e-3, 8e-3, 1.6e-2)}
SWEEP_SEED = 0
SEEDS = {
    "two layers": tuple(range(1, 7)),
    "repeats": tuple(range(1, 4)),
    "2/2": tuple(range(1, 33)),  # the more, to count which head takes which relation; differences are of the first 8
    "look-ups": tuple(range(1, 9)),
}
# A second rate at which some arms are reported, because the one seed of the sweep says too little: the role of the
# first arm is not found with every seed, and of four relations the best rate is the highest, where runs differ most.
LOWER = {"repeats": 4e-3, "look-ups": 8e-3}
COUNTS, RELATIONS = (1, 2, 4, 12), (1, 2, 4)
LOOKUPS = (
    *(f"{heads}/{relations}" for relations in RELATIONS for heads in COUNTS),
    "24/1",
    "1/2/linear",
    "2/2/linear",
)


class Arm(NamedTuple):
    """A model and a task: the runs that choose its rate, and those that are reported."""

    task: str
    model: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    folder: Path

    @property
    def name(self) -> str:
        """The model, and its rate where it had no choice."""
        return self.model if len(self.rates) > 1 else f"{self.model}, rate {min(self.rates)}"

    def sweep(self) -> list[Run]:
        return [self._run(rate, SWEEP_SEED) for rate in self.rates]

    def runs(self) -> list[Run]:
        """At the best rate; the sweep must have ended."""
        rate = best_rate(self.sweep())
        return [self._run(rate, seed) for seed in self.seeds]

    def _run(self, rate: float, seed: int) -> Run:
        return Run(self.task, self.model, rate, seed, self.steps, self.folder)


def seeds_of(task: str, name: str) -> tuple[int, ...]:
    """Those of the arm itself where it has its own, else those of its task."""
    return SEEDS.get(name, SEEDS[task])


def carry_out_arm(arm: Arm) -> None:
    """First the sweep, then the runs at its best rate."""
    for run in arm.sweep():
        carry_out(run)
    for run in arm.runs():
        carry_out(run)


def carry_out_all(arms: list[Arm]) -> None:
    """On all cores, each arm on one of them."""
    print(f"{len(arms)} arms, in {arms[0].folder}", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(min(cores, len(arms)), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(carry_out_arm, arms))


def judged_by(result: dict[str, Any]) -> float:
    """The loss by which rates are chosen: of the answers that can be known."""
    return result["repeats"] if "repeats" in result else result["loss"]


def best_rate(sweep: list[Run]) -> float:
    """The rate whose run ended with the lowest loss."""
    return min(sweep, key=lambda run: judged_by(run.result() or {})).rate


def difference(a: list[float], b: list[float]) -> dict[str, Any]:
    """a less b, paired: each seed's difference, and the 95 % interval of their mean by Student's t."""
    each = [x - y for x, y in zip(a, b, strict=True)]
    found = by_seeds(each)
    interval = None if found is None else [round(x, 4) for x in found[1:]]
    return {"mean": round(mean(each), 4), "interval": interval, "each": [round(x, 4) for x in each]}


def summed_up(arm: Arm) -> dict[str, Any]:
    """An arm's loss at each rate of the sweep, and its runs at the best of them."""
    results = [run.result() or {} for run in arm.runs()]
    rate = best_rate(arm.sweep())
    return {
        "parameters": results[0]["parameters"],
        "sweep": {str(run.rate): judged_by(run.result() or {}) for run in arm.sweep()},
        "rate": rate,
        "best_is_at_the_edge_of_the_grid": rate in (min(arm.rates), max(arm.rates)),
        "runs": [{k: x for k, x in slim(result).items() if k not in ("parameters", "rate")} for result in results],
    }


def slim(result: dict[str, Any]) -> dict[str, Any]:
    """The curves of two scores for one head each: the one of its layer that ends highest."""
    if "curve" not in result:
        return result
    curve = dict(result["curve"])
    for score, layer in (("induction", -1), ("previous", 0)):
        if isinstance(curve[score][0], list):
            heads = list(zip(*(row[layer] for row in curve[score])))
            curve[score] = list(max(heads, key=lambda head: head[-1]))
    return result | {"curve": curve}


def formed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs in which an induction head has formed: one whose score is above a half."""
    return [run for run in runs if max(max(layer) for layer in run["after"]["induction"]) > 0.5]


def moments(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """When the loss has fallen half way and when the scores have risen half way, seed by seed."""
    runs = formed(runs)
    if not runs:
        return {"seeds": []}
    half = {name: [run[f"half_{name}"] for run in runs] for name in ("loss", "induction", "previous")}
    return {
        "seeds": [run["seed"] for run in runs],
        **half,
        "induction_less_loss": difference(half["induction"], half["loss"]),
        "previous_less_loss": difference(half["previous"], half["loss"]),
    }


def strongest(runs: list[dict[str, Any]], score: str, layer: int) -> list[int]:
    """The head of a layer with the highest score after training, seed by seed."""
    return [max(range(HEADS), key=run["after"][score][layer].__getitem__) for run in runs]


def composition(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """K-composition of the previous-token head with the induction head, less the mean of all other pairs."""
    runs, pairs, others = formed(runs), [], []
    if not runs:
        return {"seeds": []}
    for run, i, j in zip(runs, strongest(runs, "previous", 0), strongest(runs, "induction", 1)):
        scores = {(a, b): run["composition"][a][b]["k"] for a in range(HEADS) for b in range(HEADS)}
        pairs.append(scores.pop((i, j)))
        others.append(round(mean(scores.values()), 4))
    return {"pair": pairs, "others": others, "less": difference(pairs, others)}


def takers(runs: list[dict[str, Any]]) -> list[list[int]]:
    """For each seed the head that puts most weight on each relation's person."""
    return [
        [max(range(len(run["after"])), key=lambda head: run["after"][head][r]) for r in range(len(run["after"][0]))]
        for run in runs
    ]


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "heads_trained"
    folder.mkdir(parents=True, exist_ok=True)
    names = [("repeats", name) for name in ARMS] + [("look-ups", name) for name in LOOKUPS]
    names.append(names.pop(names.index(("repeats", ARMS[1]))))  # the longest runs last
    if tiny:
        names = [("repeats", ARMS[0]), ("look-ups", "2/2")]
    arms = [
        Arm(task, name, RATES[task], seeds_of(task, name)[: 2 if tiny else None], 20 if tiny else STEPS[task], folder)
        for task, name in names
    ]
    if not tiny:
        again = [arm for arm in arms if arm.name == ARMS[0] or arm.name.endswith("/4")]
        arms += [arm._replace(rates=(LOWER[arm.task],)) for arm in again]
    carry_out_all(arms)
    if not tiny:
        record({task: {arm.name: summed_up(arm) for arm in arms if arm.task == task} for task in STEPS})


def record(arms_of: dict[str, dict[str, Any]]) -> None:
    """Write what was found to docs/measured."""
    repeats, lookups = arms_of["repeats"], arms_of["look-ups"]
    two = repeats[f"two layers, rate {LOWER['repeats']}"]["runs"]
    deep = {arm: found["runs"] for arm, found in repeats.items() if arm.startswith("two layers")}
    each = {arm: [run["accuracy"] for run in found["runs"][:8]] for arm, found in lookups.items()}
    best = {}
    for arm in LOOKUPS:
        other = f"{arm}, rate {LOWER['look-ups']}"
        best[arm] = max((name for name in (arm, other) if name in each), key=lambda name: mean(each[name]))
    accuracy = {arm: each[name] for arm, name in best.items()}
    figures = {
        "repeats": {
            "arms": repeats,
            "moments": {arm: moments(runs) for arm, runs in deep.items()},
            "less_two_layers": {
                arm: difference(
                    [run["repeats"] for run in repeats[arm]["runs"]],
                    [run["repeats"] for run in two[: len(repeats[arm]["runs"])]],
                )
                for arm in ARMS[1:]
            },
            "composition": {arm: composition(runs) for arm, runs in deep.items()},
            "strongest": {
                arm: {
                    "seeds": [run["seed"] for run in formed(runs)],
                    "previous": strongest(formed(runs), "previous", 0),
                    "induction": strongest(formed(runs), "induction", 1),
                }
                for arm, runs in deep.items()
            },
        },
        "look-ups": {
            "arms": lookups,
            "rate": {arm: lookups[name]["rate"] for arm, name in best.items()},
            "each": accuracy,
            "accuracy": {arm: round(mean(found), 4) for arm, found in accuracy.items()},
            "less_one_head": {
                f"{heads}/{relations}": difference(accuracy[f"{heads}/{relations}"], accuracy[f"1/{relations}"])
                for relations in RELATIONS
                for heads in COUNTS[1:]
            }
            | {"2/2/linear": difference(accuracy["2/2/linear"], accuracy["1/2/linear"])},
            "less_two_heads": {f"{heads}/1": difference(accuracy[f"{heads}/1"], accuracy["2/1"]) for heads in (12, 24)},
            "less_four_heads": {"12/4": difference(accuracy["12/4"], accuracy["4/4"])},
            "takers": takers(lookups["2/2"]["runs"]),
            "taken": dict(Counter("first by {}, second by {}".format(*x) for x in takers(lookups["2/2"]["runs"]))),
        },
    }
    setup = {
        "repeats": {"vocabulary": VOCABULARY, "length": LENGTH, "periods": PERIODS, "width": WIDTH, "heads": HEADS},
        "look-ups": {"persons": PERSONS, "cards": CARDS, "width": NARROW},
        "steps": STEPS,
        "batch": {"repeats": 32, "look-ups": 8},
        "rates": RATES,
        "sweep_seed": SWEEP_SEED,
        "seeds": SEEDS,
        "training": f"AdamW, betas 0.9 and 0.95, decay {DECAY} on matrices, gradients clipped at 1; a tenth of the "
        "steps up, then along a cosine down to a tenth of the rate",
    }
    write("heads_trained", "nox -s bench -- heads_trained", figures, setup=setup)
