"""What a state of fixed size can give back, and over what distance; beside attention, whose memory grows.

Four tasks, which benchmarks/recall_run.py describes.

    recall     LSTM with 16, 64 and 128 cells, Mamba with 16 states a channel, two layers of attention
    copying    LSTM with 16 and 64 cells, Mamba with 16, attention
    gap        one token after 3 to 1,000 blanks, for RNN, GRU, LSTM with its forget bias at 0, at 1, and spread so that
               its cells last from one step to the whole gap (chrono), and attention; 2, 4 and 8 tokens after 30 blanks
    EEG        the next four samples of a recording, for attention with learned positions and with ALiBi, and LSTM;
               beside them the last value and linear regression

`LSTM 64`, `Mamba 16` and `attention 64` have nearly the same number of parameters. Each arm is trained to the end at
every rate of its task's grid with one seed, and at rates beyond the grid where the best is at its edge. At the best of
them it is trained with other seeds, which had no part in the choice. A seed fixes the batches, so that arms are paired
by it. Attention has a quarter of the others' batches of recall and copying. Two arms of recall are also trained three
times as long, to see what more training gives.

Gaps: an arm is trained at each gap in turn. It goes no further than the first gap at which none of the rates succeeds;
there it is tried again with four times the steps, up to a gap of 100, to tell what is slow from what stops. The GRU is
not tried at 1,000, because torch's takes six times as long as its LSTM.
A training ends as soon as 99 % of 128 rows are right.

    nox -s bench -- recall           some twelve minutes of one core
    nox -s bench -- recall --tiny    a few steps of a few, which writes nothing to docs/measured

A run is kept as it ends, in `runs/recall` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.heads_trained import difference
from benchmarks.recall_run import (
    AHEAD,
    BATCH,
    CHECKED,
    EEG_PARTS,
    GAP_BATCH,
    KEYS,
    LONGEST,
    QUESTIONS,
    SOLVED,
    TRAINED_ON,
    VALUES,
    WINDOW,
    Run,
    carry_out,
    eeg_windows,
)
from benchmarks.record import write
from nondual.store import cache_folder

SWEEP_SEED, FEW, MANY = 0, (1, 2, 3), tuple(range(1, 9))
RATES = {
    "recall": (3e-3, 1e-2, 3e-2),
    "copying": (3e-3, 1e-2, 3e-2),
    "gap": (1e-3, 3e-3, 1e-2),
    "EEG": (1e-3, 3e-3, 1e-2),
}
STEPS = {"recall": 1200, "copying": 1200, "gap": 400, "several": 600, "EEG": 300}
SHARE, LONGER = 4, 3
"""Attention has a SHARE-th of the steps; one arm has LONGER times as many."""
EIGHT = ("LSTM 64", "attention 64")
TABLED = {"recall": ("LSTM 64", "attention 64", "LSTM 16"), "copying": ("LSTM 64", "attention 64", "LSTM 16")}
MORE = {"recall": ("Mamba 16", "LSTM 128"), "copying": ("Mamba 16",)}
RECURRENT = ("LSTM, forget bias 1", "LSTM, chrono", "LSTM, forget bias 0", "RNN", "GRU")
GAPS, SEVERAL_GAP, SEVERAL = (3, 10, 30, 100, 300, 1000), 30, (2, 4, 8)
LONGER_GAP, LONGER_UP_TO = 4, 100
"""Where a gap of 100 or less is the first at which an arm fails, it is tried once more with four times the steps."""
SEVERAL_ARMS = ("LSTM, chrono",)
EEG_ARMS = ("attention", "LSTM", "attention, ALiBi")
RECALLED = 0.9
"""The share of right answers from which on a number of pairs or tokens counts as recalled."""


def merit(result: dict[str, Any]) -> float:
    """By which rates are chosen, the lower the better: a loss; for gaps, the steps it took or what is still wrong."""
    if "failed" in result:
        return float("inf")
    if "best" in result:
        return result["steps"] + 10_000 * (1 - result["best"]) * (result["best"] < SOLVED)
    return result["choose"] if "choose" in result else result["loss"]


def swept(task: str, arm: str, rates: tuple[float, ...], steps: int, folder: Path) -> tuple[dict[str, Any], float]:
    """The runs of the first seed by rate, and the best rate.

    Where the best is at the edge, two rates beyond are tried at most. A gap that some rate has mastered needs no other;
    of one that none has, a lower and a higher rate are tried.
    """

    def beyond(edge: float, times: float) -> dict[float, dict[str, Any]]:
        rate = float(f"{edge * times:.0e}")
        return {rate: carry_out(Run(task, arm, rate, SWEEP_SEED, steps, folder))}

    sweep = {rate: carry_out(Run(task, arm, rate, SWEEP_SEED, steps, folder)) for rate in rates}
    if task.startswith("gap") and max(run["best"] for run in sweep.values()) < SOLVED:
        sweep |= beyond(min(rates), 1 / 3) | beyond(max(rates), 3)
    while True:
        best = min(sweep, key=lambda rate: merit(sweep[rate]))
        mastered = sweep[best].get("best", 0) >= SOLVED
        if len(rates) == 1 or mastered or len(sweep) == len(rates) + 2 or min(sweep) < best < max(sweep):
            return {str(rate): result for rate, result in sorted(sweep.items())}, best
        sweep |= beyond(best, 3 if best == max(sweep) else 1 / 3)


def carried_out(
    task: str, arm: str, rates: tuple[float, ...], seeds: tuple[int, ...], steps: int, folder: Path
) -> dict[str, Any]:
    """An arm: its sweep in short, its rate, and its runs."""
    sweep, rate = swept(task, arm, rates, steps, folder)
    runs = [carry_out(Run(task, arm, rate, seed, steps, folder)) for seed in seeds]
    print(task, arm, {rate: round(merit(result), 4) for rate, result in sweep.items()}, rate, flush=True)
    return {
        "rate": rate,
        "steps": steps,
        "sweep": {rate: round(merit(result), 5) for rate, result in sweep.items()},
        "best_is_at_the_edge_of_the_grid": rate in (min(map(float, sweep)), max(map(float, sweep))),
        "parameters": runs[0].get("parameters"),
        "state": runs[0].get("state"),
        "runs": [{k: x for k, x in run.items() if k not in ("rate", "parameters", "state")} for run in runs],
    }


def most_recalled(right: list[float]) -> int:
    """The largest n for which RECALLED of the answers are right, and of every smaller n too; 0 if there is none."""
    return next((n for n, share in enumerate(right) if share < RECALLED), len(right))


def table(task: str, names: tuple[str, ...], folder: Path, tiny: bool) -> dict[str, Any]:
    """Arms of recall or copying."""
    arms: dict[str, Any] = {}
    for arm in names[:2] if tiny else names:
        steps = 8 if tiny else STEPS[task] // (SHARE if arm.startswith("attention") else 1)
        seeds = FEW[:1] if tiny else MANY if arm in EIGHT and task == "recall" else FEW
        arms[arm] = carried_out(task, arm, RATES[task][:1] if tiny else RATES[task], seeds, steps, folder)
    return arms


def summed_up(arms: dict[str, Any]) -> dict[str, Any]:
    """The arms, each with the most that it recalls, and what is paired."""
    for arm in arms.values():
        arm["most_recalled"] = [most_recalled(run["right"]) for run in arm["runs"]]
        arm["most_bits"] = [max(run["bits"]) for run in arm["runs"]]
    right = {arm: [run["right"][-1] for run in arms[arm]["runs"]] for arm in EIGHT}
    return {"arms": arms, f"at {LONGEST}, attention less LSTM": difference(right["attention 64"], right["LSTM 64"])}


def gaps(folder: Path, tiny: bool) -> dict[str, Any]:
    """One token by the gap before it is asked for, and several after one gap."""
    one: dict[str, Any] = {}
    longer: dict[str, Any] = {}
    for arm in ("LSTM, chrono", "attention") if tiny else (*RECURRENT, "attention"):
        one[arm] = {}
        for gap in GAPS[:1] if tiny else GAPS[:-1] if arm == "GRU" else GAPS:
            found = at_gap(f"gap {gap} x 1", arm, folder, 30 if tiny else STEPS["gap"])
            one[arm][str(gap)] = found
            if not solved(found):
                if gap <= LONGER_UP_TO and not tiny:
                    task, steps = f"gap {gap} x 1", LONGER_GAP * STEPS["gap"]
                    longer[arm] = {"gap": gap, "steps": steps, **at_gap(task, arm, folder, steps)}
                break
    several: dict[str, Any] = {}
    for arm in () if tiny else SEVERAL_ARMS:
        tasks = {str(n): f"gap {SEVERAL_GAP} x {n}" for n in SEVERAL}
        several[arm] = {n: at_gap(task, arm, folder, STEPS["several"]) for n, task in tasks.items()}
    return {"one": one, "longer": longer, "several": several}


def solved(found: dict[str, Any]) -> bool:
    """Whether any run at a gap succeeded."""
    return max(found["best"] + [run["best"] for run in found["sweep"].values()]) >= SOLVED


def at_gap(task: str, arm: str, folder: Path, steps: int) -> dict[str, Any]:
    """The sweep at one gap, and the runs at its best rate; no more runs of one token where no rate succeeds."""
    sweep, rate = swept(task, arm, RATES["gap"], steps, folder)
    any_rate = any(run["best"] >= SOLVED for run in sweep.values())
    more = FEW if any_rate or not task.endswith("x 1") else ()
    runs = [carry_out(Run(task, arm, rate, seed, steps, folder)) for seed in more]
    print(task, arm, rate, [run["best"] for run in sweep.values()], [run["best"] for run in runs], flush=True)
    return {
        "rate": rate,
        "sweep": {rate: {key: run[key] for key in ("best", "steps")} for rate, run in sweep.items()},
        "best": [run["best"] for run in runs],
        "steps": [run["steps"] for run in runs],
    }


# --- the EEG -------------------------------------------------------------------------------------------------------


def recording(folder: Path, tiny: bool) -> dict[str, Any]:
    """What each arm misses of the next samples, and how they differ."""
    arms = {}
    for arm in EEG_ARMS[:2] if tiny else EEG_ARMS:
        seeds, steps = (FEW[:1], 30) if tiny else (MANY, STEPS["EEG"])
        arms[arm] = carried_out("EEG", arm, RATES["EEG"][:1] if tiny else RATES["EEG"], seeds, steps, folder)
    missed = {arm: [run["missed"] for run in found["runs"]] for arm, found in arms.items()}
    return {
        "arms": arms,
        "by_rule": by_rule(),
        "less attention": {arm: difference(missed[arm], missed["attention"]) for arm in arms if arm != "attention"},
    }


def by_rule() -> dict[str, dict[str, float]]:
    """The same share missed by the last value, and by ridge regression on the last samples of all channels."""

    def flat(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The last 16 samples of each window's second half, and the samples after."""
        (x,), after = eeg_windows(part)
        half = WINDOW // 2
        recent = x.unfold(1, 16, 1)[:, half - 15 :]  # (B, WINDOW / 2, 4, 16)
        return recent.flatten(2).flatten(0, 1).double(), after[:, half:].flatten(0, 1).double()

    def missed(said: torch.Tensor, after: torch.Tensor) -> float:
        wrong = (said - after).square().unflatten(1, (AHEAD, 4)).mean((0, 2))
        return (wrong / after.square().unflatten(1, (AHEAD, 4)).mean((0, 2))).mean().item()

    (x, y), choose, test = (flat(part) for part in ("train", "choose", "test"))
    found: dict[str, dict[str, float]] = {}
    for name, (recent, after) in {"choose": choose, "test": test}.items():
        last = recent.unflatten(1, (4, 16))[:, :, -1].repeat(1, AHEAD)
        found.setdefault("last value", {})[name] = round(missed(last, after), 4)
    weights = {
        penalty: torch.linalg.solve(x.mT @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.mT @ y)
        for penalty in (1e-3, 1e-2, 1e-1, 1.0)
    }
    penalty = min(weights, key=lambda one: missed(choose[0] @ weights[one], choose[1]))
    parts = {"choose": choose, "test": test}
    shares = {name: round(missed(recent @ weights[penalty], after), 4) for name, (recent, after) in parts.items()}
    return found | {"linear": shares | {"penalty": penalty}}


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "recall"
    torch.set_num_threads(1)
    recalled = table("recall", TABLED["recall"], folder, tiny)
    recorded, after_gaps = recording(folder, tiny), gaps(folder, tiny)
    copied = table("copying", TABLED["copying"], folder, tiny)
    if not tiny:
        for arm in ("LSTM 64", "LSTM 16"):
            rate, seeds = recalled[arm]["rate"], (SWEEP_SEED, *FEW[:2])  # no rate was chosen by this length
            longer = carried_out("recall", arm, (rate,), seeds, LONGER * STEPS["recall"], folder)
            recalled[f"{arm}, {LONGER} times as long"] = longer
        recalled |= table("recall", MORE["recall"], folder, tiny)
        copied |= table("copying", MORE["copying"], folder, tiny)
    figures: dict[str, Any] = {
        "recall": summed_up(recalled),
        "copying": summed_up(copied),
        "gap": after_gaps,
        "EEG": recorded,
        "settings": {
            "values": VALUES,
            "keys": KEYS,
            "questions": QUESTIONS,
            "longest": LONGEST,
            "trained_on": TRAINED_ON,
            "batch": BATCH,
            "gap_batch": GAP_BATCH,
            "gap_checked_every": CHECKED,
            "solved": SOLVED,
            "recalled": RECALLED,
            "several_gap": SEVERAL_GAP,
            "eeg_parts": {name: [part.start, part.stop] for name, part in EEG_PARTS.items()},
            "window": WINDOW,
            "ahead": AHEAD,
        },
    }
    if tiny:
        print({task: list(found) for task, found in figures.items()})
        return
    for task in ("recall", "copying"):
        for arm, found in figures[task]["arms"].items():
            print(task, arm, found["most_recalled"], round(mean(found["most_bits"]), 1))
    write("recall", "nox -s bench -- recall", figures, threads=1)
