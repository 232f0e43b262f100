"""Time and memory against N of every mechanism of the arc, as layers of one width: x (1, N, E) -> (1, N, E), causal.

    GRU            a state of E numbers, one step after another; and an output projection
    additive       each pair of positions compared by a hidden layer of E units (2014), within one sequence
    dense          scores, softmax and mixing over the whole table of N x N (2017)
    window         the last 256 positions, in tiles of 64 (2019); its list of tiles is made beforehand
    fixed          Child et al.'s fixed pattern (2019), in tiles of 64: the own stretch, and the last position of each
                   earlier one; stretches of 8 sqrt(N), which keeps the fewest tiles
    linear         elu + 1 of queries and keys, and the normaliser (2020), by chunks
    flash          the same result as dense, the table never held (2022): on a CPU torch's fused kernel
    gated          linear attention with a decay for each head and step, by chunks
    delta          linear attention with the delta rule, by chunks
    Mamba          E -> 2E channels of 16 states; our scan in C
    Mamba-2        E -> 2E channels in heads of 64, 128 states, by chunks

All on one thread, float32, one sequence. Time is processor time, in the program and in the system for it. Two passes:
forward, and forward with backward. First each case runs in a process of its own, forked from one that has loaded
everything and computed nothing: its peak is what the process held above its input. A mechanism stops at the first
length for which its time or peak, carried on at its last growth, would pass SECONDS or MOST. Then ROUNDS rounds over
all cases in one process, so that a busy machine slows all alike: growth, slopes and ratios are taken within a round.

    nox -s bench -- evolution

Peaks and rounds are kept as they end, in `runs/evolution` of the cache folder or in --runs=FOLDER.
"""

import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.record import keep, write
from benchmarks.scaling import peak_mib, slope

E, HEADS, TILE, WINDOW = 128, 2, 64, 256
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SECONDS, MOST, ROUNDS = 6.0, 4000, 3  # of one run with its backward; in MiB
SHORTEST = 0.04  # seconds: a shorter case is run again until so much has passed, and the median taken
PASSES = ("forward", "training")
SPARSE = ("window", "fixed")
NAMES = (
    "GRU",
    "additive",
    "dense",
    "window",
    "fixed",
    "linear",
    "flash",
    "gated",
    "delta",
    "Mamba",
    "Mamba-2",
)


# --- the mechanisms ------------------------------------------------------------------------------------------------


def layer(name: str, n: int) -> Any:
    """The module of a mechanism for N positions."""
    import torch
    from torch import nn

    from nondual.attention_mechanism import AdditiveAttention
    from nondual.efficient_attention.flash_attention import FlashAttention
    from nondual.efficient_attention.mamba import Mamba
    from nondual.efficient_attention.mamba2 import Mamba2
    from nondual.ops import masks
    from nondual.ops.attention import attention
    from nondual.ops.linear_attention import linear_attention
    from nondual.ops.sparse_attention import sparse_attention
    from nondual.recurrent import GRU, Recurrent
    from nondual.self_attention import MultiHeadAttention

    class Additive(nn.Module):
        """Every position asks, and all positions up to its own answer."""

        def __init__(self) -> None:
            super().__init__()
            self.attend, self.out = AdditiveAttention(E, E, E), nn.Linear(E, E)

        def forward(self, x):
            return self.out(self.attend(x, x, masks.causal(x.shape[1]))[0])

    class Linear(nn.Module):
        """The four projections of an attention layer, and what a gate or the delta rule needs besides."""

        def __init__(self, gate: bool = False, delta: bool = False) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
            self.gate = nn.Linear(E, HEADS) if gate else None
            self.beta = nn.Linear(E, HEADS) if delta else None

        def forward(self, x):
            q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            q, k = (
                (nn.functional.elu(y) + 1 for y in (q, k))
                if self.beta is None
                else (q, nn.functional.normalize(k, dim=-1))
            )
            decay = None if self.gate is None else nn.functional.logsigmoid(self.gate(x)).mT
            beta = None if self.beta is None else self.beta(x).sigmoid().mT
            plain = self.gate is None and self.beta is None
            out, _ = linear_attention(q, k, v, log_decay=decay, beta=beta, normalise=plain, impl="chunked")
            return self.out(out.transpose(1, 2).flatten(-2))

    def sparse():
        mask = tiles(name, n)
        op = lambda q, k, v, **_: sparse_attention(q, k, v, mask, impl="tiles")  # noqa: E731
        return MultiHeadAttention(E, HEADS, causal=True, op=op)

    torch.manual_seed(0)
    made: dict[str, Callable[[], Any]] = {
        "GRU": lambda: Recurrent(E, GRU(E, E)),
        "additive": Additive,
        "dense": lambda: MultiHeadAttention(E, HEADS, causal=True, op=partial(attention, impl="reference")),
        "window": sparse,
        "fixed": sparse,
        "linear": Linear,
        "flash": lambda: MultiHeadAttention(E, HEADS, causal=True, op=FlashAttention()),
        "gated": lambda: Linear(gate=True),
        "delta": lambda: Linear(delta=True),
        "Mamba": lambda: Mamba(E),
        "Mamba-2": lambda: Mamba2(E),
    }
    return made[name]()


