"""Spelling with and without attention: a fixed vector, equal weights, additive attention, and self-attention.

The tasks and the five models are described in benchmarks/spelling_run.py. All models of a task have as many parameters,
to 2 %, and are trained on the same words in the same order for the same number of updates.

Each model's rate is chosen on its own: it is trained to the end with one seed at each rate of a grid, and again at the
next rate beyond the grid where the best is at its edge. At the best rate it is trained with other seeds, which had no
part in the choice. A seed fixes the first weights and the order of the words, so that two models are paired by it.

To see whether the order of the models is that of a short training only, three of them are trained once more, for
LONGER times as many updates, with one seed and the rates that were best for the shorter training.

    nox -s bench -- spelling        some 50 minutes of one core
    nox -s bench -- spelling --tiny a few updates of a few models, which writes nothing to docs/measured

A run is kept as it ends, in `runs/spelling` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import intervals
from benchmarks.record import alternate, ratio, write
from benchmarks.spelling_run import (
    ARMS,
    COMPARED,
    D_FF,
    D_FF_STREAM,
    D_MODEL,
    DECAY,
    DECODER,
    EMBEDDED,
    ENCODER,
    LAYERS,
    LAYERS_STREAM,
    N_HEADS,
    START,
    TASKS,
    TESTED_TO,
    TRAINED_TO,
    WIDER,
    Batch,
    Model,
    Run,
    carry_out,
    loss_of,
    model_of,
    multiply_adds,
    spelling,
)
from nondual.analysis import longest_chain
from nondual.store import cache_folder

STEPS = {"spelling": 1000, "reversal": 500, "gita": 200}
RATES = {"spelling": (2e-3, 4e-3, 8e-3), "reversal": (4e-3, 8e-3, 1.6e-2), "gita": (4e-3, 8e-3, 1.6e-2)}
SWEEP_SEED, BEYOND = 0, 2
SEEDS = tuple(range(1, 9))
LONGER, LONGER_SEED = {"spelling": 3, "reversal": 4, "gita": 5}, 1
LONGER_MODELS = ("fixed", "additive", "transformer")
MODELS = {"spelling": ARMS, "reversal": ARMS[:4], "gita": ARMS[:4]}
LENGTHS = {
    "spelling": ((3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 16)),
    "gita": ((1, 4), (5, 8), (9, 12), (13, 16), (17, 24)),
    "reversal": ((1, 4), (5, 8), (9, 12), (13, 16), (17, 20), (21, 24)),
}
"""From the shortest to the longest sources of a group, by which accuracy is given."""
PAIRS = (
    ("uniform", "fixed"),
    ("additive", "fixed"),
    ("additive", "uniform"),
    ("transformer", "additive"),
    ("one stream", "additive"),
    ("one stream", "transformer"),
)
COSTS = (4, 8, 16)  # letters of the words whose cost is counted and timed
T_95 = {2: 12.706} | intervals.T_95  # for two seeds as well


class Arm(NamedTuple):
    """A model and a task: the runs that choose its rate, and those that are reported."""

    task: str
    model: str
    steps: int
    seeds: tuple[int, ...]
    folder: Path
    rates: tuple[float, ...]

    def run(self, rate: float, seed: int) -> Run:
        return Run(self.task, self.model, rate, seed, self.steps, self.folder)

    def sweep(self) -> list[Run]:
        """The runs that choose the rate, carried out: the grid, and up to BEYOND more where the best is at its edge."""
        runs = [self.run(rate, SWEEP_SEED) for rate in self.rates]
        for run in runs:
            carry_out(run)
        for _ in range(BEYOND if len(self.rates) > 1 else 0):
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


def interval(values: list[float]) -> dict[str, Any]:
    """The mean over seeds, its 95 % interval by Student's t, and each seed's value."""
    half = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    middle = mean(values)
    return {
        "mean": round(middle, 4),
        "interval": [round(middle - half, 4), round(middle + half, 4)],
        "each": [round(value, 4) for value in values],
    }


def accuracy(result: dict[str, Any], shortest: int = 0, longest: int = 1000) -> float:
    """The share of the words that were written without a mistake, of those with so many signs."""
    counts = [found for length, found in result["by_length"].items() if shortest <= int(length) <= longest]
    return sum(good for good, _ in counts) / sum(words for _, words in counts)


def scores(task: str, results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each seed's accuracy, on all words and on those of each group of lengths."""
    found = {"all": [accuracy(result) for result in results]}
    return found | {f"{a}-{b}": [accuracy(result, a, b) for result in results] for a, b in LENGTHS[task]}


def summed_up(arm: Arm) -> dict[str, Any]:
    """A model's sweep, its runs at the best rate, and its accuracy by length."""
    sweep, runs = [run.result() or {} for run in arm.sweep()], [run.result() or {} for run in arm.runs()]
    return {
        "parameters": runs[0]["parameters"],
        "sweep": {str(x["rate"]): {"loss": x["tune_loss"], "accuracy": x["tune_accuracy"]} for x in sweep},
        "rate": runs[0]["rate"],
        "accuracy": {group: interval(values) for group, values in scores(arm.task, runs).items()},
        "runs": [
            {k: x[k] for k in ("seed", "tune_loss", "tune_accuracy", "by_length", "curve", "seconds", "commit")}
            for x in runs
        ],
    }


