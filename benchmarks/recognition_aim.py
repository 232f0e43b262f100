"""The essay's proposal of recognition-based learning, by section 4 of the protocol (docs/measured/protocol.md).

A small transformer reads examples of linear functions, of which M are stored: they come again and again in training.
Arms differ in what is to be named beside the next answer, with what weight, and in how often each task comes; see
`recognition_aim_run`. Each arm's rate is chosen by whole trainings with two seeds of their own, by the error on prompts
like those of its training; then eight paired seeds are trained. Four of the arms are then trained twice as long, with
rates chosen anew and other seeds. Beside them stand, on the same prompts, the two
predictors between which the index is taken, and the exact errors of one layer of linear attention trained on the same
tables of tasks, which has no name to give.

    nox -s bench -- recognition_aim                   some half an hour of one core
    nox -s bench -- recognition_aim --only=task_0.3   the arms with this in their name; writes nothing
    nox -s bench -- recognition_aim --minutes=30      begin no run after half an hour; writes nothing if some are left
    nox -s bench -- recognition_aim --tiny            three arms, a few steps; writes nothing

A run is kept as it ends, in `runs/recognition_aim` of the cache folder: call again, and it goes on.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from benchmarks.proposals import holm, said
from benchmarks.recognition_aim_run import (
    BATCH,
    HEADS,
    LAYERS,
    LENGTH,
    NOISE,
    STEPS,
    TESTED,
    WIDTH,
    Arm,
    D,
    M,
    Run,
    carry_out,
    corners,
    table,
)
from benchmarks.record import values_of, write
from benchmarks.sweeps import grown, lowest
from nondual.extensions import zipf
from nondual.language_models.in_context_learning import errors, optimal_matrix
from nondual.language_models.in_context_learning.functions import dense
from nondual.store import cache_folder

RATES, CHOOSING, SEEDS = (0.001, 0.003, 0.01), (101, 102), tuple(range(1, 9))
WEIGHTS, MIDDLE = (0.03, 0.3, 3.0), 0.3
NAMED = 0.02
"""The effect named beforehand, as a share of the variance of the answers, which is 1; for the index 0.1."""
NAMED_INDEX = 0.1
PART = M // 4
"""The most frequent and the rarest quarter of the stored tasks."""

ARMS = [
    Arm(name, weight, law)
    for law in (False, True)
    for name, weight in (("next", 0.0), ("task", MIDDLE), ("inputs", MIDDLE), ("random", MIDDLE))
] + [Arm("task", weight) for weight in WEIGHTS if weight != MIDDLE]

LONGER = [arm for arm in ARMS if not arm.law and arm.weight in (0, MIDDLE)]
"""The arms that are trained twice as long too, with other seeds."""
LONGER_STEPS, LONGER_SEEDS = 2 * STEPS, tuple(range(11, 19))

OUTCOMES: dict[str, Callable[[dict[str, Any]], float]] = {
    "stored": lambda run: run["stored"],
    "new": lambda run: run["new"],
    "index on new": lambda run: run["index on new"],
    "stored, by Zipf": lambda run: run["stored, by Zipf"],
    "frequent": lambda run: mean(run["of each task"][:PART]),
    "rare": lambda run: mean(run["of each task"][-PART:]),
    "index on stored": lambda run: run["index on stored"],
    "named": lambda run: run["named"][-1],
    "readable": lambda run: run["readable"],
}
"""What is read off a run. Errors are better when lower; the index and the share of right names are not errors."""
HIGHER = ("index on new", "index on stored", "named", "readable")


class Plan(NamedTuple):
    """What is trained."""

    folder: Path
    steps: int = STEPS
    rates: tuple[float, ...] = RATES
    choosing: tuple[int, ...] = CHOOSING
    seeds: tuple[int, ...] = SEEDS
    until: float = float("inf")
    """The time, by the monotonic clock, after which no run begins."""


class OutOfTime(Exception):
    """The time that was given is over."""


def carried_out(plan: Plan, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
    run = Run(arm, rate, seed, plan.steps, plan.folder)
    if not run.file.exists() and time.monotonic() > plan.until:
        raise OutOfTime
    return carry_out(run)


def of_arm(plan: Plan, arm: Arm) -> dict[str, Any]:
    """The rates that were tried, the one chosen, and the runs of the paired seeds."""
    own = "stored, by Zipf" if arm.law else "stored"
    tried = grown(lambda rate: mean(carried_out(plan, arm, rate, seed)[own] for seed in plan.choosing), plan.rates)
    rate = lowest(tried)
    return {
        "arm": str(arm),
        "rates": {f"{each:g}": round(value, 5) for each, value in tried.items()},
        "rate": rate,
        "runs": [carried_out(plan, arm, rate, seed) for seed in plan.seeds],
    }


# --- the judgement -------------------------------------------------------------------------------------------------


def compared(ours: Sequence[float], others: Sequence[float], named: float) -> dict[str, Any]:
    """The paired differences, ours less the other's, where above 0 is better, and the protocol's word."""
    each = [a - b for a, b in zip(ours, others, strict=True)]
    n, middle = len(each), mean(each)
    error = stdev(each) / n**0.5
    half95, half90 = (float(error * student.ppf(at, n - 1)) for at in (0.975, 0.95))
    p = float(2 * student.sf(abs(middle) / error, n - 1)) if error else float(middle == 0)
    return {
        "mean": round(middle, 5),
        "interval": [round(middle - half95, 5), round(middle + half95, 5)],
        "p": round(p, 6),
        "is": said(middle - half95, middle + half95, middle - half90, middle + half90, named),
    }


PAIRS = [
    ("task", "next"),
    ("task", "inputs"),
    ("task", "random"),
    ("inputs", "next"),
    ("random", "next"),
]


def judged(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Arms against one another, by outcome. Errors are turned round: above 0 is a lower error, or a higher index."""
    by_name = {str(arm): arm for arm in ARMS}
    pairs = [
        (str(ours), str(other))
        for ours in by_name.values()
        for other in by_name.values()
        if (ours.name, other.name) in PAIRS
        and ours.law == other.law
        and (other.name == "next" or other.weight == ours.weight)
    ]
    pairs += [(str(arm), str(arm._replace(law=False))) for arm in by_name.values() if arm.law]
    pairs += [(str(Arm("task", MIDDLE, True)), str(Arm("next")))]
    out: dict[str, Any] = {}
    for ours, other in pairs:
        if ours not in arms or other not in arms:
            continue
        rows = {}
        for outcome, of in OUTCOMES.items():
            sign, named = (1, NAMED_INDEX) if outcome in HIGHER else (-1, NAMED)
            a, b = ([sign * of(run) for run in arms[name]["runs"]] for name in (ours, other))
            rows[outcome] = compared(a, b, named)
        main = [rows[outcome] for outcome in ("stored", "new", "index on new")]
        for row, remains in zip(main, holm([row["p"] for row in main])):
            row["remains with Holm"] = remains
        out[f"{ours} less {other}"] = rows
    return out


