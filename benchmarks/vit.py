"""A Vision Transformer beside a convolutional network of its size, trained here on more and more pictures.

Pictures, models and augmentation are those of benchmarks/vit_run.py. The plan, written before the first run:

    rates     at 300 and at 55,000 pictures of fashion and at all 1,197 of digits, without augmentation and with one
              seed, from three rates each, which are extended by factors of two until the best is not at the edge. The
              rate with the highest share of right answers on pictures held out for this is taken; that of 300
              pictures serves 2,000 too, that of 55,000 serves 12,000, and both serve augmented pictures.
    sizes     fashion with 300, 2,000, 12,000 and 55,000 pictures, plain and augmented: five seeds at the ends, three
              between. Always 500 steps of 64 pictures, so that only the number of different pictures varies.
    longer    55,000 pictures, augmented and (added later) plain, 2,000 steps, three seeds: whether the order is that
              of a short training.
    shuffled  55,000 pictures, plain, the patches of all pictures in one other order, five seeds. The one difference is
              the place of the patches: a Vision Transformer is told of none beforehand, a convolution builds on it.
    pixels    the same, and the pixels inside every patch in one other order too. For a Vision Transformer this only
              renames the columns of its first matrix. (Added when shuffled patches had cost the convolutional network
              less than one point: what lies inside a patch was as it had been.)
    digits    1,197 pictures, plain and shifted, 300 steps, five seeds.

A seed fixes which pictures are trained on, their order and how they are augmented, so that the two models are paired by
it. Seeds that are reported had no part in choosing a rate. All pictures of the test set are scored once, at the end.

    nox -s bench -- vit           some twelve minutes of one idle core
    nox -s bench -- vit --tiny    a few steps of a few runs, which writes nothing

A run is kept as it ends, in `runs/vit` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import copy
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.heads_trained import difference
from benchmarks.record import alternate, ratio, write
from benchmarks.sweeps import grown
from benchmarks.sweeps import highest as best_of
from benchmarks.vit_run import (
    BATCH,
    CHANNELS,
    DECAY,
    HEADS,
    LAYERS,
    STRIDES,
    TUNE,
    WIDTH,
    Run,
    carry_out,
    model_of,
    task_of,
    vit,
)
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention
from nondual.store import cache_folder

ARMS = ("ViT", "CNN")
GRID = {"ViT": (1e-3, 2e-3, 4e-3), "CNN": (2e-3, 4e-3, 8e-3)}
SIZES = (300, 2000, 12_000, 55_000)
FEW, MANY = SIZES[0], SIZES[-1]
SWEEP_SEED, SEEDS, BETWEEN = 0, (1, 2, 3, 4, 5), (1, 2, 3)
STEPS, LONGER, OF_DIGITS = 500, 2000, 300


class Plan(NamedTuple):
    """How many pictures there are, how long a training is, and where runs are kept."""

    sizes: tuple[int, ...]
    digits: int
    steps: dict[str, int]
    folder: Path
    tiny: bool = False

    def run(self, task: str, arm: str, count: int, augmented: bool, rate: float, seed: int, kind: str) -> Run:
        return Run(task, arm, count, augmented, rate, seed, self.steps[kind], self.folder, 200 if self.tiny else 10_000)

    def swept_at(self, task: str, count: int) -> int:
        """The number of pictures whose sweep gives the rate for `count` of them."""
        if task == "digits":
            return count
        return self.sizes[0] if count <= self.sizes[len(self.sizes) // 2 - 1] else self.sizes[-1]


def full_plan(folder: Path) -> Plan:
    """The plan at the head of this file."""
    steps = {"fashion": STEPS, "longer": LONGER, "digits": OF_DIGITS}
    return Plan(SIZES, len(task_of("digits").train.y), steps, folder)


def sweep(plan: Plan, task: str, arm: str, count: int) -> dict[float, float]:
    """Rate -> share of right answers on the pictures held out for it, the best of them not at the edge."""
    return grown(
        lambda rate: carry_out(plan.run(task, arm, count, False, rate, SWEEP_SEED, task))["tune"],
        GRID[arm][: 1 if plan.tiny else None],
        best_of,
    )


def cells(plan: Plan) -> list[tuple[str, str, int, bool, str, tuple[int, ...]]]:
    """What is compared: (kind, task, pictures, augmented, suffix of the arm, seeds), what matters most first."""
    few, many = plan.sizes[0], plan.sizes[-1]
    both = (False, True)
    table = [("fashion", "fashion", count, False, "", SEEDS) for count in (many, few)]
    table += [("fashion", "fashion", many, False, suffix, SEEDS) for suffix in (", shuffled", ", shuffled pixels")]
    table += [("fashion", "fashion", count, True, "", SEEDS) for count in (few, many)]
    table += [("longer", "fashion", many, augmented, "", BETWEEN) for augmented in (True, False)]
    between = plan.sizes[1:-1]
    table += [("fashion", "fashion", count, augmented, "", BETWEEN) for count in between for augmented in both]
    table += [("digits", "digits", plan.digits, augmented, "", SEEDS) for augmented in both]
    return table


def carry_out_all(plan: Plan) -> dict[str, Any]:
    """Every run of the plan, and what came of it: the sweeps, and for each cell both arms and their difference."""
    rates: dict[tuple[str, str, int], float] = {}
    sweeps = []
    for task, count in (("fashion", plan.sizes[0]), ("fashion", plan.sizes[-1]), ("digits", plan.digits)):
        for arm in ARMS:
            found = sweep(plan, task, arm, count)
            rates[task, arm, count] = best_of(found)
            sweeps.append({"task": task, "arm": arm, "pictures": count, "rate": best_of(found), "tune": found})
    compared, table = [], cells(plan)
    for i, (kind, task, count, augmented, suffix, seeds) in enumerate(table):
        start = time.perf_counter()
        of: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for seed in seeds[: 1 if plan.tiny else None]:
            for arm in ARMS:
                rate = rates[task, arm, plan.swept_at(task, count)]
                of[arm].append(carry_out(plan.run(task, arm + suffix, count, augmented, rate, seed, kind)))
        compared.append(
            {
                "kind": suffix.removeprefix(", ") or kind,
                "pictures": count,
                "augmented": augmented,
                "steps": plan.steps[kind],
                **{arm: summed_up(runs) for arm, runs in of.items()},
                "ViT - CNN": difference(*([run["test"] for run in of[arm]] for arm in ARMS))
                if len(seeds) > 2
                else None,
            }
        )
        print(f"{i + 1} of {len(table)} comparisons, the last in {time.perf_counter() - start:.0f} s", flush=True)
    return {"sweeps": sweeps, "compared": compared}


def summed_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's shares of right answers, seed by seed."""
    return {
        "rate": runs[0]["rate"],
        "parameters": runs[0]["parameters"],
        "seeds": [run["seed"] for run in runs],
        "mean": round(mean(run["test"] for run in runs), 4),
        "test": [run["test"] for run in runs],
        "trained_on": [run["trained_on"] for run in runs],
        "test_loss": [run["test_loss"] for run in runs],
    }


