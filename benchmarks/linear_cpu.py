"""Linear attention by chunks on a CPU, forward and with its backward: beside torch's softmax attention, and beside
matrix products of the same arithmetic.

Ours is impl="chunked" in plain torch, for each member of the family. Theirs is scaled_dot_product_attention with
is_causal, torch's fused kernel, which holds no N x N matrix. All on one thread, with the same tensors; "normalised"
includes its feature map, elu + 1. Time is processor time, and all take turns in every round, so that other work on the
machine counts for less; what is reported are ratios of the same round, with quartiles.

How far from the arithmetic itself: the sum without a feature map is four products for each chunk of T steps, 4 N H D
(T + D) operations in all. Once as one large product, and once as the products of 64 x 64 matrices that the chunks are.
"""

import time

from benchmarks.record import ratio, write

B, H, D = 1, 4, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FORMS = ("sum", "normalised", "gated", "each channel", "delta", "gated delta")


def rounds_for(length: int) -> int:
    return 9 if length <= 2048 else 5 if length <= 8192 else 3


def runs(length: int, backward: bool) -> dict:
    """Each way to attend, and the two ways to multiply, as functions of nothing."""
    import torch
    import torch.nn.functional as F

    from nondual.efficient_attention.feature_maps import elu_plus_one
    from nondual.ops.linear_attention import linear_attention
    from nondual.ops.linear_attention.chunked import CHUNK

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, length, D, generator=draw).requires_grad_(backward) for _ in range(3))
    unit = F.normalize(k.detach(), dim=-1).requires_grad_(backward)
    beta = torch.rand(B, H, length, generator=draw).requires_grad_(backward)
    decay = (-0.1 * torch.rand(B, H, length, generator=draw)).requires_grad_(backward)
    decays = (-0.1 * torch.rand(B, H, length, D, generator=draw)).requires_grad_(backward)

    def ours(q, k, v, **options):
        return linear_attention(q, k, v, impl="chunked", **options)[0]

    forms = {
        "softmax": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v]),
        "sum": (ours, [q, k, v]),
        "normalised": (lambda q, k, v: ours(elu_plus_one(q), elu_plus_one(k), v, normalise=True), [q, k, v]),
        "gated": (lambda q, k, v, g: ours(q, k, v, log_decay=g), [q, k, v, decay]),
        "each channel": (lambda q, k, v, g: ours(q, k, v, log_decay=g), [q, k, v, decays]),
        "delta": (lambda q, k, v, b: ours(q, k, v, beta=b), [q, unit, v, beta]),
        "gated delta": (lambda q, k, v, b, g: ours(q, k, v, beta=b, log_decay=g), [q, unit, v, beta, decay]),
    }

    def run(form):
        function, given = forms[form]
        with torch.set_grad_enabled(backward):
            out = function(*given)
            if backward:
                torch.autograd.grad(out.sum(), given)

    found = {form: (lambda form=form: run(form)) for form in forms}
    if not backward:
        operations = 4 * B * H * length * D * (CHUNK + D)
        rows = max(operations // (2 * 512 * 512), 1)
        large, square = torch.randn(rows, 512), torch.randn(512, 512)
        blocks = torch.randn(operations // (2 * 4 * 64**3), 64, 64)
        found["one product"] = lambda: large @ square
        found["small products"] = lambda: [blocks @ blocks for _ in range(4)]
    return found


def seconds(run) -> float:
    """Of the processor."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compared(length: int, backward: bool) -> dict[str, list[float]]:
    """Seconds of each in each round."""
    given, rounds = runs(length, backward), rounds_for(length)
    for run in given.values():
        run()
    times = {name: [] for name in given}
    for _ in range(rounds):
        for name, run in given.items():
            times[name].append(seconds(run))
    return times


def crossover(lengths: tuple[int, ...], times_as_fast: list[float]) -> int | None:
    """The least length from which on softmax attention takes longer at every length measured."""
    slower = [n for n, fast in zip(lengths, times_as_fast) if fast <= 1]
    later = [n for n in lengths if not slower or n > slower[-1]]
    return later[0] if later else None


def main(options: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    cases, products = [], []
    for backward in (False, True):
        over = {form: [] for form in FORMS}
        for length in LENGTHS:
            times = compared(length, backward)
            for form in FORMS:
                over[form].append(ratio(times["softmax"], times[form]))
            if not backward:
                row = {"n": length} | {k: ratio(times["sum"], times[k]) for k in ("one product", "small products")}
                products.append(row)
            print(length, backward, {form: over[form][-1]["median"] for form in FORMS}, flush=True)
        for form in FORMS:
            cases.append(
                {
                    "form": form,
                    "backward": backward,
                    "times_as_fast_as_softmax": over[form],
                    "quicker_from": crossover(LENGTHS, [x["median"] for x in over[form]]),
                }
            )
    write(
        "linear_cpu",
        "nox -s bench -- linear_cpu",
        {
            "n": list(LENGTHS),
            "rounds": [rounds_for(n) for n in LENGTHS],
            "cases": cases,
            "sum_over_products": products,
        },
        shape={"B": B, "H": H, "D": D, "dtype": "float32", "threads": 1},
    )
