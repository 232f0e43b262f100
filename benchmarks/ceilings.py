"""What a GPU can do at most, measured now, and the clock that it is measured with."""

import torch


def seconds(run, rounds=1) -> list[float]:
    """Seconds of a call by device events, each over enough calls to fill a few milliseconds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times, calls = [], 1
    while len(times) < rounds:
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        took = start.elapsed_time(end) / 1000
        if took < 0.004 and calls < 256:
            calls *= 2
            continue
        times.append(took / calls)
    return times


def ceilings() -> dict[str, float]:
    """This card's own limits, now: a large bf16 matrix product and a large copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ b, 10))
    copy = min(seconds(lambda: target.copy_(source), 10))
    return {"matmul_tflops": round(2 * 8192**3 / product / 1e12, 1), "copy_gbs": round(2 * (1 << 30) / copy / 1e9, 1)}
