"""Block-sparse attention on a GPU: time against the share of tiles kept, and a window beside full causal attention.

The ideal is dense time times density: what flash attention takes over all N · N scores, times the share of them that
the kept tiles hold. Peers, in one run: flash attention of ours (all scores, causal, with a window) and FlexAttention
with the same mask, its backends named. Every case times all in turn, round by round, and keeps the ratio of the rounds:
the card is shared and its clock moves. A peer that refuses a case is written down with its reason.

The goals: within 1.3 of the ideal at 16,384 tokens; a window of 1,024 at 32,768 tokens in a tenth of full causal time.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.ceilings import ceilings, seconds
from benchmarks.record import ratio, write
from nondual.ops.flash_attention import flash_attention
from nondual.ops.sparse_attention import BlockMask, sparse_attention

HEADS = 16
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # of the tiles below the diagonal that are kept
WINDOW = 1024
BACKENDS = ("TRITON", "FLASH")  # of FlexAttention


def cases():
    """(name, head width, tokens, side of a tile, share of tiles or None for a window)."""
    for d, block in ((128, 128), (128, 64), (64, 64)):
        for share in SHARES:
            yield "tiles", d, 16384, block, share
    for n in (8192, 32768):
        yield "window", 128, n, 128, None


def chosen_tiles(n: int, block: int, share: float, device: str) -> BlockMask:
    """A share of the tiles below the diagonal, drawn at random, and all on it; causal."""
    tiles = -(-n // block)
    kept = torch.rand(tiles, tiles, generator=torch.Generator().manual_seed(0)) < share
    return BlockMask.from_blocks((kept | torch.eye(tiles, dtype=torch.bool)).to(device), block, n=n, m=n, causal=True)


def window_tiles(n: int, block: int, window: int, device: str) -> BlockMask:
    """The last `window` keys of each query."""
    return BlockMask.from_predicate(n, n, lambda i, j: (j <= i) & (j > i - window), block, device=device)


def look(device: str, dtype: torch.dtype, n: int, block: int, d: int = 16) -> dict[str, float]:
    """How far the kernels are off, by pattern: the largest difference from the definition, output and gradients."""
    worst = {}
    for name, mask in {
        "tiles": chosen_tiles(n, block, 0.3, device),
        "window": window_tiles(n, block, n // 3, device),
    }.items():
        draw = torch.Generator().manual_seed(1)
        q, k, v, d_out = (torch.randn(1, 2, n, d, generator=draw).to(device, dtype).requires_grad_() for _ in range(4))
        found = []
        for impl in ("triton", "reference"):
            out = sparse_attention(q, k, v, mask, impl=impl)
            found.append([out, *torch.autograd.grad(out, (q, k, v), d_out)])
        worst[name] = max(float((a - b).detach().abs().max()) for a, b in zip(*found))
    return worst


def flex(mask: BlockMask, window: int | None, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention by one of its backends: a window by its own rule, other masks by their tiles."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    theirs = mask.to_flex()
    if window is not None:

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i) & (j > i - window)

        theirs = create_block_mask(seen, None, None, mask.n, mask.m, device=str(mask.device), BLOCK_SIZE=mask.block_q)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=theirs, kernel_options={"BACKEND": backend})


def measure(name: str, d: int, n: int, block: int, share: float | None, backward: bool) -> dict:
    """One row: how long ours takes, and how many times as long each peer takes."""
    q, k, v = (torch.randn(1, HEADS, n, d, device="cuda", dtype=torch.bfloat16, requires_grad=backward) for _ in "qkv")
    window = WINDOW if share is None else None
    mask = window_tiles(n, block, WINDOW, "cuda") if share is None else chosen_tiles(n, block, share, "cuda")
    runs = {
        "ours": partial(sparse_attention, block_mask=mask, impl="triton"),
        "all scores": partial(flash_attention, impl="triton"),
        "causal": partial(flash_attention, causal=True, impl="triton"),
        **{f"FlexAttention, {backend}": flex(mask, window, backend) for backend in BACKENDS},
    }
    if window is not None:
        runs["flash with a window"] = partial(flash_attention, window=window, impl="triton")
    incoming, truth = torch.randn_like(q), sparse_attention(q, k, v, mask, impl="triton").detach()
    ready, refused = {}, {}
    for peer, forward in runs.items():
        try:
            out = forward(q, k, v)
            error = float((out - truth).abs().max())
            if peer not in ("all scores", "causal") and not error < 0.1:
                raise RuntimeError(f"another result, off by {error:.2f}")
            if backward:
                ready[peer] = lambda out=out: torch.autograd.grad(out, (q, k, v), incoming, retain_graph=True)
            else:
                ready[peer] = lambda forward=forward: forward(q, k, v)
            ready[peer]()
        except Exception as error:  # a backend says no in many ways; which, is part of the table
            ready.pop(peer, None)
            refused[peer] = str(error).splitlines()[0][:120]
    times = {peer: [] for peer in ready}
    for _ in range(7):
        for peer, run in ready.items():
            times[peer] += seconds(run)
    ideal = [taken * mask.density for taken in times["all scores"]]
    return {
        "case": name,
        "d": d,
        "n": n,
        "block": block,
        "share": share,
        "backward": backward,
        "density": round(mask.density, 5),
        "ours_ms": round(min(times["ours"]) * 1e3, 4),
        "times_the_ideal": ratio(times["ours"], ideal),
        "speedup_over": {peer: ratio(taken, times["ours"]) for peer, taken in times.items() if peer != "ours"},
        "refused": refused,
    }


def main(options: list[str]) -> None:
    """Write docs/measured/sparse.json."""
    if not torch.cuda.is_available():
        print("sparse: passed over; it needs a CUDA device (sparse_compile and sparse_cpu need none)")
        return
    worst = look("cuda", torch.float32, 1024, 64, 64)
    assert max(worst.values()) < 1e-3, f"the kernels are wrong here: {worst}"
    limits, rows = ceilings(), []
    for backward in (False, True):
        for case in cases():
            if "--quick" in options and case[4] not in (0.1, None):
                continue
            rows.append(measure(*case, backward))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    command = " ".join(["nox -s bench -- sparse", *options])
    write("sparse", command, {"ceilings": limits, "rows": rows}, device="cuda", dtype="bfloat16", heads=HEADS)


if __name__ == "__main__":
    main([])
