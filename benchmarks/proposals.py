"""The essay's proposals against ordinary attention, by the protocol of docs/measured/protocol.md.

Each arm meets each task: the rate is chosen by whole trainings with two seeds of their own, then eight paired seeds are
trained. What a run ended with is kept in `runs/proposals` of the cache folder, so that the plan goes on where it was
stopped. A job is one arm on one task.

    nox -s bench -- proposals                        on all cores of this machine
    nox -s bench -- proposals --jobs=2               on two of them
    nox -s bench -- proposals --section=continuous   of one section: continuous, self_liberating, head_fusion or arc
    nox -s bench -- proposals --only=fusion          arms with this in their name, and what they are compared with
    nox -s bench -- proposals --tasks=copy,Gita      on these tasks; what each job ends with is printed, and, where a
                                                     section is named, what docs/measured has for it
    nox -s bench -- proposals --minutes=30           begin no job after half an hour
    nox -s bench -- proposals --left                 only tasks of which docs/measured has no runs, added to the others
    nox -s bench -- proposals --longer               a few arms of the arc for ten times as many steps
    nox -s bench -- proposals --slurm=PARTITION      each job as one of a Slurm cluster, by submitit; the cache folder
                                                     must be one that all its machines see (NONDUAL_CACHE)
    nox -s bench -- proposals --tiny                 two arms, two tasks, a few steps; writes nothing

A section whose jobs are all done is written to docs/measured/proposals_<section>.json; with --left every task whose
jobs are all done, and the names of the tasks that are left. Once each section has a file, every run of all four is a
row of docs/measured/proposals.csv. Processors round differently, and training magnifies that: arms are compared within
a task, whose runs are all of one machine.
"""

import csv
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student
from tqdm import tqdm

from benchmarks.proposals_run import (
    ARMS,
    CHECKS,
    FUSION,
    FUSION_OPEN,
    MADE_UP,
    MEETS,
    SECTIONS,
    TASKS,
    Run,
    carry_out,
    control_of,
)
from benchmarks.record import MEASURED, processor, values_of, write
from benchmarks.sweeps import grown, highest, lowest
from nondual.store import cache_folder

RATES, CHOOSING, SEEDS = (0.003, 0.01), (101, 102), tuple(range(1, 9))
FROM_LOWER = {"direction": (0.001, 0.003, 0.01)}
"""Tasks whose grid begins with other rates."""
WRITTEN = {
    "continuous": "proposals_continuous",
    "self_liberating": "proposals_self_liberating",
    "head_fusion": "proposals_head_fusion",
    "arc": "proposals_arc",
}
"""The file of each section."""
NAMED = {False: 0.02, True: 0.01}
"""The effect named beforehand: two points of right answers, or 0.01 bit."""


STEPS = (
    ("additive", "LSTM"),
    ("base", "additive"),
    ("window of 16", "base"),
    ("fixed, stretches of 16", "base"),
    ("linear", "base"),
    ("linear", "fixed, stretches of 16"),
    ("delta rule", "linear"),
    ("Mamba", "linear"),
    ("Mamba", "base"),
    ("Mamba-2", "Mamba"),
    ("hybrid", "Mamba"),
)
"""The steps of the history, each with what came before it: section 5 of the protocol."""


LONGER = 3000
"""Steps of the longer trainings of `--longer`, change 11 of the protocol; with the rates that were chosen for 300."""
LONGER_TASKS, LONGER_ARMS = ("selective copy", "recall"), ("base", "linear", "delta rule", "Mamba", "Mamba-2")


class Job(NamedTuple):
    """One arm on one task: its rates, then its seeds."""

    task: str
    arm: str
    folder: Path
    steps: int | None = None
    rates: tuple[float, ...] = RATES
    choosing: tuple[int, ...] = CHOOSING
    seeds: tuple[int, ...] = SEEDS


def carry_out_job(job: Job) -> dict[str, Any]:
    """The rates that were tried, the one chosen, and the runs of the paired seeds."""
    torch.set_num_threads(1)
    text = job.task not in MADE_UP

    def value_at(rate: float) -> float:
        return mean(carry_out(Run(*job[:2], rate, seed, job.steps, job.folder))["outcome"] for seed in job.choosing)

    tried = grown(value_at, job.rates, lowest if text else highest, beyond=4)
    rate = (lowest if text else highest)(tried)
    return {
        "task": job.task,
        "arm": job.arm,
        "rates": {f"{each:g}": round(value, 4) for each, value in tried.items()},
        "rate": rate,
        "inside": min(tried) < rate < max(tried),
        "runs": [carry_out(Run(*job[:2], rate, seed, job.steps, job.folder)) for seed in job.seeds],
    }


# --- the judgement -------------------------------------------------------------------------------------------------


