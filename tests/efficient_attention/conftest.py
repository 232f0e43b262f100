"""A comparison that the tests of Mamba and of Mamba-2 share."""

from collections.abc import Callable

import pytest
import torch
from harness import DRAWS, ErrorBudget


@pytest.fixture
def check_narrow() -> Callable[..., None]:
    """A function: under autocast and in bfloat16 a mixer is at most 2 times as far off as plain PyTorch, gradients 3.

    Args:
        block: `block(dtype, seed)` makes a mixer; the same seed gives the same weights.
        draw: `draw(seed)` gives an input (B, N, E) and a gradient of the output, both float32.
        run: `run(module, x, g, dtype)` gives the output "y" and each gradient, by name, of x in that dtype.
        judged: `judged(ours, x, g)` gives the same by an independent module in bfloat16, with the weights of `ours`.
    """

    def check(block, draw, run, judged):
        budget = ErrorBudget()
        for seed in range(DRAWS):
            ours, (x, g) = block(torch.float32, seed), draw(seed)
            exact = run(block(torch.float32, seed).double(), x, g, torch.float64)
            plain = judged(ours, x, g)
            cache = ours.new_cache(len(x))
            with torch.autocast("cpu", torch.bfloat16):
                cast = run(ours, x, g, torch.float32)
                parts = torch.cat([ours(x[:, :5], cache=cache), ours(x[:, 5:], cache=cache)], 1)
            assert cast["y"].dtype == parts.dtype == torch.bfloat16 and cache.state.dtype == torch.float32
            half = run(ours.bfloat16(), x, g, torch.bfloat16)
            assert half["y"].dtype == torch.bfloat16 and ours.new_cache(len(x)).conv.dtype == torch.bfloat16
            budget.add("y", ours=parts, plain=plain["y"], exact=exact["y"])
            for name, right in exact.items():
                for narrow in (cast[name], half[name]):
                    budget.add(name, ours=narrow.bfloat16(), plain=plain[name], exact=right)
        budget.check({"y": 2}, otherwise=3, ulps=1)

    return check
