"""Whether a state that selects copies letters at lengths that it was not trained at, beside a twin that does not.

Two letters among 14 blanks are to be named at the end, in order. Two Mamba blocks of width 24 learn it, and a
time-invariant twin of them, whose Δ, B and C are learned constants; both have the same examples in the same order.
Each has its rate chosen from a grid that grows, by the loss at the trained length, with two seeds kept for that. Then
eight paired seeds are trained, and asked at that length, at twice and at four times.

    nox -s bench -- selection           a few minutes of one core
    nox -s bench -- selection --tiny    a few steps; writes nothing
"""

from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.heads_trained import difference
from benchmarks.record import write
from benchmarks.sweeps import grown, lowest
from nondual.efficient_attention.mamba import Mamba
from nondual.tasks import selective_copying
from nondual.training import optimiser, train

RATES, CHOOSING, SEEDS = (0.02, 0.04), (101, 102), tuple(range(1, 9))
LENGTH, LONGER, STEPS, WIDTH, LETTERS, ASKED = 16, (1, 2, 4), 250, 24, 6, 500


class TimeInvariant(Mamba):
    """The same block, in which nothing is selected: Δ, B and C are learned constants."""

    def __init__(self, d_model: int, **sizes: Any):
        super().__init__(d_model, **sizes)
        self.B, self.C = (nn.Parameter(torch.randn(self.d_inner, self.d_state)) for _ in range(2))

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Steps from their bias alone, and the constants."""
        return torch.zeros_like(u), self.B, self.C


MODELS = {"selective": Mamba, "time-invariant": TimeInvariant}


class Residual(nn.Sequential):
    """Its modules in turn, added to the input."""

    def forward(self, x: Tensor) -> Tensor:
        """x and what the modules make of it."""
        return x + super().forward(x)


def copying(name: str, rate: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Trained with this seed: the loss on new examples of the trained length, and the share of letters named right
    there and at each longer length."""
    torch.manual_seed(seed)
    blocks = [Residual(nn.RMSNorm(WIDTH), MODELS[name](WIDTH, d_state=8)) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(8, WIDTH), *blocks, nn.RMSNorm(WIDTH), nn.Linear(WIDTH, LETTERS))

    def examples(generator: torch.Generator, rows: int = 32, length: int = LENGTH) -> tuple[Tensor, Tensor]:
        return selective_copying(rows, length, tokens=2, vocabulary=LETTERS, generator=generator)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0])[:, -2:].mT, batch[1])

    train(model, loss, examples, optimiser=optimiser(model, rate), steps=steps, seed=seed)
    fresh = [examples(torch.Generator().manual_seed(1000), ASKED, times * LENGTH) for times in LONGER]
    with torch.no_grad():
        right = [(model(ids)[:, -2:].argmax(-1) == answers).float().mean().item() for ids, answers in fresh]
        return {"seed": seed, "loss": round(loss(fresh[0]).item(), 5), "right": [round(each, 4) for each in right]}


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    steps, choosing, seeds = (3, (101,), (1, 2, 3)) if tiny else (STEPS, CHOOSING, SEEDS)
    torch.set_num_threads(1)  # models this small train faster on one
    found = {}
    for name in tqdm(MODELS, desc="models"):
        tried = grown(
            lambda rate, name=name: mean(copying(name, rate, seed, steps)["loss"] for seed in choosing),
            RATES[:1] if tiny else RATES,
        )
        rate = lowest(tried)
        runs = [copying(name, rate, seed, steps) for seed in seeds]
        found[name] = {
            "rates": {f"{each:g}": round(loss, 5) for each, loss in tried.items()},
            "rate": rate,
            "runs": runs,
        }
    right = [zip(*(run["right"] for run in model["runs"])) for model in found.values()]  # by length, a number a seed
    gaps = [{"times": times, **difference(ours, theirs)} for times, ours, theirs in zip(LONGER, *right)]
    if tiny:
        print([row["times"] for row in gaps])
        return
    write(
        "selection",
        "nox -s bench -- selection",
        {"models": found, "selective less time-invariant": gaps},
        setup={"length": LENGTH, "steps": STEPS, "width": WIDTH, "asked": ASKED},
    )
