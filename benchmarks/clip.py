"""A small CLIP of emoji and their names: does it find pictures and names of concepts that it never met?

benchmarks/clip_data.py says which pictures there are and what is held out, benchmarks/clip_run.py what the model is and
how it is trained, benchmarks/clip_judge.py what is asked of it. The trainings:

    losses      softmax and sigmoid, each at three rates with one seed, and at the best with three seeds that had no
                part in the choice. A seed fixes the first weights, the batches and the
                patches that are kept, of both
    one style   as softmax, of the pictures of one style alone
    shuffled    as softmax, each concept with the captions of another
    scales      as softmax, exp(τ) fixed at 5 and at 50, one seed
    longest     softmax for LONGER times as many steps: the model of the page, stored beside nondual.pretrained; and the
                same with one style alone
    clip art    the same model, of pictures from openclipart with their titles

    nox -s bench -- clip            some 40 minutes of one core
    nox -s bench -- clip --tiny     a few updates, which writes nothing to docs/measured

A run is kept as it ends, in `runs/clip` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.clip_judge import differences, gap, gap_untrained, near_names, parts_of, recalls, zero_shot
from benchmarks.clip_run import BATCH, KEPT, Run, carry_out, pairs_of
from benchmarks.clip_ship import MODEL, ship
from benchmarks.record import write
from nondual.store import cache_folder

STEPS, LONGER, CLIPART = 400, 25, 5
"""The steps of the compared trainings, and how many times as many the two others have."""
RATES = (1e-3, 2e-3, 4e-3)
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
LOSSES = ("softmax", "sigmoid")
SCALES = (5, 50)
UNSEEN = "seen style, unseen concept"


class Trainings:
    """All runs, and the order in which they are made.

    Args:
        folder: where they are kept.
        steps: of each compared training.
        rates, seeds: of the compared trainings.
    """

    def __init__(
        self, folder: Path, steps: int = STEPS, rates: tuple[float, ...] = RATES, seeds: tuple[int, ...] = SEEDS
    ):
        self.folder, self.steps, self.rates, self.seeds = folder, steps, rates, seeds

    def run(self, loss: str, arm: str, rate: float, seed: int, longer: int = 1, data: str = "emoji") -> Run:
        """One of them, carried out."""
        run = Run(data, loss, arm, rate, seed, longer * self.steps, self.folder)
        carry_out(run)
        return run

    def sweep(self, loss: str) -> list[Run]:
        """The runs that choose the rate of a loss; one more where the best is at the edge."""
        runs = [self.run(loss, "all", rate, SWEEP_SEED) for rate in self.rates]
        best = max(runs, key=tuned).rate
        if len(runs) > 1 and best in (runs[0].rate, runs[-1].rate):
            runs.append(self.run(loss, "all", best / 2 if best == runs[0].rate else 2 * best, SWEEP_SEED))
        return runs

    def best(self, loss: str) -> float:
        """The rate at which a loss found most of the concepts to choose on."""
        return max(self.sweep(loss), key=tuned).rate

    def runs(self, loss: str, arm: str) -> list[Run]:
        """The runs of an arm at the best rate of its loss, a seed each."""
        return [self.run(loss, arm, self.best(loss), seed) for seed in self.seeds]

    def scaled(self, scale: int) -> Run:
        """A run with a scale that is not learnt."""
        return self.run("softmax", f"scale {scale}", self.best("softmax"), self.seeds[0])

    def longest(self, arm: str = "all") -> Run:
        """The model of the page; or what one style alone makes of as many steps."""
        return self.run("softmax", arm, self.best("softmax"), self.seeds[0], LONGER)

    def clip_art(self) -> Run:
        """The model of openclipart's pictures."""
        return self.run("softmax", "all", self.best("softmax"), self.seeds[0], CLIPART, "clipart")


def tuned(run: Run) -> float:
    """How well a run did on the concepts to choose on."""
    return run.result()["tune"]


