"""Time and peak memory of block-sparse attention on a CPU, beside torch's fused kernel with all pairs and with a mask.

- "all pairs": torch's scaled_dot_product_attention without a mask.
- "causal": the same with is_causal, which leaves out most of the pairs of a query and a later key.
- "dense mask": the same with the pattern's mask, boolean (N, N).
- "tiles": `sparse_attention(impl="tiles")` over the tiles that the pattern keeps, by the loop in C. Its lists are made
  beforehand; what that takes is measured by itself.
- "tiles in torch": the same as it runs without a C compiler.

All on one thread with the same inputs. Time is processor time, in the program and in the system for it; the runs take
turns in one process, and each round gives the ratios. The ideal is the time of all pairs in the same round times the
density, which is the share of the scores that lies in kept tiles. For memory each case runs in a process of its own,
forked from one that has loaded everything and computed nothing: its peak is what it held above its inputs; the ideal is
that of all pairs, which holds results and gradients and no table.
"""

import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.record import ratio, write
from benchmarks.scaling import growth

B, H, D = 1, 4, 64
LENGTHS = (4096, 8192)
WINDOW_LENGTHS = (2048, 4096, 8192, 16384, 32768)
ROUNDS = 5
SMALL, TALL = (64, 64), (256, 64)
PATTERNS = (
    "local(256) | sinks(4)",
    "local(1024)",
    "blocks(1024)",
    "strided(128)",
    "fixed(256, 16)",
    "local(256) | global_tokens(8) | random_blocks(3)",
)
OTHERS = (("local(1024)", TALL, H), ("blocks(1024)", TALL, H), ("local(1024)", SMALL, 1))
"""Pattern, tile and key/value heads of the cases beside those with small tiles and a key/value head for each query
head: taller tiles, and one key/value head for all query heads, so that a call has more rows."""


class Case(NamedTuple):
    """What is computed: a pattern, the tile, the number of key/value heads, N, and whether the backward pass too."""

    pattern: str
    block: tuple[int, int]
    groups: int
    n: int
    backward: bool


def pattern_of(name: str):
    """The pattern that a name of `PATTERNS` is."""
    from nondual.efficient_attention import sparse_attention as patterns

    return eval(name, {key: getattr(patterns, key) for key in patterns.__dict__ if not key.startswith("_")})


def inputs(case: Case) -> list:
    import torch

    draw = torch.Generator().manual_seed(0)
    heads = (H, case.groups, case.groups)
    return [torch.randn(B, h, case.n, D, generator=draw, requires_grad=case.backward) for h in heads]


def engine(name: str, case: Case) -> Callable:
    """One attention of (q, k, v); the mask or the lists are made here."""
    import torch.nn.functional as F

    from nondual.ops.sparse_attention import sparse_attention

    grouped = case.groups != H
    if name == "all pairs":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if name == "causal":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if name == "dense mask":
        mask = pattern_of(case.pattern).mask(case.n)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    lists = pattern_of(case.pattern).block_mask(case.n, block=case.block)
    return lambda q, k, v: sparse_attention(q, k, v, lists, impl="tiles")


NAMES = ("all pairs", "causal", "dense mask", "tiles", "tiles in torch")


def timed(name: str, run: Callable, given: list) -> float:
    """Seconds of one run, of the processor: forward, and backward where the inputs require gradients."""
    import torch

    os.environ["NONDUAL_CPU_SPARSE"] = "torch" if name == "tiles in torch" else ""
    start = time.process_time()
    out = run(*given)
    if given[0].requires_grad:
        torch.autograd.grad(out, given, given[0].detach())
    return time.process_time() - start


