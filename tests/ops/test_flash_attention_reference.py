"""The algorithm in plain torch: its gradient, its error, what it counts and shows, and the memory it takes."""

import pytest
import torch
from flash_cases import MASKS, allowed, check, made, textbook

from nondual.ops.flash_attention import reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("mask", ["full", "causal", "window 1"])
def test_gradcheck(mask):
    options = MASKS[mask]
    inputs = made(5, 4, 3, 2, h=2, g=1, dtype=torch.float64)

    def run(q, k, v):
        return reference.flash_attention(q, k, v, **options, scale=0.7, tile=(2, 3))

    mended = lambda *a: tuple(x.masked_fill(x == -torch.inf, 0) for x in run(*a))  # noqa: E731
    assert torch.autograd.gradcheck(mended, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_reference_error_is_that_of_plain_pytorch(dtype, mask):
    check(made(131, 257, 32, h=4, g=2, dtype=dtype), MASKS[mask], impl="reference")


def test_scores_are_counted():
    n, d, t = 64, 8, 16
    q, k, v = made(n, n, d, h=3, g=3)
    count = {}
    for mask, options in {"full": {}, "causal": {"causal": True}, "window": {"window": 16}}.items():
        count[mask] = reference.Count()
        out, _ = reference.flash_attention(q, k, v, **options, tile=(t, t), count=count[mask])
    assert count["full"].scores == 3 * n * n  # no fewer than the standard computation
    assert count["full"].multiplications == 2 * d * 3 * n * n
    assert count["causal"].scores == 3 * t * t * (4 + 3 + 2 + 1)  # tiles on and under the diagonal
    assert count["window"].scores == 3 * t * t * (4 + 3)  # the diagonal's, and those before
    assert count["full"].tiles == 16
    forward = reference.Count()
    out, _ = reference.flash_attention(q, k, v, tile=(t, t), count=forward)
    once = forward.multiplications
    assert forward.loaded == q.numel() + (n // t) * 2 * k.numel()  # each tile of queries reads all keys and values
    assert forward.stored == out.numel() + 2 * (out.numel() // d)  # the log-sum-exp in two parts
    out.sum().backward()
    assert forward.multiplications - once == 3 * n * n * (3 * d + 2 * d)  # five products, one of them a second time


def test_a_page_can_follow_every_tile():
    q, k, v = (x.detach() for x in made(5, 7, 4))
    steps = []
    out, lse = reference.flash_attention(q, k, v, causal=True, tile=(2, 3), trace=steps.append)
    assert [(s.queries, s.keys) for s in steps[:2]] == [(range(0, 2), range(0, 3)), (range(0, 2), range(3, 4))]
    seen = {s.queries: s for s in steps}  # the last step of each tile of queries
    assert len(seen) == 3
    for queries, step in seen.items():
        torch.testing.assert_close(step.accumulator / step.total[..., None], out[:, :, queries.start : queries.stop])
        torch.testing.assert_close(step.highest + step.total.log(), lse[:, :, queries.start : queries.stop])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 100}])
def test_the_reference_never_holds_n_by_m(options, largest):
    n, d, t = 1024, 8, 64
    inputs = made(n, n, d, h=1, g=1)

    def both_ways():
        out, _ = reference.flash_attention(*inputs, **options, tile=(t, t))
        out.sum().backward()

    assert largest(both_ways) == n * d  # the inputs themselves
    assert largest(lambda: textbook(*inputs, allowed(n, n, "cpu", **options))) == n * n
