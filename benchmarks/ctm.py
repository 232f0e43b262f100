"""A Continuous Thought Machine beside an LSTM with the same ticks, and beside twins that lack one of its parts.

Tasks, arms and models are those of benchmarks/ctm_run.py. The plan, written before the first run:

    rates     for each task and arm, with one seed, from three rates, extended by factors of two until the best is not
              at the edge; the one with the highest share of right answers on what was held out for this is taken
    seeds     three more for each arm: CTM and LSTM on fashion, digits and parity; on digits also "states" and
              "shared". A seed fixes the batches, so that arms are paired by it
    ticks     on fashion, the CTM trained with 1, 2 and 4 ticks, three seeds, at the rate of 8; and, added after the
              first run, the LSTM with 1
    stopping  on fashion's test pictures, CTM and LSTM: mean ticks and right answers for each threshold of certainty;
              beside it, what the same numbers of ticks give when they are dealt to the pictures at random
    harder    the same pictures with noise added, or with a share of their patches put out: ticks needed at one
              threshold, and right answers. And, over plain pictures, the rank correlation of the ticks one model needs
              with how unsure the other is of the same picture
    longer    both models with twice the ticks of their training
    time      of a training step by ticks

The CTM of the first seed on fashion goes to docs/assets/models/ctm.safetensors in float16, for the chapter's figure.

    nox -s bench -- ctm           some twenty minutes of one idle core
    nox -s bench -- ctm --tiny    a few steps of a few runs, which writes nothing

A run is kept as it ends, in `runs/ctm` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.ctm_run import (
    BATCH,
    BITS,
    CHANNELS,
    D_INPUT,
    D_MODEL,
    DECAY,
    FEATURES,
    HEADS,
    MEMORY,
    PAIRS,
    TICKS,
    Inputs,
    Run,
    carry_out,
    draw,
    lstm_width,
    model_of,
    parameters,
    parts_of,
    right,
    stopped,
    stopping_ticks,
    surest,
    think,
)
from benchmarks.heads_trained import difference
from benchmarks.record import MEASURED, alternate, ratio, write
from benchmarks.sweeps import grown
from benchmarks.sweeps import highest as best_of
from nondual.data import fashion
from nondual.recent.ctm import two_tick_loss
from nondual.store import cache_folder
from nondual.vision_transformers import patchify, unpatchify

MODEL = MEASURED.parent / "assets" / "models" / "ctm.safetensors"
GRID = (4e-3, 8e-3, 1.6e-2)
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
STEPS = {"fashion": 800, "digits": 400, "parity": 1000}
ARMS = {
    "fashion": ("CTM", "LSTM"),
    "digits": ("CTM", "LSTM", "states", "shared"),
    "parity": ("CTM", "LSTM"),
}
SHORTER = (1, 2, 4)
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ENOUGH = 0.8  # the threshold at which ticks are compared over pictures; the paper's
NOISE, HIDDEN, HARDER = (0.0, 0.5, 1.0, 2.0), (0.0, 0.2, 0.4, 0.6), 2000


class Plan(NamedTuple):
    """How long a training is, and where runs are kept."""

    steps: dict[str, int]
    folder: Path
    tiny: bool = False

    def run(self, task: str, arm: str, rate: float, seed: int) -> Run:
        return Run(task, arm, rate, seed, self.steps[task], self.folder, 100 if self.tiny else 10_000)

    @property
    def seeds(self) -> tuple[int, ...]:
        return SEEDS[:2] if self.tiny else SEEDS


def sweep(plan: Plan, task: str, arm: str) -> dict[float, float]:
    """Rate -> share of right answers on what was held out for it, the best of them not at the edge."""
    return grown(
        lambda rate: carry_out(plan.run(task, arm, rate, SWEEP_SEED))["tune"], GRID[: 1 if plan.tiny else None], best_of
    )


def carry_out_all(plan: Plan) -> dict[str, Any]:
    """Every run of the plan, and what came of it."""
    sweeps, compared, rates = [], {}, {}
    for task, arms in ARMS.items():
        of: dict[str, list[dict[str, Any]]] = {}
        for arm in arms:
            found = sweep(plan, task, arm)
            rates[task, arm] = best_of(found)
            sweeps.append({"task": task, "arm": arm, "rate": best_of(found), "tune": found})
            of[arm] = [carry_out(plan.run(task, arm, best_of(found), seed)) for seed in plan.seeds]
        compared[task] = {
            "steps": plan.steps[task],
            "arms": {arm: summed_up(runs) for arm, runs in of.items()},
            "CTM less": {
                arm: difference(*([run["test"] for run in of[name]] for name in ("CTM", arm)))
                for arm in arms
                if arm != "CTM"
            },
        }
        if task == "fashion":
            trained_ticks = {str(n): shorter(plan, rates, "CTM", n) for n in SHORTER}
            one_tick_lstm = shorter(plan, rates, "LSTM", 1)
    runs = {
        arm: [plan.run("fashion", arm, rates["fashion", arm], seed) for seed in plan.seeds] for arm in ARMS["fashion"]
    }
    models = {arm: [run.model() for run in of_arm] for arm, of_arm in runs.items()}
    test = Inputs(*(half[: 100 if plan.tiny else None] for half in parts_of("fashion")["test"]))
    return {
        "sweeps": sweeps,
        "compared": compared,
        "trained_ticks": trained_ticks,
        "one_tick_lstm": one_tick_lstm,
        "stopping": {arm: [stopping(model, test) for model in of_arm] for arm, of_arm in models.items()},
        "harder": {arm: [harder(model, test) for model in of_arm] for arm, of_arm in models.items()},
        "ticks_and_doubt": [ticks_and_doubt(*pair, test) for pair in zip(models["CTM"], models["LSTM"])],
        "longer": {arm: [longer(model, test) for model in of_arm] for arm, of_arm in models.items()},
    }


def shorter(plan: Plan, rates: dict[tuple[str, str], float], arm: str, ticks: int) -> dict[str, Any]:
    """An arm trained on fashion with fewer ticks, at its rate for all ticks."""
    rate = rates["fashion", arm]
    return summed_up([carry_out(plan.run("fashion", f"{arm}, {ticks} ticks", rate, seed)) for seed in plan.seeds])


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's shares of right answers, seed by seed, and over ticks."""
    return {
        "rate": runs[0]["rate"],
        "parameters": runs[0]["parameters"],
        "seeds": [run["seed"] for run in runs],
        "mean": round(mean(run["test"] for run in runs), 4),
        **{key: [run[key] for run in runs] for key in ("test", "by_tick", "certainty_by_tick", "loss")},
    }


