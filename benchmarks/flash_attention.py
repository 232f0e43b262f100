"""Flash attention on a GPU, in one run with the textbook, torch's FLASH, CUDNN and EFFICIENT backends, FlexAttention.

Every case times ours and each peer in turn, round by round, and keeps the ratio of the rounds: the card is shared and
its clock moves. Beside each case stands its share of this card's own ceiling, taken in the same run: a large bf16
matrix product or, for decoding, a large copy. A peer that refuses a case is written down with its reason.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ceilings import ceilings, seconds
from benchmarks.record import ratio, write
from nondual.ops.flash_attention import flash_attention

TOKENS, HEADS = 16384, 16  # tokens in a batch, whatever the length; heads of the widths below
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def cases():
    """(name, width, queries, keys, key/value heads, options): the grid of the table."""
    for d in (64, 128, 256):
        for n in (512, 1024, 2048, 4096, 8192, 16384, 32768):
            yield "full", d, n, n, HEADS, {}
            yield "causal", d, n, n, HEADS, {"causal": True}
    for n in (4096, 32768):
        yield "window", 128, n, n, HEADS, {"causal": True, "window": 1024}
        yield "grouped", 128, n, n, HEADS // 4, {"causal": True}
    for m in (4096, 32768, 131072):
        yield "decode", 128, 1, m, HEADS // 4, {}


def sdpa(backend, options):
    def run(q, k, v):
        if "window" in options:
            raise RuntimeError("scaled_dot_product_attention has no window")
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=options.get("causal", False), enable_gqa=q.shape[1] != k.shape[1]
            )

    return run


def textbook(n, m, options):
    """Plain PyTorch, which stores the table of weights."""
    later = torch.arange(m, device="cuda") - torch.arange(m - n, m, device="cuda")[:, None]  # by how much, (N, M)
    hidden = (later > 0) | (later <= -options.get("window", m)) if options.get("causal") else None

    def run(q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        scores = scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v

    return run


def flex(n, m, options):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, block = options.get("window", m), None
    if options.get("causal"):
        block = create_block_mask(lambda b, h, i, j: (j <= i) & (j > i - window), None, None, n, m, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block, enable_gqa=q.shape[1] != k.shape[1])


def pairs(n: int, m: int, options: dict) -> int:
    """How many scores the case asks for."""
    if not options.get("causal"):
        return n * m
    window = options.get("window", m)
    return sum(min(window, i + 1) for i in range(m - n, m))


def measure(name, d, n, m, kv_heads, options, limits, backward) -> dict:
    batch = max(1, TOKENS // max(n, m))
    q, k, v = (
        torch.randn(batch, h, length, d, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
        for h, length in ((HEADS, n), (kv_heads, m), (kv_heads, m))
    )
    makers = {
        "ours": lambda: lambda q, k, v: flash_attention(q, k, v, impl="triton", **options),
        "textbook": lambda: textbook(n, m, options),
        **{peer: lambda backend=backend: sdpa(backend, options) for peer, backend in PEERS.items()},
        "flex": lambda: flex(n, m, options),
    }
    incoming = torch.randn_like(q)
    truth = flash_attention(q, k, v, impl="triton", **options).detach()
    runs, refused = {}, {}
    for peer, make in makers.items():
        try:
            forward = make()
            out = forward(q, k, v)
            error = (out - truth).abs().max().item()
            if error > 0.1:
                raise RuntimeError(f"another result, off by {error:.2f}")
            if backward:
                runs[peer] = lambda out=out: torch.autograd.grad(out, (q, k, v), incoming, retain_graph=True)
            else:
                runs[peer] = lambda forward=forward: forward(q, k, v)
            runs[peer]()
        except Exception as error:  # a backend says no in many ways; which, is part of the table
            runs.pop(peer, None)
            refused[peer] = str(error).splitlines()[0][:120]
    times = {peer: [] for peer in runs}
    for _ in range(7):
        for peer, run in runs.items():
            times[peer] += seconds(run)
    ours = min(times["ours"])
    flops = 4 * batch * HEADS * pairs(n, m, options) * d * (2.5 if backward else 1)
    bytes_moved = 2 * batch * m * kv_heads * d * 2
    return {
        "case": name,
        "d": d,
        "n": n,
        "m": m,
        "backward": backward,
        "batch": batch,
        "kv_heads": kv_heads,
        "ours_ms": round(ours * 1e3, 4),
        "tflops": round(flops / ours / 1e12, 1),
        "share_of_matmul": round(flops / ours / 1e12 / limits["matmul_tflops"], 3),
        "share_of_copy": round(bytes_moved / ours / 1e9 / limits["copy_gbs"], 3) if name == "decode" else None,
        "speedup_over": {peer: ratio(taken, times["ours"]) for peer, taken in times.items() if peer != "ours"},
        "refused": refused,
    }


def main(options: list[str]) -> None:
    if not torch.cuda.is_available():
        print("flash_attention: passed over; it needs a CUDA device (flash_attention_cpu needs none)")
        return
    limits, rows = ceilings(), []
    for backward in (False, True):
        for case in cases():
            if backward and case[0] == "decode":
                continue
            if "--quick" in options and case[2] not in (1, 4096):
                continue
            rows.append(measure(*case, limits, backward))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    command = " ".join(["nox -s bench -- flash_attention", *options])
    write("flash_attention", command, {"ceilings": limits, "rows": rows}, device="cuda", dtype="bfloat16", heads=HEADS)
