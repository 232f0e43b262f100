"""Where the time of an attention layer goes as N grows: the projections, or the N x N table?

Counting multiply-adds of one layer of width E: four projections cost 4 N E², scores and mixing 2 N² E. So the table's
share is N / (N + 2E), one half at N = 2E. Measured at the width of MiniLM for both engines, in float32: on one thread
of the CPU, or with --device=cuda on a GPU.
"""

import torch

from benchmarks.record import alternate, ratio, write
from nondual.ops.attention import attention
from nondual.self_attention import MultiHeadAttention

E, HEADS, LENGTHS = 384, 12, (32, 64, 128, 256, 512, 1024, 2048, 4096)


def main(options: list[str]) -> None:
    device = "cuda" if "--device=cuda" in options else "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = MultiHeadAttention(E, HEADS).to(device)
    rows = []
    with torch.inference_mode():
        for n in LENGTHS:
            x = torch.randn(1, n, E, device=device)
            q, k, v = (torch.randn(1, HEADS, n, E // HEADS, device=device) for _ in range(3))
            runs = {
                "projections": lambda x=x: [p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)],
                "sdpa": lambda q=q, k=k, v=v: attention(q, k, v, impl="sdpa"),
                "reference": lambda q=q, k=k, v=v: attention(q, k, v, impl="reference"),
            }
            times = alternate(runs, rounds=9 if n > 1024 else 25)
            row = {"n": n, "predicted_share": round(n / (n + 2 * E), 3)}
            for engine in ("sdpa", "reference"):
                whole = [a + b for a, b in zip(times[engine], times["projections"])]
                row[f"{engine}_share"] = ratio(times[engine], whole)
            row["reference_over_sdpa"] = ratio(times["reference"], times["sdpa"])
            rows.append(row)
            print(row)
    command = " ".join(["nox -s bench -- self_attention", *options])
    name = "self_attention" if device == "cpu" else "self_attention_cuda"
    write(name, command, {"rows": rows}, device=device, d_model=E, n_heads=HEADS, threads=1)