def points(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each arm's means and intervals, and whether another is at least as good on stored and on new tasks."""
    out: dict[str, Any] = {}
    for name, told in arms.items():
        out[name] = {}
        for outcome, of in OUTCOMES.items():
            values = [of(run) for run in told["runs"]]
            half = float(stdev(values) / len(values) ** 0.5 * student.ppf(0.975, len(values) - 1))
            out[name][outcome] = {
                "mean": round(mean(values), 5),
                "interval": [round(mean(values) - half, 5), round(mean(values) + half, 5)],
            }
    for name, here in out.items():
        a = [here[kind]["mean"] for kind in ("stored", "new")]
        here["beaten by"] = [
            other
            for other, there in out.items()
            if other != name and all(there[kind]["mean"] <= value for kind, value in zip(("stored", "new"), a))
        ]
    return out


# --- what can be computed ------------------------------------------------------------------------------------------


def linear_layer(tasks: Tensor, shares: Tensor) -> dict[str, float]:
    """The exact errors of linear attention as the mean from one example on, the best layer for each number of them.

    That tasks come unequally often enters by R = Σ p w wᵀ alone, so each is stretched by √(M p).
    """
    stretched = tasks.double() * (len(tasks) * shares.double()).sqrt()[:, None]
    quarter = max(len(tasks) // 4, 1)
    rows = []
    for n in range(1, LENGTH):
        matrix = optimal_matrix(stretched, n, NOISE)
        found = {"stored": errors(matrix, tasks, n, NOISE), "stored, by Zipf": errors(matrix, stretched, n, NOISE)}
        found |= {"frequent": errors(matrix, tasks[:quarter], n, NOISE)}
        found |= {"rare": errors(matrix, tasks[-quarter:], n, NOISE)}
        rows.append({name: each.stored for name, each in found.items()} | {"new": found["stored"].new})
    return {name: round(mean(row[name] for row in rows), 5) for name in rows[0]}


COUNTS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
"""Numbers of tasks for which the curve of linear attention is drawn."""


def exact(seeds: Sequence[int], counts: Sequence[int] = COUNTS, tables: int = 50) -> dict[str, Any]:
    """The layer on the tables of the seeds, by both laws; and, all tasks alike, with other numbers of tasks."""

    def over(all_tasks: Sequence[Tensor], exponent: float) -> dict[str, float]:
        rows = [linear_layer(tasks, zipf(len(tasks), exponent)) for tasks in all_tasks]
        return {name: round(mean(row[name] for row in rows), 5) for name in rows[0]}

    own = [table(seed) for seed in seeds]
    generator = torch.Generator().manual_seed(0)
    return {
        "next": over(own, 0.0),
        "next, Zipf": over(own, 1.0),
        "by tasks": {str(m): over([dense(m, D, generator) for _ in range(tables)], 0.0) for m in counts},
    }


def predictors(seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The two predictors on the prompts that the arms are judged on, as the mean over the seeds."""
    each = [corners(seed) for seed in seeds]
    out: dict[str, dict[str, Any]] = {}
    for who in each[0]:
        out[who] = {
            name: round(mean(of(one[who]) for one in each), 5)
            for name, of in OUTCOMES.items()
            if not name.startswith(("index", "readable")) and (name != "named" or "named" in each[0][who])
        }
    return out


# --- the plan ------------------------------------------------------------------------------------------------------


def main(options: list[str]) -> None:
    given = values_of(options)
    torch.set_num_threads(1)
    if "--tiny" in options:
        with tempfile.TemporaryDirectory() as folder:
            plan = Plan(Path(folder), 2, (0.003,), (101,), (1, 2))
            arms = {str(arm): of_arm(plan, arm) for arm in (Arm("next"), Arm("task", MIDDLE), Arm("random", MIDDLE))}
            print(list(judged(arms)), [*points(arms)], exact((1,), (2,), 2)["next"], list(predictors((1,))))
        return
    plan = Plan(
        cache_folder() / "runs" / "recognition_aim",
        until=time.monotonic() + 60 * float(given.get("minutes", "inf")),
    )
    chosen = [arm for arm in ARMS if given.get("only", "").replace("_", " ") in str(arm)]
    if not chosen:
        raise SystemExit(f"no arm has {given['only']} in its name; there are: {'; '.join(map(str, ARMS))}")
    arms: dict[str, dict[str, Any]] = {}
    longer: dict[str, dict[str, Any]] = {}
    twice = plan._replace(steps=LONGER_STEPS, seeds=LONGER_SEEDS)
    try:
        for done, one, arm in [
            *((arms, plan, arm) for arm in chosen),
            *((longer, twice, arm) for arm in chosen if arm in LONGER),
        ]:
            done[str(arm)] = of_arm(one, arm)
            told = {name: round(mean(of(run) for run in done[str(arm)]["runs"]), 4) for name, of in OUTCOMES.items()}
            print(arm, one.steps, done[str(arm)]["rates"], told, flush=True)
    except OutOfTime:
        print(f"{len(arms)} of {len(chosen)} arms done in the time given: call again to go on")
        return
    if len(arms) < len(ARMS):
        return
    figures = {
        "settings": {
            "d": D, "tasks": M, "length": LENGTH, "noise": NOISE, "width": WIDTH, "layers": LAYERS, "heads": HEADS,
            "batch": BATCH, "steps": STEPS, "tested": M * TESTED, "weights": list(WEIGHTS), "middle": MIDDLE,
            "quarter": PART, "named": NAMED, "named index": NAMED_INDEX, "choosing": list(CHOOSING),
        },
        "points": points(arms),
        "compared": judged(arms),
        "predictors": predictors(SEEDS),
        "linear attention": exact(SEEDS),
        "arms": arms,
        "longer": {
            "steps": LONGER_STEPS, "points": points(longer), "compared": judged(longer), "arms": longer,
            "predictors": predictors(LONGER_SEEDS),
        },
    }  # fmt: skip
    write("recognition_aim", "nox -s bench -- recognition_aim", figures, threads=1)
