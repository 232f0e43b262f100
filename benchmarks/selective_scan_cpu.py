"""The selective scan on a CPU, forward and with its backward: ours against the two that run without a GPU.

Ours is impl="cpu", compiled and in plain torch. Theirs are the scan of transformers' Mamba without its kernels
(`mamba_selective_scan`, which discretises, loops over time and multiplies by C) and the parallel scan of mambapy with
the same before and after it. All on one thread, with the same inputs and nothing but u, delta, A, B, C and D. Time is
processor time, in the program and in the system for it, so that other work on the machine counts for less.

Ratios are taken in one process, in rounds in which all take turns. For the curves each case runs in a process of its
own, forked from one that has loaded everything and computed nothing: its time is the least of its runs, and its peak
is what its first run held above its inputs. The backward of transformers' loop takes time quadratic in L, since each
step's slice has a gradient as long as what it was cut from; it is measured up to 512.
"""

import math
import multiprocessing
import os
import time
from statistics import median

from benchmarks.record import ratio, write
from benchmarks.scaling import growth, peak_mib, slope

B, D, N = 2, 512, 16
SECONDS = 1.5  # for the runs of a case of a curve
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
LONGEST = {  # by engine, forward and with the backward
    "ours": (16384, 16384),
    "ours in torch": (16384, 16384),
    "transformers": (8192, 512),
    "mambapy": (8192, 8192),
}


def engines() -> dict:
    """Each scan of (u, delta, A, B, C, D), time before channels, to y."""
    import torch
    from mambapy.pscan import pscan
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    from nondual.ops.selective_scan import selective_scan

    def ours(*inputs):
        os.environ["NONDUAL_CPU_SCAN"] = ""
        return selective_scan(*inputs, impl="cpu")[0]

    def in_torch(*inputs):
        os.environ["NONDUAL_CPU_SCAN"] = "torch"
        return selective_scan(*inputs, impl="cpu")[0]

    def transformers(u, delta, A, B, C, D):
        return mamba_selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D=D).mT

    def mambapy(u, delta, A, B, C, D):
        step = delta[..., None]
        hs = pscan(torch.exp(step * A), step * B[:, :, None] * u[..., None])
        return (hs @ C[..., None]).squeeze(3) + D * u

    return {"ours": ours, "ours in torch": in_torch, "transformers": transformers, "mambapy": mambapy}


def inputs(length: int, backward: bool) -> list:
    """What a trained layer is given: steps of 0.001 to 0.1, and A = -(1 … N)."""
    import torch

    draw = torch.Generator().manual_seed(0)
    u, B_, C_ = (torch.randn(B, length, width, generator=draw) for width in (D, N, N))
    delta = torch.rand(B, length, D, generator=draw).mul_(math.log(100)).sub_(math.log(1000)).exp_()  # no more memory
    A = -torch.arange(1.0, N + 1).repeat(D, 1)
    return [x.requires_grad_(backward) for x in (u, delta, A, B_, C_, torch.ones(D))]


def timed(engine, given: list, backward: bool) -> float:
    """Seconds of one run, of the processor."""
    import torch

    start = time.process_time()
    with torch.set_grad_enabled(backward):
        y = engine(*given)
        if backward:
            torch.autograd.grad(y.sum(), given)
    return time.process_time() - start


def one(engine: str, length: int, backward: bool) -> dict:
    """A case of a curve: seconds (the least of its runs) and the peak in MiB above the inputs."""
    run = engines()[engine]
    timed(run, inputs(64, backward), backward)  # what is made once in a process
    given = inputs(length, backward)
    before = peak_mib()
    seconds = timed(run, given, backward)
    peak = peak_mib() - before
    times = [seconds]
    while len(times) < 200 and sum(times) < SECONDS:
        times.append(timed(run, given, backward))
    return {"seconds": min(times), "peak_mib": peak}


def floor(length: int) -> float:
    """Seconds of one torch.add of tensors like u and delta into one like y: the least time to move their numbers."""
    import torch

    u, delta = inputs(length, False)[:2]
    y, times = torch.empty_like(u), []
    while len(times) < 200 and sum(times) < SECONDS:
        start = time.process_time()
        torch.add(u, delta, out=y)
        times.append(time.process_time() - start)
    return min(times)


def compared(length: int, backward: bool, names: tuple[str, ...], rounds: int) -> dict:
    """How many times as long as ours each takes, the runs taking turns: ratios of the rounds."""
    runs, given = engines(), inputs(length, backward)
    for name in ("ours", *names):
        timed(runs[name], inputs(64, backward), backward)
    times = {name: [] for name in ("ours", *names)}
    for _ in range(rounds):
        times["ours"].append(median(timed(runs["ours"], given, backward) for _ in range(3)))
        for name in names:
            times[name].append(timed(runs[name], given, backward))
    return {name: ratio(times[name], times["ours"]) for name in names}


def alone(function, *arguments):
    """The function's result, from a forked process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def main(options: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    engines()  # loaded here, once for all that are forked
    ratios = []
    for length, backward, names, rounds in (
        (2048, False, ("transformers", "mambapy", "ours in torch"), 7),
        (1024, True, ("mambapy", "ours in torch"), 5),
        (512, True, ("transformers",), 1),
        (8192, True, ("mambapy", "ours in torch"), 2),
    ):
        over = alone(compared, length, backward, names, rounds)
        ratios.append({"n": length, "backward": backward, "rounds": rounds, "over_ours": over})
        print(ratios[-1], flush=True)
    curves = []
    for backward in (False, True):
        for engine, longest in LONGEST.items():
            lengths = [n for n in LENGTHS if n <= longest[backward]]
            rows = [alone(one, engine, n, backward) for n in lengths]
            seconds, peaks = ([row[what] for row in rows] for what in ("seconds", "peak_mib"))
            case = {"engine": engine, "backward": backward, "n": lengths, "peak_mib": [round(x, 1) for x in peaks]}
            case["milliseconds"] = [round(1000 * x, 1) for x in seconds]
            case["growth"] = [round(x, 2) for x in growth(lengths, seconds)]
            case |= {"memory_slope": round(slope(lengths, peaks), 2), "time_slope": round(slope(lengths, seconds), 2)}
            if engine == "ours" and not backward:
                least = [alone(floor, n) for n in lengths]
                case["floor_ms"] = [round(1000 * x, 2) for x in least]
                case["floor_growth"] = [round(x, 2) for x in growth(lengths, least)]
            curves.append(case)
            print(case, flush=True)
    write(
        "selective_scan_cpu",
        "nox -s bench -- selective_scan_cpu",
        {"ratios": ratios, "curves": curves},
        shape={"B": B, "D": D, "N": N, "dtype": "float32", "threads": 1},
    )