def stopping(model: nn.Module, test: Inputs) -> list[dict[str, float]]:
    """For each threshold: mean ticks, the share right, and the share right with the ticks dealt at random."""
    thoughts = think(model, test)
    table = right(thoughts, test.y)
    rows = []
    for threshold in THRESHOLDS:
        found = (round(x, 4) for x in stopped(thoughts, table, threshold))
        rows.append({"threshold": threshold, **dict(zip(("ticks", "right", "dealt"), found))})
    return rows


def noisy(x: Tensor, level: float) -> Tensor:
    """Pictures with noise of a standard deviation added; one draw for all levels."""
    return x + level * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))


def hidden(x: Tensor, share: float, patch: int = 4) -> Tensor:
    """Pictures with a share of their patches at the mean; what one share hides a larger one hides too."""
    cells = patchify(x, patch)
    order = torch.rand(cells.shape[:2], generator=torch.Generator().manual_seed(6)).argsort(1).argsort(1)
    out = order < round(share * cells.shape[1])
    return unpatchify(cells.masked_fill(out[..., None], 0.0), patch, x.shape[-1])


def harder(model: nn.Module, test: Inputs) -> dict[str, list[dict[str, float]]]:
    """Ticks needed and right answers, for pictures with more and more noise, and with more and more hidden."""

    def row(x: Tensor) -> dict[str, float]:
        thoughts = think(model, Inputs(x, y))
        ticks = stopping_ticks(thoughts.certainties, ENOUGH)
        return {
            "ticks": round(ticks.float().mean().item(), 4),
            "sure": round((thoughts.certainties.amax(1) >= ENOUGH).float().mean().item(), 4),
            "right": round(surest(thoughts, right(thoughts, y)).mean().item(), 4),
        }

    x, y = test.x[:HARDER], test.y[:HARDER]
    return {
        "noise": [{"level": level, **row(noisy(x, level))} for level in NOISE],
        "hidden": [{"level": share, **row(hidden(x, share))} for share in HIDDEN],
    }


