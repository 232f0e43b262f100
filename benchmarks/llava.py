"""One linear layer between a frozen image tower and a frozen language model: does it write the names of new pictures?

The tower's vector of a picture, 128 numbers, becomes one vector of SmolLM2's width and stands in the text as a token.
Only the projector is trained. benchmarks/captions.py has pictures, training and what is asked. The plan:

    linear       one linear layer, as in the first LLaVA
    MLP          two layers with GELU between, as in 1.5, for as many steps
    deaf         as linear, but each caption is trained with the picture of another: what names alone teach
    untrained    the linear layer as it starts

The rate of each of the first two is chosen of RATES by the loss on 100 other concepts, with one seed and SWEEP_STEPS
steps; deaf takes that of linear. Then SEEDS, which fix first weights and batches alike for all arms.

The first seed's linear layer goes to docs/assets/models/llava.safetensors in float16, for the chapter and its tests.

    nox -s bench -- llava           some ten minutes of one core
    nox -s bench -- llava --tiny    two steps of two runs, which writes nothing
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from benchmarks.captions import (
    BATCH,
    SHORTLIST,
    VIEWS,
    Captions,
    Run,
    Task,
    captions,
    carry_out,
    difference,
    language_model,
    shares,
    summed_up,
)
from benchmarks.record import MEASURED, write
from nondual.multimodal.llava import Llava, Projector
from nondual.store import cache_folder

STEPS, SWEEP_STEPS, SWEEP_SEED, SEEDS = 100, 40, 0, (1, 2)
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
MARK, BEGIN, D_IMAGE = -200, 1, 128
MODEL = MEASURED.parent / "assets" / "models" / "llava.safetensors"


def made(arm: str) -> Llava:
    """An untrained model of an arm."""
    model, _ = language_model()
    projector = Projector(D_IMAGE, model.embeddings.embedding_dim, layers=2 if arm == "MLP" else 1)
    return Llava(nn.Identity(), model, projector, mark=MARK, d_vision=D_IMAGE)


TASK = Task(made, [BEGIN, MARK], True, lambda model: {}, lambda model, data: {})


class Plan:
    """The runs, in the order in which they are made."""

    def __init__(self, folder: Path, steps: int = STEPS, sweep: int = SWEEP_STEPS, tiny: bool = False):
        self.folder, self.steps, self.sweep_steps = folder, steps, sweep
        self.rates, self.seeds = (RATES[:1], SEEDS[:1]) if tiny else (RATES, SEEDS)

    def run(self, arm: str, rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
        asked = "tune" if steps else "all" if seed == self.seeds[0] else "losses"
        return carry_out(Run("llava", arm, rate, seed, steps or self.steps, self.folder, asked), TASK)

    def sweep(self, arm: str) -> dict[float, float]:
        """The loss on the concepts to choose on, at each rate."""
        return {rate: self.run(arm, rate, SWEEP_SEED, self.sweep_steps)["tune"] for rate in self.rates}

    def best(self, arm: str) -> float:
        """The rate with the lowest."""
        found = self.sweep("linear" if arm == "deaf" else arm)
        return min(found, key=lambda rate: found[rate])

    def untrained(self) -> dict[str, Any]:
        """The linear layer as it starts."""
        return carry_out(Run("llava", "untrained", 0.0, self.seeds[0], 0, self.folder, "all"), TASK)


def ship(plan: Plan) -> None:
    """Store the linear layer of the first seed."""
    rate = plan.best("linear")
    trained = Run("llava", "linear", rate, plan.seeds[0], plan.steps, plan.folder, "all").file.with_suffix(".pt")
    weights = torch.load(trained, weights_only=True)
    MODEL.write_bytes(save({name.removeprefix("projector.linear1."): w.half() for name, w in weights.items()}))


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny and folder is None:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "captions"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    plan = Plan(folder, 2, 1, True) if tiny else Plan(folder)
    arms = ("linear", "deaf", "MLP")
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in plan.seeds:  # all arms of a seed first, so that what was stopped early has whole pairs
        for arm in arms:
            results[arm].append(plan.run(arm, plan.best(arm), seed))
    untrained, data = plan.untrained(), captions(folder)
    if not tiny:
        ship(plan)
        record(plan, results, untrained, data)


def record(plan: Plan, results: dict[str, list[dict[str, Any]]], untrained: dict[str, Any], data: Captions) -> None:
    """Write what was found to docs/measured."""
    figures = {
        "arms": {
            **{arm: summed_up(runs, data) for arm, runs in results.items()},
            "untrained": summed_up([untrained], data),
        },
        "sweep": {arm: {str(rate): x for rate, x in plan.sweep(arm).items()} for arm in ("linear", "MLP")},
        "linear - deaf": difference(results["linear"], results["deaf"]),
        "linear - MLP": difference(results["linear"], results["MLP"]),
        "linear - untrained": difference(results["linear"][:1], [untrained]),
        "CLIP's nearest name": shares(data, data.clip.tolist()),
    }
    write(
        "llava", "nox -s bench -- llava", figures, threads=1, batch=BATCH, views=VIEWS, shortlist=SHORTLIST,
        pictures=len(data.train), test=len(data.test), steps=plan.steps, sweep_steps=plan.sweep_steps,
        seeds={"rate": SWEEP_SEED, "compared": list(SEEDS)},
    )  # fmt: skip
