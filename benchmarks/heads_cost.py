"""Does it cost more to attend with many heads than with one?

At width E every number of heads has the same multiply-adds, 4 N E² + 2 N² E a layer: H heads have E / H numbers each.
What grows is the softmax, over H tables of N x N. Measured in float32 on one thread, at the width of MiniLM.
"""

from collections.abc import Callable

import torch

from benchmarks.record import alternate, ratio, write
from nondual.self_attention import MultiHeadAttention

E, COUNTS, LENGTHS = 384, (1, 2, 4, 12, 48), (32, 512)


@torch.inference_mode()
def main(options: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = {heads: MultiHeadAttention(E, heads) for heads in COUNTS}
    rows = []
    for n in LENGTHS:
        x = torch.randn(1, n, E)
        runs: dict[str, Callable[[], object]] = {}
        for heads, layer in layers.items():
            runs[str(heads)] = lambda layer=layer, x=x: layer(x)
        times = alternate(runs, rounds=25 if n < 100 else 11)
        for heads in COUNTS[1:]:
            share = {"heads": heads, "table_share": round(heads * n * n / (4 * n * E * E + 2 * n * n * E), 4)}
            rows.append({"n": n, **share, "over_one": ratio(times[str(heads)], times["1"])})
            print(rows[-1])
    write("heads_cost", "nox -s bench -- heads_cost", {"rows": rows}, d_model=E, threads=1)