def ticks_and_doubt(ctm: nn.Module, lstm: nn.Module, test: Inputs) -> dict[str, float]:
    """Rank correlations of one model's ticks with the other's doubt; and ticks where the CTM is right or wrong."""
    of = {"CTM": think(ctm, test), "LSTM": think(lstm, test)}
    ticks = {arm: stopping_ticks(thoughts.certainties, ENOUGH).float() for arm, thoughts in of.items()}
    doubt = {arm: 1 - thoughts.certainties.amax(1) for arm, thoughts in of.items()}
    correct = surest(of["CTM"], right(of["CTM"], test.y)).bool()
    return {
        "CTM's ticks, LSTM's doubt": round(rank_correlation(ticks["CTM"], doubt["LSTM"]), 4),
        "LSTM's ticks, CTM's doubt": round(rank_correlation(ticks["LSTM"], doubt["CTM"]), 4),
        "CTM's ticks where right": round(ticks["CTM"][correct].mean().item(), 4),
        "CTM's ticks where wrong": round(ticks["CTM"][~correct].mean().item(), 4),
    }


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, equal values sharing the mean of their ranks."""
    ranks = []
    for x in (a, b):
        _, where, count = x.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[where].double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def longer(model: nn.Module, test: Inputs) -> dict[str, list[float]]:
    """The share right and the mean certainty at each of twice the ticks of the training."""
    thoughts = think(model, test, 2 * TICKS["fashion"])
    table = right(thoughts, test.y)
    return {
        "by_tick": [round(x, 4) for x in table.mean(0).tolist()],
        "certainty_by_tick": [round(x, 4) for x in thoughts.certainties.mean(0).tolist()],
    }


def store(model: nn.Module, file: Path) -> None:
    """Write the model's weights in float16, and its pairs as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: x.half() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    save_file(weights, file)
    file.chmod(0o644)


def load(file: Path) -> nn.Module:
    """The CTM that `store` wrote, in float32."""
    model = model_of("fashion", "CTM")
    model.load_state_dict({name: x.float() if x.is_floating_point() else x for name, x in load_file(file).items()})
    return model.eval()


def shipped(plan: Plan, rate: float, file: Path) -> dict[str, Any]:
    """Store the CTM of the first seed on fashion, and say what it is."""
    run = plan.run("fashion", "CTM", rate, plan.seeds[0])
    store(run.model(), file)
    test = parts_of("fashion")["test"]
    thoughts = think(load(file), test)
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "parameters": run.result()["parameters"],
        "seed": run.seed,
        "test": run.result()["test"],
        "test_as_stored": round(surest(thoughts, right(thoughts, test.y)).mean().item(), 4),
    }


def timings(rounds: int = 7) -> list[dict[str, Any]]:
    """Milliseconds of a training step without the optimiser, by ticks; the models take turns."""
    torch.set_num_threads(1)
    batch = draw("fashion", torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    names = [f"CTM, {n} ticks" for n in (*SHORTER, TICKS["fashion"])] + ["LSTM"]
    models = {name: model_of("fashion", name) for name in names}

    def step(model: nn.Module) -> None:
        model.zero_grad()
        thoughts = model(batch.x)
        two_tick_loss(thoughts.predictions, thoughts.certainties, batch.y).backward()

    times = alternate({name: partial(step, model) for name, model in models.items()}, rounds)
    return [
        {
            "name": name,
            "parameters": parameters(model),
            "milliseconds": round(1000 * median(times[name]), 2),
            "over_one_tick": ratio(times[name], times["CTM, 1 ticks"]),
        }
        for name, model in models.items()
    ]


def main(options: list[str]) -> None:
    if "--tiny" in options:
        with tempfile.TemporaryDirectory() as beside:
            carry_out_all(Plan(dict.fromkeys(STEPS, 2), Path(beside), tiny=True))
        return
    given = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    folder = given or cache_folder() / "runs" / "ctm"
    folder.mkdir(parents=True, exist_ok=True)
    figures = carry_out_all(Plan(STEPS, folder))
    rate = next(x["rate"] for x in figures["sweeps"] if (x["task"], x["arm"]) == ("fashion", "CTM"))
    figures["stored"] = shipped(Plan(STEPS, folder), rate, MODEL)
    figures["timings"] = timings()
    pictures = fashion("train").images[: len(parts_of("fashion")["train"].y)].float()
    setup = {
        "mean_and_deviation": [round(x, 4) for x in (pictures.mean().item(), pictures.std().item())],
        "features": FEATURES,
        "d_model": D_MODEL,
        "d_input": D_INPUT,
        "heads": HEADS,
        "memory": MEMORY,
        "pairs": PAIRS,
        "ticks": TICKS,
        "channels": CHANNELS,
        "bits": BITS,
        "batch": BATCH,
        "lstm_width": {task: lstm_width(task) for task in STEPS},
        "threshold": ENOUGH,
        "sweep_seed": SWEEP_SEED,
        "model": "tells the 10 classes of Fashion-MNIST (MIT licence, Zalando SE) apart, in grey pictures of 28 x 28 "
        "of mean 0 and deviation 1; trained from nothing by this benchmark; MIT licence",
        "training": f"AdamW, betas 0.9 and 0.95, decay {DECAY} on matrices, gradients clipped at 1; a tenth of the "
        "steps up, then along a cosine down to a tenth of the rate",
    }
    write("ctm", "nox -s bench -- ctm", figures, setup=setup)
