"""Time and peak memory against N on a CPU: the textbook's table, the tiles in plain torch, and torch's fused kernel.

Each case runs in a process of its own, on one thread: its peak is what the process held above its inputs. The slope of
a curve on logarithmic scales tells the power of N: 2 for a table, 1 where none is kept.
"""

import json
import subprocess
import sys
import time
from statistics import median

from benchmarks.record import write
from benchmarks.scaling import peak_mib, slope

B, H, D = 1, 4, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
ENGINES = ("textbook", "tiled", "sdpa")


def one(engine: str, n: int, backward: bool, causal: bool) -> dict:
    """Run one case in this very process: seconds (median) and the peak in MiB above the inputs."""
    import torch

    from nondual.ops.attention import attention
    from nondual.ops.flash_attention import flash_attention

    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs = {
        "textbook": lambda q, k, v: attention(q, k, v, causal=causal, impl="reference"),
        "tiled": lambda q, k, v: flash_attention(q, k, v, causal=causal, impl="reference"),
        "sdpa": lambda q, k, v: flash_attention(q, k, v, causal=causal, impl="sdpa"),
    }

    def run(n):
        inputs = [torch.randn(B, H, n, D, requires_grad=backward) for _ in range(3)]
        before = peak_mib()
        start = time.perf_counter()
        out = runs[engine](*inputs)
        if backward:
            out.sum().backward()
        return time.perf_counter() - start, peak_mib() - before

    run(64)  # load what is loaded once
    seconds, peak = run(n)
    times = [seconds, *(run(n)[0] for _ in range(2 if seconds > 1 else 6))]
    return {"seconds": median(times), "peak_mib": peak}


def main(options: list[str]) -> None:
    cases = []
    for backward in (False, True):
        for causal in (False, True):
            rows = {engine: [] for engine in ENGINES}
            for n in LENGTHS:
                for engine in ENGINES:
                    case = [sys.executable, "-m", "benchmarks.flash_attention_cpu", engine, str(n), str(int(backward))]
                    ran = subprocess.run(
                        [*case, str(int(causal))], capture_output=True, text=True, check=True, timeout=1800
                    )
                    rows[engine].append({"n": n, **json.loads(ran.stdout)})
            for engine in ENGINES:
                case = {
                    "engine": engine,
                    "backward": backward,
                    "causal": causal,
                    "n": LENGTHS,
                    "peak_mib": [round(row["peak_mib"], 2) for row in rows[engine]],
                    "over_sdpa": [round(a["seconds"] / b["seconds"], 2) for a, b in zip(rows[engine], rows["sdpa"])],
                    "memory_slope": round(slope(LENGTHS, [row["peak_mib"] for row in rows[engine]]), 2),
                    "time_slope": round(slope(LENGTHS, [row["seconds"] for row in rows[engine]]), 2),
                }
                cases.append(case)
                print(case, flush=True)
    write(
        "flash_attention_cpu",
        "nox -s bench -- flash_attention_cpu",
        {"cases": cases},
        shape={"B": B, "H": H, "D": D, "dtype": "float32", "threads": 1},
    )


if __name__ == "__main__":
    engine, n, backward, causal = sys.argv[1:]
    print(json.dumps(one(engine, int(n), backward == "1", causal == "1")))