def compared(ours: Sequence[float], others: Sequence[float], text: bool) -> dict[str, Any]:
    """The paired differences, ours less the other's, signed so that above 0 is better, and the protocol's word."""
    sign = -1 if text else 1
    each = [sign * (a - b) for a, b in zip(ours, others, strict=True)]
    n, middle, named = len(each), mean(each), NAMED[text]
    error = stdev(each) / n**0.5
    half95, half90 = (error * student.ppf(at, n - 1) for at in (0.975, 0.95))
    low, high = middle - half95, middle + half95
    p = float(2 * student.sf(abs(middle) / error, n - 1)) if error else (1.0 if middle == 0 else 0.0)
    return {
        "mean": round(middle, 5),
        "interval": [round(low, 5), round(high, 5)],
        "p": round(p, 6),
        "is": said(low, high, middle - half90, middle + half90, named),
        "equivalent": equivalent(middle - half90, middle + half90, named),  # if a little better or worse, too
    }


def said(low: float, high: float, low90: float, high90: float, named: float) -> str:
    """The protocol's word for an interval."""
    if low > 0 or high < 0:
        word = "better" if low > 0 else "worse"
        return f"{word} as named" if min(abs(low), abs(high)) > named else word
    return "equivalent" if equivalent(low90, high90, named) else "not decided"


def equivalent(low90: float, high90: float, named: float) -> bool:
    """Whether the 90 % interval lies within the effect that was named, on both sides of 0."""
    return bool(-named < low90 and high90 < named)


