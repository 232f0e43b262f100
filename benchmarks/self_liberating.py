"""Self-liberating attention, by the protocol of docs/measured/protocol.md, section 2: what `proposals` does not ask.

Five models of `proposals` read Shakespeare in windows of 128 characters: with queries and keys normalised and no more;
with forget gates; with scores that persist over depth; with both; with gates and no positions. The rate of each is
chosen as there, with the same seeds, and what `proposals` has already trained is read and not trained again. Then:

    loss at places 1 to 1,024 of held-out text     half-life of every head
    certified streams over 8,192 characters: keys kept, worst error beside the bound, bytes held, and the loss

    nox -s bench -- self_liberating               all of it
    nox -s bench -- self_liberating --seeds=3     with the first three of the paired seeds
    nox -s bench -- self_liberating --tiny        a few steps of everything; writes nothing

A run is kept as it ends in `runs/self_liberating` of the cache folder, so that the plan goes on where it was stopped.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.intervals import by_seeds
from benchmarks.proposals import CHOOSING, RATES, SEEDS, compared
from benchmarks.proposals_run import Run as Training
from benchmarks.proposals_run import carry_out as trained
from benchmarks.record import values_of, write
from benchmarks.self_liberating_run import ARMS, EPSILONS, LONG, STREAM, STREAMED, STRETCH, Run, carry_out
from benchmarks.sweeps import grown, lowest
from nondual.store import cache_folder

CONTROL = "normalised"
STRETCHES = {"1 to 128": (0, 128), "129 to 256": (128, 256), "257 to 512": (256, 512), "513 to 1,024": (512, 1024)}


def chosen(
    arm: str, folder: Path, *, rates: Sequence[float], seeds: Sequence[int], steps: int | None
) -> dict[str, Any]:
    """The rates tried, by the mean outcome of the choosing seeds, and the best of them."""

    def value_at(rate: float) -> float:
        return mean(trained(Training("Shakespeare", arm, rate, seed, steps, folder))["outcome"] for seed in seeds)

    tried = grown(value_at, rates, lowest, beyond=4)
    rate = lowest(tried)
    return {
        "rates": {f"{each:g}": round(value, 4) for each, value in tried.items()},
        "rate": rate,
        "inside": min(tried) < rate < max(tried),
    }


# --- what the runs say -----------------------------------------------------------------------------------------------


def over(stretch: tuple[int, int], found: dict[str, Any], reading: str) -> float:
    """Mean bits of one run at places from one to another."""
    first, last = (each // STRETCH for each in stretch)
    return mean(found["by_position"][reading][first:last])


def interval(each: Sequence[float]) -> dict[str, Any]:
    """The mean of one value a seed with its 95 % interval, where there are three to eight."""
    known = by_seeds(each)
    return {
        "mean": round(mean(each), 5),
        "interval": None if known is None else [round(known[1], 5), round(known[2], 5)],
        "each": [round(one, 5) for one in each],
    }


def losses(runs: dict[str, list[dict[str, Any]]], stretch: tuple[int, int]) -> dict[str, Any]:
    """Bits of each arm in one stretch of places; what each has over the control; and the two mechanisms by themselves.

    A difference above 0 means fewer bits. Each mechanism is taken with the other and without it, in the mean.
    """
    bits = {arm: [over(stretch, found, "one window") for found in of] for arm, of in runs.items()}
    anew = {arm: [over(stretch, found, "windows of 128") for found in of] for arm, of in runs.items()}
    quads = list(zip(*(bits[arm] for arm in ARMS[:4])))  # neither, decay, persistence, both
    return {
        "bits": {arm: interval(of) for arm, of in bits.items()},
        "less than windows of 128": {arm: interval([a - b for a, b in zip(anew[arm], bits[arm])]) for arm in runs},
        "against the control": {arm: compared(of, bits[CONTROL], True) for arm, of in bits.items() if arm != CONTROL},
        "decay": interval([(plain + depth - time - both) / 2 for plain, time, depth, both in quads]),
        "persistence": interval([(plain + time - depth - both) / 2 for plain, time, depth, both in quads]),
        "together more than apart": interval([time + depth - plain - both for plain, time, depth, both in quads]),
    }


def heads(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Half-lives by arm and layer, over all heads and seeds."""
    out: dict[str, Any] = {}
    for arm, found in runs.items():
        rows = [row for each in found for row in each.get("gates", ())]
        for layer in sorted({row["layer"] for row in rows}):
            lives = sorted(row["half_life"] for row in rows if row["layer"] == layer)
            out.setdefault(arm, {})[f"layer {layer}"] = {
                "heads": len(lives),
                "median": round(median(lives), 2),
                "least": lives[0],
                "most": lives[-1],
                "each": lives,
            }
    return out


