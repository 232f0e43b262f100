"""What attention's weights follow, in small models trained here and in two that others trained.

trained      benchmarks/routing_run.py describes the three tasks: a cue that was right by coincidence, what two
             heads leave to one another, and facts of which some are falsely told.
read         benchmarks/routing_read.py: what moves a token's vector in MiniLM, beside the weights; whether a direction
             in SmolLM2 tells true sentences from false ones, on a topic that it was not fitted to; and whether SmolLM2
             copies where copying is of no use.

Each arm of a task is trained to the end at every rate of a grid with one seed, and at rates beyond it where the best is
at the edge. At the best of them it is trained with other seeds, which had no part in the choice. A seed fixes the
batches, the first weights and what is drawn once, so that arms are paired by it.

    nox -s bench -- routing           some ten minutes of one core
    nox -s bench -- routing --tiny    a few steps of a few, which writes nothing to docs/measured

A run is kept as it ends, in `runs/routing` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import routing_read
from benchmarks.heads_trained import difference
from benchmarks.intervals import by_seeds
from benchmarks.record import write
from benchmarks.routing_run import CONDITIONS, DECAY, EVERY, SAID, Run, carry_out
from benchmarks.sweeps import grown, lowest
from nondual.store import cache_folder

SWEEP_SEED = 0
ARMS = {"cue": ("1.0", "0.9", "0.5", "0.125"), "heads": ("both", "0", "1"), "facts": ("corpus",)}
RATES = {
    "cue": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "heads": (4e-3, 8e-3, 1.6e-2),
    "facts": (8e-3, 1.6e-2, 3.2e-2),
}
STEPS = {"cue": 1000, "heads": 400, "facts": 1200}
SEEDS = {task: tuple(range(1, 9)) for task in ARMS}
BEYOND = 3
"""How many rates outside of a grid are tried at most."""


def arm_of(task: str, arm: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """The sweep of an arm, and its runs at the best rate, in the order of their seeds."""
    steps, rates, seeds = (5, RATES[task][:1], SEEDS[task][:3]) if tiny else (STEPS[task], RATES[task], SEEDS[task])
    sweep = grown(
        lambda rate: carry_out(Run(task, arm, rate, SWEEP_SEED, steps, folder))["loss"], rates, lowest, BEYOND
    )
    rate = lowest(sweep)
    runs = [carry_out(Run(task, arm, rate, seed, steps, folder)) for seed in seeds]
    return {"sweep": sweep, "rate": rate, "seeds": list(seeds), "runs": runs}


def over_seeds(each: list[float]) -> dict[str, Any]:
    """The mean, its 95 % interval by Student's t, and each seed's value."""
    found = by_seeds(each)
    interval = None if found is None else [round(x, 4) for x in found[1:]]
    return {"mean": round(mean(each), 4), "interval": interval, "each": [round(x, 4) for x in each]}


def cue(arms: dict[str, Any]) -> dict[str, Any]:
    """Weights and answers where the mark stands on a wrong item; and the weights less those of the last arm."""
    found: dict[str, Any] = {"arms": {}}
    control = arms[ARMS["cue"][-1]]["runs"]
    for arm, of in arms.items():
        columns = {name: [run[name] for run in of["runs"]] for name in of["runs"][0]}
        found["arms"][arm] = {name: over_seeds(each) for name, each in columns.items()}
        mark = "weight on the mark"
        found["arms"][arm]["mark less control"] = difference(columns[mark], [run[mark] for run in control])
    return found


def roles(run: dict[str, Any]) -> list[int]:
    """The relation that each of two heads has at the end: they have different ones, so that most weight is on both."""
    looks = run["curve"][-1]["looks"]
    return [0, 1] if looks[0][0] + looks[1][1] >= looks[0][1] + looks[1][0] else [1, 0]


def heads(arms: dict[str, Any]) -> dict[str, Any]:
    """Of the two heads: pulls through training, and what each looks at with the other and without."""
    both = arms["both"]["runs"]
    own = [roles(run) for run in both]
    curves: dict[str, list[list[float]]] = {}
    for what in ("pull", "pull without the other"):
        for whose in ("own", "the other's"):
            curves[f"{what}, {whose}"] = [
                [
                    mean(point[what][h][r if whose == "own" else 1 - r] for h, r in enumerate(o))
                    for point in run["curve"]
                ]
                for run, o in zip(both, own)
            ]
    # the first moment at which the loss has fallen half way
    half = [
        next(i for i, p in enumerate(run["curve"]) if p["loss"] <= run["curve"][0]["loss"] / 2)
        if run["curve"][-1]["loss"] <= run["curve"][0]["loss"] / 2
        else len(run["curve"]) - 1
        for run in both
    ]
    at_half = {name: [curve[i] for curve, i in zip(each, half)] for name, each in curves.items()}
    alone, together = [], []
    for i, o in enumerate(own):
        last = [arms[str(h)]["runs"][i]["curve"][-1]["looks"][h] for h in range(2)]
        alone.append(mean(last[h][1 - r] for h, r in enumerate(o)))
        together.append(mean(both[i]["curve"][-1]["looks"][h][1 - r] for h, r in enumerate(o)))
    right = {arm: [mean(run["right"]) for run in of["runs"]] for arm, of in arms.items()}
    right["one of them"] = [mean(pair) for pair in zip(right["0"], right["1"])]
    rises = {
        whose: difference(at_half[f"pull without the other, {whose}"], at_half[f"pull, {whose}"])
        for whose in ("own", "the other's")
    }
    by_step = {
        whose: [
            difference(list(without), list(usual))
            for without, usual in zip(zip(*curves[f"pull without the other, {whose}"]), zip(*curves[f"pull, {whose}"]))
        ]
        for whose in ("own", "the other's")
    }
    return {
        "steps": [EVERY * (i + 1) for i in range(len(both[0]["curve"]))],
        "rise by step": {whose: [[d["mean"], *(d["interval"] or ())] for d in each] for whose, each in by_step.items()},
        "curves": {name: [round(mean(x), 5) for x in zip(*each)] for name, each in curves.items()},
        "loss": [round(mean(run["curve"][i]["loss"] for run in both), 4) for i in range(len(both[0]["curve"]))],
        "half": [EVERY * (i + 1) for i in half],
        "at half": {name: over_seeds(each) for name, each in at_half.items()},
        "rise without the other": rises,
        "rise for the other's less rise for its own": difference(rises["the other's"]["each"], rises["own"]["each"]),
        "weight on the other's relation": {"alone": over_seeds(alone), "both": over_seeds(together)},
        "weight alone less both": difference(alone, together),
        "right": {arm: over_seeds(each) for arm, each in right.items()},
        "right both less one": difference(right["both"], right["one of them"]),
    }


def facts(arms: dict[str, Any]) -> dict[str, Any]:
    """What is answered about each kind of person."""
    runs = arms["corpus"]["runs"]
    kinds = [
        {"false statements": falsely, "share of true": truly / SAID}
        | {
            name: over_seeds([run[name][k] for run in runs])
            for name in ("probability of the truth", "answers the truth", "answers the falsehood")
        }
        for k, (falsely, truly) in enumerate(CONDITIONS)
    ]
    excess = [run["loss"] - run["least loss"] for run in runs]
    return {"kinds": kinds, "off": over_seeds([run["off"] for run in runs]), "loss above the least": over_seeds(excess)}


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    folder = Path(tempfile.mkdtemp()) if tiny else folder or cache_folder() / "runs" / "routing"
    folder.mkdir(parents=True, exist_ok=True)
    arms = {task: {arm: arm_of(task, arm, folder, tiny) for arm in names} for task, names in ARMS.items()}
    figures = {"cue": cue(arms["cue"]), "heads": heads(arms["heads"]), "facts": facts(arms["facts"])}
    figures |= routing_read.read(folder, tiny)
    if tiny:
        return
    chosen = {
        task: {arm: {"rate": of["rate"], "sweep": of["sweep"]} for arm, of in found.items()}
        for task, found in arms.items()
    }
    setup = {
        "steps": STEPS,
        "seeds": SEEDS,
        "sweep_seed": SWEEP_SEED,
        "rates": chosen,
        "training": f"AdamW, betas 0.9 and 0.95, decay {DECAY} on matrices, gradients clipped at 1; a tenth of the "
        "steps up, then along a cosine down to a tenth of the rate",
    }
    write("routing", "nox -s bench -- routing", figures, setup=setup)