@functools.cache
def tiles(name: str, n: int) -> Any:
    """The tiles that a sparse pattern keeps; found by a process of its own, so that no memory of that is left here."""
    return pickle.loads(alone(listed, name, n))


def listed(name: str, n: int) -> bytes:
    """What `tiles` gives, pickled."""
    from nondual.efficient_attention.sparse_attention import fixed, local

    stretch = TILE * max(1, round(8 * math.sqrt(n) / TILE))
    pattern = {"window": lambda: local(WINDOW), "fixed": lambda: fixed(stretch)}[name]()
    return pickle.dumps(pattern.block_mask(n, n, TILE))


def drawn(n: int) -> Any:
    import torch

    return torch.randn(1, n, E, generator=torch.Generator().manual_seed(0), requires_grad=True)


def timed(module: Any, x: Any, which: str) -> float:
    """Processor seconds of one pass."""
    import torch

    start = time.process_time()
    with torch.set_grad_enabled(which == "training"):
        y = module(x)
        if which == "training":
            torch.autograd.grad(y.sum(), [x, *module.parameters()])
    return time.process_time() - start


# --- peaks, and where each stops -----------------------------------------------------------------------------------


def one(name: str, n: int, which: str) -> dict[str, float]:
    """A case in a process of its own: its seconds, and its peak in MiB above the input."""
    timed(layer(name, 2 * TILE), drawn(2 * TILE), which)  # what is made once in a process
    module, x = layer(name, n), drawn(n)
    before = peak_mib()
    seconds = timed(module, x, which)
    return {"seconds": seconds, "peak": peak_mib() - before}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a forked process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def reached(name: str, folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Its cases up to the length at which it stops, and what stops it there: time, memory or nothing."""
    rows: list[dict[str, Any]] = []
    for n in LENGTHS:
        if len(rows) > 1:
            (before, last) = (row["training"] for row in rows[-2:])
            for what, most, why in (("seconds", SECONDS, "time"), ("peak", MOST, "memory")):
                if last[what] * min(4.5, last[what] / max(before[what], 1e-9)) > most:
                    return rows, why
        file = folder / f"peak_{name}_{n}.json"
        if not file.exists():
            if name in SPARSE:
                tiles(name, n)  # made here, so that its making does not count
            keep(file, {which: alone(one, name, n, which) for which in PASSES})
        rows.append({"n": n, **json.loads(file.read_text())})
        print(name, rows[-1], flush=True)
    return rows, None


# --- rounds --------------------------------------------------------------------------------------------------------


def round_of(cases: dict[str, list[int]], warm: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of every case, by mechanism, pass and length; all of one length in turn."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {which: {} for which in PASSES} for name in cases}
    for n in LENGTHS:
        x = drawn(n)
        for name in (name for name in cases if n in cases[name]):
            module = layer(name, n)
            for which in PASSES:
                if warm or n < 4096:
                    timed(module, x, which)
                runs = [timed(module, x, which)]
                while sum(runs) < SHORTEST:
                    runs.append(timed(module, x, which))
                found[name][which][str(n)] = median(runs)
            del module
            gc.collect()
    return found


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """The median of the rounds, the least and the greatest."""
    ordered = sorted(values)
    return {
        "median": rounded(median(ordered), digits),
        "low": rounded(ordered[0], digits),
        "high": rounded(ordered[-1], digits),
    }


def rounded(x: float, digits: int) -> float:
    """To so many significant digits."""
    return float(f"{x:.{digits}g}")


def crossing(lengths: list[int], ratios: list[float]) -> float | None:
    """The N from which a ratio stays below 1, on logarithmic scales between two lengths; None where it does not.

    The shortest length where it is below 1 everywhere.
    """
    if ratios[-1] >= 1:
        return None
    last = max((i for i, ratio in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return float(lengths[0])
    a, b = math.log(ratios[last]), math.log(ratios[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** (a / (a - b))


def curves(rounds: list[dict[str, Any]], peaks: dict[str, Any]) -> list[dict[str, Any]]:
    """For each mechanism and pass: milliseconds, growth at each doubling, slopes, and ratios to flash."""
    found = []
    for name, (rows, why) in peaks.items():
        lengths = [row["n"] for row in rows]
        for which in PASSES:
            times = [[one_round[name][which][str(n)] for n in lengths] for one_round in rounds]
            flash = [[one_round["flash"][which].get(str(n)) for n in lengths] for one_round in rounds]
            shared = [n for n, theirs in zip(lengths, flash[0]) if theirs]
            over = [[a / b for a, b in zip(ours, theirs) if b] for ours, theirs in zip(times, flash)]
            peak = [row[which]["peak"] for row in rows]
            case = {
                "name": name,
                "pass": which,
                "n": lengths,
                "stopped_by": why,
                "milliseconds": [spread([1000 * t for t in at]) for at in zip(*times)],
                "growth": [spread([b / a for a, b in zip(*pair)]) for pair in doublings(times)],
                "time_slope": spread([slope(lengths, row) for row in times]),
                "peak_mib": [round(x, 2) for x in peak],
                "memory_slope": round(slope(lengths, peak), 2),
            }
            if name != "flash":
                crossings = [crossing(shared, row) for row in over]
                case["over_flash"] = [spread(list(at)) for at in zip(*over)]
                case["over_flash_n"] = shared
                case["quicker_in_all_rounds_from"] = crossing_in_all(shared, over)
                case["crosses_flash"] = spread([c for c in crossings if c]) if all(crossings) else None
            found.append(case)
    return found


def doublings(times: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """For each pair of neighbouring lengths, the times of all rounds at the one and at the other."""
    columns = [list(at) for at in zip(*times)]
    return list(itertools.pairwise(columns))


def crossing_in_all(lengths: list[int], over: list[list[float]]) -> int | None:
    """The first measured length from which on it is quicker in every round; None where there is none."""
    slower = [i for i, at in enumerate(zip(*over)) if max(at) >= 1]
    first = slower[-1] + 1 if slower else 0
    return lengths[first] if first < len(lengths) else None


def main(options: list[str]) -> None:
    import torch

    from nondual.store import cache_folder

    folder = next((Path(o.removeprefix("--runs=")) for o in options if o.startswith("--runs=")), None)
    folder = folder or cache_folder() / "runs" / "evolution"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    parameters = {
        name: sum(p.numel() for p in layer(name, 2 * TILE).parameters()) for name in NAMES
    }  # and all is loaded
    peaks = {name: reached(name, folder) for name in NAMES}
    cases = {name: [row["n"] for row in rows] for name, (rows, _) in peaks.items()}
    rounds = []
    for number in range(ROUNDS):
        file = folder / f"round_{number}.json"
        if not file.exists():
            load = os.getloadavg()[0]
            keep(file, {**round_of(cases, warm=number == 0), "load": round(load, 2)})
            print("round", number, flush=True)
        rounds.append(json.loads(file.read_text()))
    kept = {name: [round(tiles(name, n).kept_tiles * TILE * TILE / n, 1) for n in cases[name]] for name in SPARSE}
    figures = {"curves": curves(rounds, peaks), "parameters": parameters, "computed_pairs_for_each_position": kept}
    figures["load_at_each_round"] = [one_round["load"] for one_round in rounds]
    bounds = {"seconds": SECONDS, "peak_mib": MOST}
    shape = {"B": 1, "E": E, "H": HEADS, "window": WINDOW, "tile": TILE, "dtype": "float32", "threads": 1}
    write("evolution", "nox -s bench -- evolution", figures, rounds=ROUNDS, stopped_past=bounds, shape=shape)