def promises(runs: dict[str, list[dict[str, Any]]], epsilons: Sequence[float]) -> dict[str, Any]:
    """Over all seeds and layers of an arm, for each ε: what was kept, how far off, and what it did to the loss."""
    out: dict[str, Any] = {}
    for arm in STREAMED:
        found = [each for each in runs[arm] if "streams" in each]
        for epsilon in (f"{each:g}" for each in epsilons):
            streams = [each["streams"][epsilon] for each in found]
            layers = [layer for stream in streams for layer in stream["layers"]]
            if not layers:
                continue
            halves = [(max(k[: len(k) // 2]), max(k[len(k) // 2 :])) for k in (of["kept_by_part"] for of in layers)]
            out.setdefault(arm, {})[epsilon] = {
                "streams": len(streams),
                "outputs_within": all(layer["within"] for layer in layers),
                "worst_error": max(layer["worst_error"] for layer in layers),
                "worst_share_of_promise": max(layer["worst_share_of_promise"] for layer in layers),
                "kept_mean": round(mean(layer["kept_mean"] for layer in layers), 1),
                "kept_most": max(layer["kept_most"] for layer in layers),
                "most_in_second_half_over_first": round(max(second / first for first, second in halves), 3),
                "all_as_the_rule": all(layer["as_the_rule"] for layer in layers),
                "bytes_most": max(max(layer["bytes"]) for layer in layers),
                "bits_moved_most": max(abs(s["bits"] - each["exact_bits"]) for s, each in zip(streams, found)),
            }
    return out


# --- the plan --------------------------------------------------------------------------------------------------------


def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    given = values_of(options)
    if "--tiny" in options:
        with tempfile.TemporaryDirectory() as apart:
            small = {"steps": 3, "long": 256, "rows": 2, "stream": 40, "epsilons": (1e-1, 1e-3)}
            carried_out(Path(apart), Path(apart), (1, 2), rates=(0.003,), choosing=(101,), **small)
        return
    seeds = SEEDS[: int(given.get("seeds", len(SEEDS)))]
    runs = cache_folder() / "runs"
    figures = carried_out(runs / "self_liberating", runs / "proposals", seeds)
    setup = {"seeds": list(seeds), "choosing": list(CHOOSING), "context": 128, "long": LONG, "stream": STREAM}
    write("self_liberating", "nox -s bench -- self_liberating", figures, setup=setup)


def carried_out(
    folder: Path,
    trained_in: Path,
    seeds: Sequence[int],
    *,
    rates: Sequence[float] = RATES,
    choosing: Sequence[int] = CHOOSING,
    steps: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Choose the rates, train and measure, and lay out what was found."""
    rate = {arm: chosen(arm, trained_in, rates=rates, seeds=choosing, steps=steps) for arm in tqdm(ARMS, desc="rates")}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in tqdm(seeds, desc="seeds"):
        for arm in ARMS:
            runs[arm].append(carry_out(Run(arm, rate[arm]["rate"], seed, folder, trained_in, steps, **more)))
    long = more.get("long", LONG)
    return {
        "rates": rate,
        "losses": {name: losses(runs, of) for name, of in STRETCHES.items() if of[1] <= long},
        "half_lives": heads(runs),
        "streams": promises(runs, more.get("epsilons", EPSILONS)),
        "runs": {arm: [shorter(found) for found in of] for arm, of in runs.items()},
    }


def shorter(found: dict[str, Any]) -> dict[str, Any]:
    """A run without its learning curve, and without what `promises` has summed up."""
    out = copy.deepcopy(found)
    out["trained"] = {key: value for key, value in found["trained"].items() if key not in ("loss", "curve")}
    for stream in out.get("streams", {}).values():
        for layer in stream["layers"]:
            del layer["kept_by_part"]
    return out