def holm(ps: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several results remain at this level, by Holm's method."""
    remains, order = [False] * len(ps), sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(order):
        if ps[i] > level / (len(ps) - rank):
            break
        remains[i] = True
    return remains


def judged(found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Every arm against its control on every task, a fusion against its placebo, a step against the one before."""
    pairs = [(arm, control_of(arm)) for arm in ARMS if arm != control_of(arm)]
    pairs += [step for step in STEPS if step not in pairs]
    for arms in (FUSION, FUSION_OPEN):
        placebo = next(arm for arm in arms if arm.endswith("placebo"))
        pairs += [(arm, placebo) for arm in arms if arm != placebo]
    out: dict[str, Any] = {}
    for arm, control in pairs:
        rows = {}
        for task in TASKS:
            if (task, arm) in found and (task, control) in found:
                ours, others = ([run["outcome"] for run in found[task, a]["runs"]] for a in (arm, control))
                rows[task] = compared(ours, others, task not in MADE_UP)
        for row, remains in zip(rows.values(), holm([row["p"] for row in rows.values()])):
            row["remains with Holm"] = remains
        if rows:
            out[f"{arm} less {control}"] = rows
    return out


def as_csv(sections: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """Every run of the paired seeds as a row: what was trained, how well it did, and what went wrong."""
    columns = ["section", "task", "arm", "compared with", "unit", "rate", "seed", "outcome"]
    columns += [f"after 1/{part}" if part > 1 else "at the end" for part in CHECKS]
    columns += ["loss spikes", "failed", "parameters"]
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(columns)
    for section, found in sections.items():
        for job in found:
            unit = "share of right answers" if job["task"] in MADE_UP else "bits a character"
            what = [section, job["task"], job["arm"], control_of(job["arm"]), unit]
            for run in job["runs"]:
                ended = [run["rate"], run["seed"], run["outcome"], *run["curve"]]
                rows.writerow([*what, *ended, run["spikes"], run["failed"] or "", run["parameters"]])
    return out.getvalue()


def measured() -> dict[str, list[dict[str, Any]]]:
    """The jobs of each section that has a file."""
    files = {section: MEASURED / f"{name}.json" for section, name in WRITTEN.items()}
    return {name: json.loads(file.read_text())["figures"]["jobs"] for name, file in files.items() if file.exists()}


# --- the plan ------------------------------------------------------------------------------------------------------


def pairs_of(arms: Iterable[str], tasks: Iterable[str] = TASKS) -> list[tuple[str, str]]:
    """(task, arm) for these arms and what they are compared with, on the tasks that they meet."""
    wanted = {each for arm in arms for each in (arm, control_of(arm))}
    return [(task, arm) for task, arm in product(tasks, ARMS) if arm in wanted and task in MEETS[arm]]


def jobs(options: list[str], folder: Path) -> list[Job]:
    """The jobs that the options ask for."""
    given = values_of(options)
    tasks = given["tasks"].split(",") if "tasks" in given else list(TASKS)
    if unknown := set(tasks) - set(TASKS):
        raise SystemExit(f"there is no task {', '.join(sorted(unknown))}; there are: {', '.join(TASKS)}")
    section = next((option.removeprefix("--section=") for option in options if option.startswith("--section=")), None)
    if section is not None and section not in SECTIONS:
        raise SystemExit(f"there is no section {section}; there are: {', '.join(SECTIONS)}")
    arms = [arm for arm in (ARMS if section is None else SECTIONS[section]) if given.get("only", "") in arm]
    if not arms:
        raise SystemExit(f"no arm has {given['only']} in its name; there are: {'; '.join(ARMS)}")
    pairs = pairs_of(arms, tasks)
    whole = [Job(task, arm, folder, rates=FROM_LOWER.get(task, RATES)) for task, arm in pairs]
    if "--tiny" in options:
        return [
            job._replace(steps=3, rates=(0.003,), choosing=(101,), seeds=(1, 2))
            for job in whole
            if job.task in ("copy", "recall") and job.arm in ("base", "symmetric")
        ]
    return whole


def done(plan: list[Job], options: list[str]) -> list[dict[str, Any]]:
    """Carry out the jobs on this machine's cores or on a cluster; what was not begun in time is left out."""
    given = values_of(options)
    until = time.monotonic() + 60 * float(given.get("minutes", "inf"))
    if "slurm" in given:
        try:
            from submitit import AutoExecutor
        except ImportError:
            sys.exit("--slurm needs submitit in this environment: pip install submitit")

        executor = AutoExecutor(folder=plan[0].folder / "slurm")
        executor.update_parameters(slurm_partition=given["slurm"], cpus_per_task=1, timeout_min=480)
        with executor.batch():
            waiting = [executor.submit(carry_out_job, job) for job in plan]
        return [each.result() for each in tqdm(waiting, desc="arms on tasks")]
    cores = int(given.get("jobs", os.cpu_count() or 1))
    results: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, context) as pool:
        left = iter(plan)
        running = {pool.submit(carry_out_job, job) for job in islice(left, cores)}
        with tqdm(total=len(plan), desc="arms on tasks") as bar:
            while running:
                finished = {each for each in running if each.done()}
                for each in finished:
                    results.append(each.result())
                    bar.update()
                    if time.monotonic() < until and (job := next(left, None)) is not None:
                        running.add(pool.submit(carry_out_job, job))
                running -= finished
                time.sleep(0.05)
    return results


def main(options: list[str]) -> None:
    folder = cache_folder() / "runs" / "proposals"
    plan = jobs(options, folder)
    if "--tiny" in options:
        with tempfile.TemporaryDirectory() as apart:
            print([each["rate"] for each in done([job._replace(folder=Path(apart)) for job in plan], options)])
        return
    if "--longer" in options:
        write("proposals_longer", "nox -s bench -- proposals --longer", longer(folder, options))
        return
    given = values_of(options)
    known = {name: {(job["task"], job["arm"]): job for job in each} for name, each in measured().items()}
    before = {section: known.get(section, {}) if "--left" in options else {} for section in SECTIONS}
    wanted = {
        pair
        for section, arms in SECTIONS.items()
        if section == given.get("section", section)
        for pair in pairs_of(arms)
        if pair not in before[section]
    }
    plan = [job for job in plan if (job.task, job.arm) in wanted]
    found = {(each["task"], each["arm"]): {**each, "device": processor()} for each in done(plan, options)}
    print(f"{len(found)} of {len(plan)} jobs done")
    print("\n".join(beside(found, known.get(given.get("section", ""), {}))))
    for section, arms in SECTIONS.items():
        part, left = whole_tasks(found | before[section], arms)
        is_more = part.keys() > before[section].keys()
        if is_more and (not left or "--left" in options):  # a part of a section does not take the place of the whole
            jobs_of = [without_losses(each) for each in part.values()]
            figures = {"jobs": jobs_of, "left": left, "compared": judged(part)}
            write(WRITTEN[section], f"nox -s bench -- proposals --section={section}", figures)
    if len(written := measured()) == len(SECTIONS):
        (MEASURED / "proposals.csv").write_text(as_csv(written))


def beside(found: Mapping[tuple[str, str], Any], known: Mapping[tuple[str, str], Any]) -> list[str]:
    """A line for each job: the mean outcome of its seeds and the rate, and those of docs/measured where it has them."""

    def told(job: dict[str, Any]) -> str:
        return f"{mean(run['outcome'] for run in job['runs']):.4f} at a rate of {job['rate']}"

    return [
        f"{task}, {arm}: {told(job)}" + (f" (docs/measured: {told(known[task, arm])})" if (task, arm) in known else "")
        for (task, arm), job in found.items()
    ]


def longer(folder: Path, options: list[str]) -> dict[str, Any]:
    """Two seeds of a few arms of the arc, trained for longer, with the rates that docs/measured has for them."""
    rates = {(job["task"], job["arm"]): job["rate"] for job in measured()["arc"]}
    pairs = product(LONGER_TASKS, LONGER_ARMS)
    plan = [Job(*pair, folder, LONGER, (rates[pair],), SEEDS[:1], SEEDS[:2]) for pair in pairs]
    return {"steps": LONGER, "jobs": [without_losses(each) for each in done(plan, options)]}


def without_losses(job: dict[str, Any]) -> dict[str, Any]:
    """A job without the losses on the way, half of what its runs keep: they stay in the cache folder."""
    return {**job, "runs": [{key: value for key, value in run.items() if key != "loss"} for run in job["runs"]]}


def whole_tasks(
    found: Mapping[tuple[str, str], Any], arms: Iterable[str]
) -> tuple[dict[tuple[str, str], Any], list[str]]:
    """What was found of these arms and their controls on tasks whose jobs are all done, and the other tasks."""
    wanted = pairs_of(arms)
    left = list(dict.fromkeys(task for task, arm in wanted if (task, arm) not in found))
    return {pair: found[pair] for pair in wanted if pair[0] not in left}, left
