"""State space duality on a GPU, against mamba-ssm's chunked scan and fla-core's simple gated linear attention.

Every case times ours and each peer in turn, round by round, and keeps the ratio of the rounds: the card is shared and
its clock moves. Beside each case stands the share of this card's measured copy bandwidth at which the inputs and
outputs alone would pass. A peer that is missing, refuses a case, or gives another result is written down with its
reason.
"""

import torch
import torch.nn.functional as F

from benchmarks.ceilings import ceilings, seconds
from benchmarks.record import ratio, write
from nondual.ops.ssd import ssd

TOKENS = 16384  # in a batch, whatever the length
SIZES = {"mamba2 130m": (24, 64, 128), "mamba2 2.7b": (80, 64, 128), "wide state": (32, 64, 256)}  # H, P, N; one group


def cases():
    """(name, heads, channels, states, length, chunk): the grid of the table, and our chunks where they matter."""
    for name, (h, p, n) in SIZES.items():
        for length in (512, 2048, 8192, 65536):
            yield name, h, p, n, length, None
    for chunk in (64, 128, 256):
        yield f"chunk {chunk}", *SIZES["mamba2 130m"], 8192, chunk


def mamba_ssm():
    """mamba-ssm's own kernels for exactly this function."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(x, delta, A, B, C, D, bias):
        return mamba_chunk_scan_combined(
            x, delta, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True, return_final_states=True
        )

    return run


def fla():
    """fla-core's linear attention with one fade for each head: the step lengths are multiplied in outside."""
    from fla.ops.simple_gla import chunk_simple_gla

    def run(x, delta, A, B, C, D, bias):
        step = F.softplus(delta.float() + bias)
        k, q = (v.expand(-1, -1, x.shape[2], -1) for v in (B, C))
        v = (x * step[..., None]).to(x.dtype)
        y, state = chunk_simple_gla(q, k, v, g=step * A, scale=1.0, output_final_state=True)
        return y + D[:, None].to(x.dtype) * x, state.mT

    return run


def measure(name, h, p, n, length, chunk, limits, backward) -> dict:
    batch, dtype = max(1, TOKENS // length), torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(batch, length, h, p, device="cuda", dtype=dtype)
    delta = torch.randn(batch, length, h, device="cuda", dtype=dtype)
    B, C = (torch.randn(batch, length, 1, n, device="cuda", dtype=dtype) for _ in range(2))
    A, D, bias = -1 - 15 * torch.rand(h, device="cuda"), torch.ones(h, device="cuda"), torch.rand(h, device="cuda") - 4
    inputs = tuple(v.requires_grad_(backward) for v in (x, delta, A, B, C, D, bias))

    def ours(x, delta, A, B, C, D, bias):
        return ssd(x, delta, A, B, C, D, None, bias, True, chunk=chunk, impl="triton")

    truth = ours(*inputs)[0].detach().float()
    incoming = torch.randn_like(x)
    runs, refused = {}, {}
    for peer, make in {"ours": lambda: ours, "mamba_ssm": mamba_ssm, "fla": fla}.items():
        try:
            forward = make()
            y, _ = forward(*inputs)
            error = ((y.float() - truth).norm() / truth.norm()).item()
            if error > 0.02:
                raise RuntimeError(f"another result, off by {error:.3f} of its norm")
            if backward:
                runs[peer] = lambda y=y: torch.autograd.grad(y, inputs, incoming, retain_graph=True)
            else:
                runs[peer] = lambda forward=forward: forward(*inputs)
            runs[peer]()
        except Exception as error:  # a peer says no in many ways; which, is part of the table
            runs.pop(peer, None)
            refused[peer] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    times = {peer: [] for peer in runs}
    for _ in range(7):
        for peer, run in runs.items():
            times[peer] += seconds(run)
    best = min(times["ours"])
    moved = sum(v.numel() * v.element_size() for v in (x, delta, B, C)) + x.numel() * x.element_size()
    moved = moved * 2 if backward else moved  # with the gradients of all of them
    return {
        "case": name, "heads": h, "p": p, "n": n, "length": length, "batch": batch, "backward": backward,
        "ours_ms": round(best * 1e3, 4),
        "gb_per_s": round(moved / best / 1e9, 1),
        "share_of_copy": round(moved / best / 1e9 / limits["copy_gbs"], 3),
        "speedup_over": {peer: ratio(taken, times["ours"]) for peer, taken in times.items() if peer != "ours"},
        "refused": refused,
    }  # fmt: skip


def main(options: list[str]) -> None:
    if not torch.cuda.is_available():
        print("ssd: passed over; it needs a CUDA device")
        return
    limits, rows = ceilings(), []
    for backward in (False, True):
        for case in cases():
            if "--quick" in options and case[4] not in (2048, 8192):
                continue
            rows.append(measure(*case, limits, backward))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    command = " ".join(["nox -s bench -- ssd", *options])
    write("ssd", command, {"ceilings": limits, "rows": rows}, device="cuda", dtype="bfloat16", tokens=TOKENS)
