"""The selective scan on a GPU, forward and backward, against mamba-ssm's CUDA kernel, in one run.

Every case times ours and, where it can be imported, mamba-ssm's in turn, round by round, and keeps the ratio of the
rounds: the card is shared and its clock moves. Theirs gets its own layout, (B, D, L), made outside of the timing.
Beside each case stand two floors taken in the same run, which no kernel that computes the same can go below: the bytes
that must move at this card's copy bandwidth, and one exponential for each element, (b, l, d, n), at its measured rate.
"""

import torch
import triton
import triton.language as tl

from benchmarks.ceilings import ceilings, seconds
from benchmarks.record import ratio, write
from nondual.ops.selective_scan import selective_scan
from nondual.ops.selective_scan import triton as kernels

ROUNDS = 9
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def cases():
    """(name, batch, length, channels, states, dtype)."""
    yield "mamba", 8, 2048, 2048, 16, "bf16"
    yield "mamba", 8, 2048, 2048, 16, "fp32"
    yield "wide", 2, 2048, 5120, 16, "bf16"
    for length in (512, 8192, 32768):
        yield "length", 4, length, 2048, 16, "bf16"
    for length in (4096, 16384, 65536, 262144):
        yield "long, few channels", 1, length, 768, 16, "bf16"
    for states in (8, 32, 64):
        yield "states", 8, 2048, 2048, states, "bf16"


@triton.jit
def exp2_kernel(p_x, TURNS: tl.constexpr, BLOCK: tl.constexpr):
    """Nothing but exponentials, of numbers that stay near 0.64, eight chains in each thread."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    for _ in tl.range(0, TURNS):
        b_x = tl.exp2(-b_x)
    tl.store(p_x + o, b_x)


def exp2_rate() -> float:
    """Exponentials a second on this card, now."""
    turns, block, programs = 4096, 1024, 4096
    x = torch.rand(block * programs, device="cuda")
    took = min(seconds(lambda: exp2_kernel[(programs,)](x, TURNS=turns, BLOCK=block, num_warps=4), 10))
    return turns * block * programs / took


def mamba_ssm():
    """Their function, or why there is none."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except Exception as error:  # an extension built for another torch fails in ways of its own
        return None, str(error).splitlines()[0][:120]
    return selective_scan_fn, None


def inputs(batch: int, length: int, channels: int, states: int, dtype: torch.dtype) -> dict:
    """As Mamba's own initialisation makes them: A from -1 to -N, Δ from 0.001 to 0.1."""
    draw = {"device": "cuda", "dtype": dtype}
    steps = torch.rand(channels, device="cuda") * 4.6 - 6.9  # log Δ
    given = {
        "u": torch.randn(batch, length, channels, **draw),
        "delta": 0.5 * torch.randn(batch, length, channels, **draw),
        "A": -torch.arange(1.0, states + 1, device="cuda").expand(channels, -1).contiguous(),
        "B": torch.randn(batch, length, states, **draw),
        "C": torch.randn(batch, length, states, **draw),
        "D": torch.ones(channels, device="cuda"),
        "z": torch.randn(batch, length, channels, **draw),
        "delta_bias": steps.exp().expm1().log(),
    }
    return {name: x.requires_grad_() for name, x in given.items()}


def theirs(given: dict) -> dict:
    """The same numbers with time last, each contiguous."""
    timed = {name: given[name].detach().mT.contiguous() for name in ("u", "delta", "B", "C", "z")}
    own = {name: given[name].detach().clone() for name in ("A", "D", "delta_bias")}
    return {name: x.requires_grad_() for name, x in (timed | own).items()}


def measure(name, batch, length, channels, states, label, limits, exps) -> dict:
    given = inputs(batch, length, channels, states, DTYPES[label])
    y, _ = selective_scan(**given, delta_softplus=True, impl="triton")
    dy = torch.randn_like(y)
    everything = list(given.values())

    def ours():
        return selective_scan(**given, delta_softplus=True, impl="triton")

    def ours_without_gradient():
        with torch.no_grad():
            return ours()

    runs = {
        "forward": {"ours": ours_without_gradient},
        "forward, to be differentiated": {"ours": ours},
        "backward": {"ours": lambda: torch.autograd.grad(y, everything, dy, retain_graph=True)},
    }
    scan, refused = mamba_ssm()
    if scan is not None:
        try:
            turned = theirs(given)
            out = scan(**turned, delta_softplus=True)
            error = (out.detach().mT - y.detach()).abs().max().item() / y.detach().abs().max().item()
            if error > 0.02:
                raise RuntimeError(f"another result, off by {error:.3f} of the greatest")
            turned_dy, all_of_theirs = dy.mT.contiguous(), list(turned.values())

            def their_scan():
                return scan(**turned, delta_softplus=True)

            def their_scan_without_gradient():
                with torch.no_grad():
                    return their_scan()

            runs["forward"]["mamba_ssm"] = their_scan_without_gradient
            runs["forward, to be differentiated"]["mamba_ssm"] = their_scan
            runs["backward"]["mamba_ssm"] = lambda: torch.autograd.grad(
                out, all_of_theirs, turned_dy, retain_graph=True
            )
        except Exception as error:  # their kernel says no in many ways; which, is part of the table
            refused = str(error).splitlines()[0][:120]
    row = {
        "case": name,
        "batch": batch,
        "length": length,
        "channels": channels,
        "states": states,
        "dtype": label,
        "spans": {kernel: kernels.spans_of(given["u"], kernel) for kernel in ("forward", "backward")},
        "refused": refused,
    }
    elements = batch * length * channels
    for way, peers in runs.items():
        times = {peer: [] for peer in peers}
        for run in peers.values():
            run()
        for _ in range(ROUNDS):
            for peer, run in peers.items():
                times[peer] += seconds(run)
        took = sorted(times["ours"])
        median = took[len(took) // 2]
        # forward u, delta, z and y; backward u, delta, z and dy, and the gradients of the first three
        moved = elements * given["u"].element_size() * (7 if way == "backward" else 4)
        memory, unit = moved / (limits["copy_gbs"] * 1e9), elements * states / exps
        row[way] = {
            "ms": {"median": round(median * 1e3, 4), "low": round(took[len(took) // 4] * 1e3, 4),
                   "high": round(took[-1 - len(took) // 4] * 1e3, 4)},
            "memory_floor_ms": round(memory * 1e3, 4),
            "exponential_floor_ms": round(unit * 1e3, 4),
            "share_of_the_higher_floor": round(max(memory, unit) / median, 3),
            "speedup_over": {peer: ratio(taken, times["ours"]) for peer, taken in times.items() if peer != "ours"},
        }  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ours()[0], everything, dy)
    row["peak_mib_forward_and_backward"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return row


def main(options: list[str]) -> None:
    if not torch.cuda.is_available():
        print("selective_scan: passed over; it needs a CUDA device (selective_scan_compile needs none)")
        return
    limits, exps, rows = ceilings(), exp2_rate(), []
    for case in cases():
        if "--quick" in options and case[0] not in ("mamba", "long, few channels"):
            continue
        rows.append(measure(*case, limits, exps))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    command = " ".join(["nox -s bench -- selective_scan", *options])
    figures = {"ceilings": limits | {"exp2_per_second": float(f"{exps:.4g}")}, "rows": rows}
    write("selective_scan", command, figures, device="cuda")