def longer_of(arm: Arm) -> dict[str, Any]:
    """The run of more updates, carried out: its loss, and its accuracy by length."""
    run = arm._replace(steps=LONGER[arm.task] * arm.steps).run(best_rate(arm.sweep()), LONGER_SEED)
    carry_out(run)
    result = run.result() or {}
    accuracies = {group: round(value, 4) for group, (value,) in scores(arm.task, [result]).items()}
    return {"updates": run.steps, "seed": run.seed, "rate": run.rate, "loss": result["tune_loss"], **accuracies}


def compared(task: str, arms: dict[str, Arm]) -> dict[str, Any]:
    """The differences of accuracy between models, paired by their seeds, on all words and by length."""
    each = {name: scores(task, [run.result() or {} for run in arm.runs()]) for name, arm in arms.items()}
    return {
        f"{a} less {b}": {group: interval([x - y for x, y in zip(each[a][group], each[b][group])]) for group in each[a]}
        for a, b in PAIRS
        if a in each and b in each
    }


# --- what a word costs ---------------------------------------------------------------------------------------------


def word_of(length: int, batch: int = 1) -> Batch:
    """Random letters of one length, and as many phonemes."""
    drawn = torch.Generator().manual_seed(0)
    source, target = torch.randint(3, 29, (2, batch, length), generator=drawn)
    return Batch(source, torch.full((batch,), length), torch.cat([torch.full((batch, 1), START), target], 1))


def chain(model: Model, batch: Batch) -> int:
    """How many products of matrices wait for one another when all scores of a word are computed, targets known."""
    return longest_chain(model(batch.source, batch.lengths, batch.target))


def update(model: Model, batch: Batch) -> Tensor:
    """The loss and its gradients."""
    loss = loss_of(model, batch)
    loss.backward()
    return loss


def costs(rounds: int) -> dict[str, Any]:
    """Multiply-adds, waiting products and time by length, of untrained models: of what they write, only its length."""
    models = {arm: model_of(arm, spelling()) for arm in ARMS}
    found: dict[str, Any] = {"multiply_adds": {}, "chain": {}, "writing": {}, "training": {}}
    for length in COSTS:
        one, many = word_of(length), word_of(length, 64)
        found["multiply_adds"][length] = {
            arm: multiply_adds(arm, length, length, len(spelling().targets) + 3) for arm in ARMS
        }
        found["chain"][length] = {arm: chain(model, one) for arm, model in models.items()}
        writes: dict[str, Callable[[], object]] = {
            arm: partial(model.spell, *one[:2], length, end=None) for arm, model in models.items()
        }
        trains: dict[str, Callable[[], object]] = {arm: partial(update, model, many) for arm, model in models.items()}
        for name, runs in (("writing", writes), ("training", trains)):
            times = alternate(runs, rounds)
            found[name][length] = {arm: ratio(times[arm], times["fixed"]) for arm in ARMS[1:]}
            found[name][length]["fixed_milliseconds"] = round(1e3 * sorted(times["fixed"])[rounds // 2], 2)
    return found


# --- all of it -----------------------------------------------------------------------------------------------------


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    only = next((x.removeprefix("--only=").split(",") for x in options if x.startswith("--only=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "spelling"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tasks = {
        task: {
            model: Arm(task, model, steps, SEEDS, folder, RATES[task])
            for model in MODELS[task]
            if only is None or f"{task}/{model}" in only
        }
        for task, steps in STEPS.items()
    }
    if tiny:
        tasks = {"gita": {model: Arm("gita", model, 2, (1, 2), folder, (4e-3,)) for model in ("fixed", "additive")}}
    for arms in tasks.values():
        for arm in arms.values():
            arm.runs()
    found = {task: found_of(task, arms) for task, arms in tasks.items()} if only is None else {}
    if found and not tiny:
        for task, arms in tasks.items():
            found[task]["longer"] = {model: longer_of(arms[model]) for model in LONGER_MODELS}
        record(found)


def found_of(task: str, arms: dict[str, Arm]) -> dict[str, Any]:
    """All models of a task, and what lies between them."""
    return {"arms": {model: summed_up(arm) for model, arm in arms.items()}, "differences": compared(task, arms)}


def record(figures: dict[str, Any]) -> None:
    """Write what was found to docs/measured."""
    setup = {
        "words": {
            task: {"train": len(x.train), "choose rates on": len(x.tune), "test": len(x.test)}
            for task, x in ((task, make()) for task, make in TASKS.items())
        },
        "reversal": {"trained to": TRAINED_TO, "tested to": TESTED_TO, "letters": 26},
        "widths": {
            "embedding": EMBEDDED, "encoder, each direction": ENCODER, "decoder": DECODER, "comparison": COMPARED,
            "decoder of fixed and uniform": WIDER, "transformer": D_MODEL, "its heads": N_HEADS,
            "its feed-forward": D_FF, "its layers, each side": LAYERS,
            "feed-forward of one stream": D_FF_STREAM, "layers of one stream": LAYERS_STREAM,
        },
        "batch": {task: make().batch for task, make in TASKS.items()},
        "updates": STEPS,
        "rates": RATES,
        "sweep_seed": SWEEP_SEED,
        "seeds": SEEDS,
        "training": f"AdamW, betas 0.9 and 0.95, decay {DECAY} on matrices, gradients clipped at 1; a tenth of the "
        "updates up, then along a cosine down to a tenth of the rate",
    }  # fmt: skip
    write("spelling", "nox -s bench -- spelling", figures | {"cost": costs(15)}, setup=setup)