def losses_of(trainings: Trainings) -> dict[str, Any]:
    """The sweep of each loss, what it finds at its best rate, and the difference between the two."""
    found: dict[str, Any] = {}
    results = {loss: [run.result() for run in trainings.runs(loss, "all")] for loss in LOSSES}
    for loss in LOSSES:
        found[loss] = {
            "sweep": {str(run.rate): tuned(run) for run in trainings.sweep(loss)},
            "rate": trainings.best(loss),
            "recall": recalls(results[loss]),
            "scale": [result["curve"]["scale"][-1] for result in results[loss]],
            "seconds a step": [result["seconds a step"] for result in results[loss]],
        }
    found["softmax less sigmoid"] = differences(results["softmax"], results["sigmoid"], UNSEEN)
    return found


def controls_of(trainings: Trainings) -> dict[str, Any]:
    """What is found with one style alone, and with shuffled captions, less what is found with all."""
    usual = [run.result() for run in trainings.runs("softmax", "all")]
    found: dict[str, Any] = {}
    for arm in ("one style", "shuffled"):
        results = [run.result() for run in trainings.runs("softmax", arm)]
        found[arm] = {
            "recall": recalls(results),
            "all less this": {
                part: differences(usual, results, part) for part in (UNSEEN, "unseen style, unseen concept")
            },
        }
    usual, one = trainings.longest().result(), trainings.longest("one style").result()
    found["one style, longest"] = {
        "recall": recalls([one]),
        "all less this": {part: differences([usual], [one], part) for part in parts_of(usual)},
    }
    return found


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    trainings = Trainings(folder, 2, RATES[:1], SEEDS[:2]) if tiny else Trainings(folder)
    longest, pairs = trainings.longest(), pairs_of("emoji")
    losses, controls, clip_art = losses_of(trainings), controls_of(trainings), trainings.clip_art()
    model, result = longest.model(), longest.result()
    if not MODEL.exists() and not tiny:
        ship(model, pairs)
    shuffled = trainings.runs("softmax", "shuffled")[0].model()
    figures = {
        "longest": {
            "parameters": result["parameters"],
            "rate": longest.rate,
            "steps": longest.steps,
            "seconds a step": result["seconds a step"],
            "curve": result["curve"],
            "recall": recalls([result]),
            "near names": near_names(result, pairs),
        },
        "losses": losses,
        "controls": controls,
        "zero shot": {"longest": zero_shot(model, pairs), "shuffled": zero_shot(shuffled, pairs)},
        "gap": {
            "untrained": gap_untrained(pairs, "softmax", (0, *SEEDS)),
            **{loss: [gap(run.model(), pairs) for run in trainings.runs(loss, "all")] for loss in LOSSES},
            "scales": {str(scale): gap(trainings.scaled(scale).model(), pairs) for scale in SCALES},
            "longest": gap(model, pairs),
        },
        "clip art": {"steps": clip_art.steps, "recall": recalls([clip_art.result()])},
    }
    if not tiny:
        record(figures, trainings)


def record(figures: dict[str, Any], trainings: Trainings) -> None:
    """Write what was found to docs/measured."""
    pairs, art = pairs_of("emoji"), pairs_of("clipart")
    setup = {
        name: {
            "pictures": len(each.pictures),
            "concepts": len(each.names),
            "styles": list(each.styles),
            "train": len(each.train),
            "tune": len(each.tune),
            "test": len(each.test),
        }
        for name, each in (("emoji", pairs), ("clip art", art))
    }
    write(
        "clip", "nox -s bench -- clip", figures, threads=1, data=setup, batch=BATCH, kept_patches=KEPT,
        steps=trainings.steps, chance={"1": round(1 / len(pairs.test), 4), "5": round(5 / len(pairs.test), 4)},
        seeds={"rate": SWEEP_SEED, "compared": list(SEEDS)}, bytes=MODEL.stat().st_size,
    )  # fmt: skip
