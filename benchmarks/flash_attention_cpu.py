"""Time and peak memory of attention against N on a CPU: our engines, torch's fused kernel, and the textbook's table.

- "textbook": two products with torch's softmax between them, in float32. Its causal mask is made in the first run only.
- "auto": `flash_attention` as a user on a CPU calls it. For these shapes it hands the work to torch's fused kernel.
- "reference": `flash_attention(impl="reference")`, the tiles written out in plain torch.
- "fused": torch's scaled_dot_product_attention, called directly.

All on one thread with the same inputs. Time is processor time, in the program and in the system for it, so that other
work on the machine counts for less; the engines take turns in one process, and each round gives a ratio. For memory
each case runs in a process of its own, forked from one that has loaded everything and computed nothing: its peak is
what the process held above its inputs. The slope of a curve on logarithmic scales tells the power of N: 2 for a table,
at most about 1 where none is kept.
"""

import functools
import math
import multiprocessing
import time
from statistics import median

from benchmarks.record import write
from benchmarks.scaling import peak_mib, slope

B, H, D = 1, 4, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SECONDS, MOST, FEWEST = 5.0, 15, 3  # of a comparison: rounds until so many seconds have passed, at most and at least


def engines(n: int, causal: bool) -> dict:
    """Each attention of (q, k, v) by its name."""
    import torch
    import torch.nn.functional as F

    from nondual.ops.flash_attention import flash_attention

    @functools.cache
    def hidden():
        return torch.ones(n, n, dtype=torch.bool).triu_(1)

    def textbook(q, k, v):
        scores = (q / math.sqrt(D)) @ k.mT
        if causal:
            scores.masked_fill_(hidden(), -torch.inf)
        return scores.softmax(-1) @ v

    return {
        "textbook": textbook,
        "auto": lambda q, k, v: flash_attention(q, k, v, causal=causal),
        "reference": lambda q, k, v: flash_attention(q, k, v, causal=causal, impl="reference"),
        "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }


ENGINES = ("textbook", "auto", "reference", "fused")


def inputs(n: int, backward: bool) -> list:
    import torch

    draw = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, n, D, generator=draw, requires_grad=backward) for _ in range(3)]


def timed(run, given: list, backward: bool) -> float:
    """Seconds of one run, of the processor."""
    import torch

    start = time.process_time()
    out = run(*given)
    if backward:
        torch.autograd.grad(out.sum(), given)
    return time.process_time() - start


def peak(engine: str, n: int, backward: bool, causal: bool) -> float:
    """The most that one run holds above its inputs, in mebibytes."""
    timed(engines(64, causal)[engine], inputs(64, backward), backward)  # what is made once in a process
    run, given = engines(n, causal)[engine], inputs(n, backward)
    before = peak_mib()
    timed(run, given, backward)
    return peak_mib() - before


def compared(n: int, backward: bool, causal: bool) -> dict[str, list[float]]:
    """How many times as long the textbook takes as each engine, for each round, the engines taking turns."""
    for run in engines(64, causal).values():
        timed(run, inputs(64, backward), backward)
    runs, given, rounds = engines(n, causal), inputs(n, backward), []
    if causal:
        timed(runs["textbook"], given, backward)  # its mask
    start = time.process_time()
    while len(rounds) < FEWEST or (len(rounds) < MOST and time.process_time() - start < SECONDS):
        rounds.append({name: timed(run, given, backward) for name, run in runs.items()})
    return {name: [one["textbook"] / one[name] for one in rounds] for name in runs} | {
        "seconds": [one["textbook"] for one in rounds]
    }


def alone(function, *arguments):
    """The function's result, from a forked process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(options: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    engines(1, causal=False)  # loaded here, once for all that are forked
    cases = []
    for backward in (False, True):
        for causal in (False, True):
            ratios = [alone(compared, n, backward, causal) for n in LENGTHS]
            for engine in ENGINES:
                peaks = [alone(peak, engine, n, backward, causal) for n in LENGTHS]
                case = {
                    "engine": engine,
                    "backward": backward,
                    "causal": causal,
                    "n": LENGTHS,
                    "peak_mib": [round(x, 2) for x in peaks],
                    "memory_slope": round(slope(LENGTHS, peaks), 2),
                    "times_as_fast": [round(median(row[engine]), 2) for row in ratios],
                    "low": [round(min(row[engine]), 2) for row in ratios],
                    "high": [round(max(row[engine]), 2) for row in ratios],
                }
                if engine == "textbook":
                    case["rounds"] = [len(row["seconds"]) for row in ratios]
                    case["milliseconds"] = [round(1000 * median(row["seconds"]), 2) for row in ratios]
                cases.append(case)
                print(case, flush=True)
    write(
        "flash_attention_cpu",
        "nox -s bench -- flash_attention_cpu",
        {"cases": cases},
        shape={"B": B, "H": H, "D": D, "dtype": "float32", "threads": 1},
    )