def multiply_adds(arm: str, task: str) -> int:
    """Of one picture, forward."""
    of = task_of(task)
    return counted(model_of(arm, of), of.test.x[:1])


def counted(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of a forward pass, as torch counts them: it does not count inside of its own fused attention."""
    plain = copy.deepcopy(model).eval()
    for layer in plain.modules():
        if isinstance(layer, MultiHeadAttention):
            layer.op = partial(attention, impl="reference")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(x)
    return counter.get_total_flops() // 2


def timings(rounds: int = 9) -> list[dict[str, Any]]:
    """Of one training step without the optimiser: multiply-adds of a picture, and milliseconds of a batch.

    The ViT with smaller and smaller patches, and the CNN; the models take turns.
    """
    torch.set_num_threads(1)
    task = task_of("fashion")
    x, y = task.test.x[:BATCH], task.test.y[:BATCH]
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {f"ViT, patch {patch}": vit(28, patch) for patch in (14, 7, 4, 2)}
    models["CNN"] = model_of("CNN", task)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    times = alternate({name: partial(step, model) for name, model in models.items()}, rounds)
    return [
        {
            "name": name,
            "tokens": None if name == "CNN" else 1 + (28 // int(name.split()[-1])) ** 2,
            "multiply_adds": counted(model, x[:1]),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "milliseconds": round(1000 * median(times[name]), 2),
            "over_patch_7": ratio(times[name], times["ViT, patch 7"]),
        }
        for name, model in models.items()
    ]


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        with tempfile.TemporaryDirectory() as beside:
            steps = {"fashion": 2, "longer": 2, "digits": 2}
            carry_out_all(Plan((20, 40), 30, steps, Path(beside), tiny=True))
        return
    folder = folder or cache_folder() / "runs" / "vit"
    folder.mkdir(parents=True, exist_ok=True)
    record(carry_out_all(full_plan(folder)))


def record(figures: dict[str, Any]) -> None:
    """Write what was found to docs/measured."""
    figures["multiply_adds"] = {task: {arm: multiply_adds(arm, task) for arm in ARMS} for task in ("fashion", "digits")}
    figures["timings"] = timings()
    setup = {
        "ViT": {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feed_forward": 2 * WIDTH, "patches": 16},
        "CNN": {"channels": CHANNELS, "strides": STRIDES},
        "held_out_for_rates": TUNE,
        "batch": BATCH,
        "sweep_seed": SWEEP_SEED,
        "training": f"AdamW, betas 0.9 and 0.95, decay {DECAY} on matrices, gradients clipped at 1; a tenth of the "
        "steps up, then along a cosine down to a tenth of the rate",
    }
    write("vit", "nox -s bench -- vit", figures, setup=setup)
