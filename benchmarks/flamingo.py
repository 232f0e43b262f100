"""Gated layers in a frozen language model that look at pictures of emoji: what they learn, and what the gates are for.

The tower's 16 vectors of a picture become R tokens, which gated layers before layers 15, 20 and 25 of SmolLM2 attend
to. Resampler and gated layers are trained. benchmarks/captions.py has pictures, training and what is asked. The plan:

    gated        every gate starts at 0
    ungated      the same without gates: both terms count in full from the first step
    gated deaf   as gated, but each caption is trained with the picture of another: what names alone teach

The rate of gated and of ungated is chosen of RATES by the loss on 100 other concepts, with one seed and SWEEP_STEPS
steps; deaf takes that of gated. Then SEEDS, which fix first weights and batches alike for all arms.

    nox -s bench -- flamingo           some ten minutes of one core
    nox -s bench -- flamingo --tiny    two steps of three runs, which writes nothing
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.captions import (
    BATCH,
    FULL_STOP,
    SHORTLIST,
    VIEWS,
    Captions,
    Run,
    Task,
    captions,
    carry_out,
    difference,
    language_model,
    nats,
    shares,
    summed_up,
)
from benchmarks.clip_judge import interval
from benchmarks.record import write
from nondual.multimodal.flamingo import Flamingo, PerceiverResampler
from nondual.store import cache_folder

STEPS, SWEEP_STEPS, SWEEP_SEED, SEEDS = 120, 40, 0, (1, 2)
RATES = (1e-3, 3e-3)
BEGIN, D_IMAGE, LATENTS = 1, 128, 4
BEFORE = (15, 20, 25)
"""Layers of the language model, from 0, that a gated layer stands before; no gradient is needed below the first."""


def made(arm: str) -> Flamingo:
    """An untrained model of an arm. Its mark is SmolLM2's first token, which begins every text."""
    resampler = PerceiverResampler(D_IMAGE, LATENTS, n_layers=1, n_heads=4, d_head=32)
    return Flamingo(
        nn.Identity(), language_model()[0], resampler, mark=BEGIN, d_vision=D_IMAGE, before=BEFORE, n_heads=4,
        d_head=64, d_ff=576, gated=arm != "ungated",
    )  # fmt: skip


def opened(model: Flamingo) -> dict[str, float]:
    """tanh of every gate."""
    return {
        f"{what} {before}": float(gate)
        for before, layer in zip(model.before, model.gated_layers)
        for what, gate in zip(("attention", "feed-forward"), layer.openness())  # pyright: ignore[reportCallIssue]
    }


@torch.no_grad()
def swapped(model: Flamingo, data: Captions) -> dict[str, Any]:
    """Two pictures and two captions in a row: how the loss of each caption rises when either picture is another's.

    The test concepts in pairs; a swapped picture is that of the next pair. [mean, low, high] over pairs, in nats a
    caption, and the largest change of any single loss.
    """
    half = len(data.test) // 2
    first, second = data.test[:half].tolist(), data.test[half : 2 * half].tolist()
    lengths = [(len(data.tokens[a]) + 1, len(data.tokens[b]) + 1) for a, b in zip(first, second)]
    rows = [[BEGIN, *data.tokens[a], FULL_STOP, BEGIN, *data.tokens[b], FULL_STOP] for a, b in zip(first, second)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [FULL_STOP] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for row, each, (a, b) in zip(labels, rows, lengths):
        row[1 : 1 + a] = torch.tensor(each[1 : 1 + a])
        row[2 + a : 2 + a + b] = torch.tensor(each[2 + a : 2 + a + b])
    own = [data.patches[data.pictures[0, which], 0] for which in (first, second)]

    def loss(pictures: list[Tensor]) -> Tensor:
        each = nats(model, ids, torch.stack(pictures, 1).flatten(0, 1), labels)  # (half, N - 1)
        place = torch.arange(longest - 1)
        until = torch.tensor([a for a, _ in lengths])[:, None]
        return torch.stack([(each * (place < until)).sum(1), (each * (place >= until)).sum(1)])

    usual = loss(own)
    found: dict[str, Any] = {}
    for k, name in enumerate(("first", "second")):
        others = [x.roll(1, 0) if i == k else x for i, x in enumerate(own)]
        change = loss(others) - usual
        found[f"{name} picture swapped"] = {
            f"{caption} caption": {"interval": interval(x), "largest": float(x.abs().max())}
            for caption, x in zip(("first", "second"), change)
        }
    return found


TASK = Task(made, [BEGIN], False, opened, lambda model, data: {"swapped": swapped(model, data)})


class Plan:
    """The runs, in the order in which they are made."""

    def __init__(self, folder: Path, steps: int = STEPS, sweep: int = SWEEP_STEPS, tiny: bool = False):
        self.folder, self.steps, self.sweep_steps = folder, steps, sweep
        self.rates, self.seeds = (RATES[:1], SEEDS[:1]) if tiny else (RATES, SEEDS)

    def run(self, arm: str, rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
        asked = "tune" if steps else "all" if seed == self.seeds[0] else "losses"
        return carry_out(Run("flamingo", arm, rate, seed, steps or self.steps, self.folder, asked), TASK)

    def sweep(self, arm: str) -> dict[float, float]:
        """The loss on the concepts to choose on, at each rate."""
        return {rate: self.run(arm, rate, SWEEP_SEED, self.sweep_steps)["tune"] for rate in self.rates}

    def best(self, arm: str) -> float:
        """The rate with the lowest."""
        found = self.sweep(arm.removesuffix(" deaf"))
        return min(found, key=lambda rate: found[rate])


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny and folder is None:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "captions"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    plan = Plan(folder, 2, 1, True) if tiny else Plan(folder)
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ("gated", "gated deaf", "ungated")}
    for seed in plan.seeds:  # all arms of a seed first, so that what was stopped early has whole pairs
        for arm, runs in results.items():
            runs.append(plan.run(arm, plan.best(arm), seed))
    if not tiny:
        record(plan, results, captions(folder))


def record(plan: Plan, results: dict[str, list[dict[str, Any]]], data: Captions) -> None:
    """Write what was found to docs/measured."""
    figures = {
        "arms": {arm: summed_up(runs, data) for arm, runs in results.items()},
        "sweep": {arm: {str(rate): x for rate, x in plan.sweep(arm).items()} for arm in ("gated", "ungated")},
        "gated - deaf": difference(results["gated"], results["gated deaf"]),
        "gated - ungated": difference(results["gated"], results["ungated"]),
        "swapped": {arm: runs[0]["swapped"] for arm, runs in results.items()},
        "CLIP's nearest name": shares(data, data.clip.tolist()),
    }
    write(
        "flamingo", "nox -s bench -- flamingo", figures, threads=1, batch=BATCH, views=VIEWS, shortlist=SHORTLIST,
        pictures=len(data.train), test=len(data.test), steps=plan.steps, sweep_steps=plan.sweep_steps,
        before=list(BEFORE), latents=LATENTS, seeds={"rate": SWEEP_SEED, "compared": list(SEEDS)},
    )  # fmt: skip
