"""What attention looks up and what it computes: likeness and relevance, counting, steps, and how much data it needs.

The parts are described in benchmarks/retrieval_run.py. For each arm of each task, of each size where there are several,
the rate is chosen by one training each, with a seed that is not used again; of rates that are as good the middle one,
and a grid grows by one rate where the best lies at its edge. Then the other seeds are trained with that rate.

    relevance   3 maps, 4 arms
    counting    the largest of some numbers, and the number of some tokens, at lengths beyond those of training
    steps       4 arms
    data        recall and a local rule, 4 arms and a control without mixing

    nox -s bench -- retrieval
    nox -s bench -- retrieval --tiny    two steps of everything, which writes nothing
"""

import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks.intervals import by_seeds
from benchmarks.record import write
from benchmarks.retrieval_run import MAPS, MIXERS, Run, carry_out
from benchmarks.sweeps import grown
from nondual.store import cache_folder

RATES, SWEEP_SEED, SEEDS = (1e-3, 3e-3, 1e-2), 0, {"data": (1, 2, 3, 4), "else": (1, 2, 3)}
ALIKE = 0.005
"""Rates whose shares differ by no more are as good."""
STEPS = {"relevance": 200, "largest": 400, "count": 400, "steps": 400, "data": 200}
ARMS = {
    **{f"relevance {which}": ("0", "1", "2", "0, network") for which in MAPS},
    "largest": ("attention",),
    "count": ("start", "no start"),
    "steps": ("written", "each", "end", "each deep"),
}
SIZES = {"rule": (8, 32, 128), "recall": (128, 512, 2048)}
CONTROL = "no mixing"


class Plan(NamedTuple):
    """Where runs are kept, and whether all is cut short to see that it runs."""

    folder: Path
    tiny: bool = False

    def run(self, task: str, arm: str, rate: float, seed: int) -> Run:
        return Run(task, arm, rate, seed, 2 if self.tiny else STEPS[task.split()[0]], self.folder)


def best_of(found: dict[float, float]) -> float:
    """The middle one of the rates that are as good as the best."""
    good = [rate for rate in sorted(found) if found[rate] >= max(found.values()) - ALIKE]
    return good[len(good) // 2]


def of_arm(plan: Plan, task: str, arm: str) -> dict[str, Any]:
    """The rates that were tried, the best of them, and what each seed came to with it."""
    began = time.perf_counter()
    tried = grown(
        lambda rate: carry_out(plan.run(task, arm, rate, SWEEP_SEED))["right"],
        RATES[: 1 if plan.tiny else None],
        best_of,
        beyond=1,
    )
    seeds = SEEDS["data" if task.startswith("data") else "else"][: 1 if plan.tiny else None]
    runs = [carry_out(plan.run(task, arm, best_of(tried), seed)) for seed in seeds]
    found: dict[str, Any] = {"parameters": runs[0]["parameters"], "sweep": tried, "rate": best_of(tried)}
    for what in ("right", "fresh", "known", "by_length", "by_step"):
        if what in runs[0]:
            found[what] = [run[what] for run in runs]
    print(f"{task}, {arm}: {found['right']}, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def less(one: list[float], other: list[float]) -> dict[str, Any]:
    """The paired difference: its mean and 95 % interval."""
    each = [a - b for a, b in zip(one, other)]
    interval = by_seeds(each)
    return {
        "mean": round(mean(each), 4),
        "interval": None if interval is None else [round(interval[1], 4), round(interval[2], 4)],
    }


def carry_out_all(plan: Plan) -> dict[str, Any]:
    """Every run of the plan, and what came of it."""
    figures: dict[str, Any] = {task: {arm: of_arm(plan, task, arm) for arm in arms} for task, arms in ARMS.items()}
    for which in MAPS:
        of = figures[f"relevance {which}"]
        of["two less one"] = less(of["2"]["right"], of["1"]["right"])
    figures["steps"]["written less each"] = less(
        figures["steps"]["written"]["right"], figures["steps"]["each"]["right"]
    )
    for task, sizes in SIZES.items():
        figures[task] = {}
        for n in sizes[:1] if plan.tiny else sizes:
            arms = [arm for arm in MIXERS if arm != CONTROL or n == sizes[-1]]
            of = figures[task][str(n)] = {arm: of_arm(plan, f"data {task} {n}", arm) for arm in arms}
            for arm in arms[1:]:
                of[arm]["attention less this"] = less(of["attention"]["fresh"], of[arm]["fresh"])
    return figures


def main(options: list[str]) -> None:
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if "--tiny" in options:
        with tempfile.TemporaryDirectory() as beside:
            carry_out_all(Plan(Path(beside), tiny=True))
        return
    figures = carry_out_all(Plan(folder or cache_folder() / "runs" / "retrieval"))
    setup = {
        "sweep_seed": SWEEP_SEED,
        "seeds": SEEDS,
        "steps": STEPS,
        "training": "AdamW, betas 0.9 and 0.95, decay 0.1 on matrices, gradients clipped at 1, batches of 32; a tenth "
        "of the steps up, then along a cosine down to a tenth of the rate",
    }
    write("retrieval", "nox -s bench -- retrieval", figures, setup=setup)