def compared(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of each engine in each round, the engines taking turns."""
    runs, given = {name: engine(name, case) for name in NAMES}, inputs(case)
    for name in ("tiles", "tiles in torch"):
        timed(name, runs[name], given)
    found = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(timed(name, run, given))
    return found


def peak(name: str, case: Case) -> float:
    """The most that one run holds above its inputs and its mask, in mebibytes."""
    small = case._replace(n=2 * case.block[0])
    timed(name, engine(name, small), inputs(small))  # what is made once in a process
    given, run = inputs(case), engine(name, case)
    ctypes.CDLL(None).malloc_trim(0)  # what making the mask has freed goes back to the system,
    Path("/proc/self/clear_refs").write_text("5")  # and its peak is forgotten
    before = _status("VmRSS")
    timed(name, run, given)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """What Linux says of this process, in mebibytes: what it holds (VmRSS), or the most it has held (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def listing(case: Case) -> dict[str, float | int]:
    """What a BlockMask holds, and how long it takes to make one."""
    from nondual.efficient_attention.sparse_attention import work
    from nondual.ops.sparse_attention.block_mask import TENSORS

    start = time.process_time()
    lists = pattern_of(case.pattern).block_mask(case.n, block=case.block)
    seconds = time.process_time() - start
    counted = work(lists, D)
    return {
        "density": round(lists.density, 5),
        "allowed": round(counted.allowed / counted.all, 5),
        "kept_tiles": lists.kept_tiles,
        "tile_masks": len(lists.tile_masks),
        "kib": round(sum(getattr(lists, x).nbytes for x in TENSORS) / 1024, 1),
        "milliseconds": round(1000 * seconds, 1),
    }


def alone(function: Callable, *arguments):
    """The function's result, from a forked process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def window(n: int, rounds: int) -> list[float]:
    """Seconds of a window of 1,024, forward and backward."""
    case = Case("local(1024)", SMALL, H, n, True)
    run, given = engine("tiles", case), inputs(case)
    timed("tiles", run, given)
    return [timed("tiles", run, given) for _ in range(rounds)]


def measured(case: Case, rounds: int, memory: bool) -> dict:
    """One case of the figures."""
    lists, seconds = alone(listing, case), alone(compared, case, rounds)
    ideal = [full * lists["density"] for full in seconds["all pairs"]]
    found = {
        **case._asdict(),
        **lists,
        "of_ideal": ratio(seconds["tiles"], ideal),
        "of_ideal_in_torch": ratio(seconds["tiles in torch"], ideal),
        "of_all_pairs": ratio(seconds["tiles"], seconds["all pairs"]),
        "of_causal": ratio(seconds["tiles"], seconds["causal"]),
        "of_dense_mask": ratio(seconds["tiles"], seconds["dense mask"]),
        "seconds": {name: round(median(times), 4) for name, times in seconds.items()},
    }
    if memory:
        found["peak_mib"] = {name: round(alone(peak, name, case), 2) for name in NAMES}
    print(found, flush=True)
    return found


def main(options: list[str]) -> None:
    import torch

    from nondual.ops.sparse_attention import compiled

    torch.set_num_threads(1)
    alone(listing, Case(PATTERNS[0], SMALL, H, 128, False))
    engine("tiles", Case(PATTERNS[0], SMALL, H, 128, False))  # loaded here, once for all that are forked,
    assert compiled.library(torch.empty(0)), "a C compiler is needed for the loop that is measured"  # as is the loop
    wanted = [(pattern, SMALL, H) for pattern in PATTERNS]
    if "--brief" in options:
        for given in (*wanted, *OTHERS):
            measured(Case(*given, 512, True), 2, False)
        return
    cases = [
        measured(Case(*given, n, backward), ROUNDS, n == LENGTHS[-1])
        for n in LENGTHS
        for given in ((*wanted, *OTHERS) if n == LENGTHS[-1] else wanted[:2])
        for backward in (False, True)
    ]
    seconds = [median(alone(window, n, ROUNDS)) for n in WINDOW_LENGTHS]
    peaks = [alone(peak, "tiles", Case("local(1024)", SMALL, H, n, True)) for n in WINDOW_LENGTHS]
    lines = {
        "pattern": "local(1024)",
        "n": WINDOW_LENGTHS,
        "seconds": [round(x, 4) for x in seconds],
        "growth": [round(x, 2) for x in growth(WINDOW_LENGTHS, seconds)],
        "peak_mib": [round(x, 1) for x in peaks],
    }
    print(lines)
    write(
        "sparse_cpu",
        "nox -s bench -- sparse_cpu",
        {"cases": cases, "window": lines},
        shape={"B": B, "H": H, "D": D, "dtype": "float32", "threads": 1},
    )
