"""Attention over some of the keys: parts add up to the whole, and so do their gradients, from the whole's output."""

import math
import re

import pytest
import torch
from flash_cases import allowed, made, textbook
from harness import DTYPES, check, errors, everywhere, incoming

from nondual.ops.flash_attention import flash_attention, partial

pytestmark = pytest.mark.usefixtures("poisoned")


def in_parts(inputs, parts, scale, impl, d_out):
    """out, lse and the gradients from parts: (queries, keys, causal)."""
    q, k, v = (x.detach() for x in inputs)
    engine = partial.engine_of(impl, q, k, v)
    whole = partial.nothing(q, v)
    for rows, keys, causal in parts:
        part = engine.forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal, scale)
        partial.add_(whole.rows(rows), part, engine.unit)
    grads = [torch.zeros(x.shape, dtype=whole.out.dtype, device=x.device) for x in (q, k, v)]
    for rows, keys, causal in parts:
        given = d_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], whole.rows(rows), causal, scale
        for total, where, grad in zip(grads, (rows, keys, keys), engine.backward(*given)):
            assert grad.dtype == total.dtype
            total[:, :, where] += grad
    lse = engine.unit * (whole.top + whole.total)
    return {"out": whole.out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads))}


def judged(inputs, mask, scale, d_out):
    """The same from plain PyTorch over all keys at once."""
    q, k, v = inputs
    out = textbook(q, k, v, mask, scale=scale)
    grads = torch.autograd.grad(out, inputs, d_out.to(out.dtype))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    lse = (scale * q @ k.mT).masked_fill(~mask, -torch.inf).logsumexp(-1)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads))}


ALL, EARLY, LATE = slice(None), slice(0, 5), slice(5, 11)
FULL = [(ALL, slice(5, 7), False), (ALL, EARLY, False), (ALL, slice(7, 13), False)]
CAUSAL = [(EARLY, EARLY, True), (LATE, LATE, True), (LATE, EARLY, False)]  # as pieces of a sequence see one another


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_parts_add_up_to_the_whole_and_so_do_their_gradients(causal, scale):
    inputs = made(11, 11 if causal else 13, 3, 5, b=2, h=6, g=2, dtype=torch.float64)
    d_out = torch.randn(2, 6, 11, 5, dtype=torch.float64)
    mask = allowed(11, inputs[1].shape[2], "cpu", causal=causal)
    ours = in_parts(inputs, CAUSAL if causal else FULL, scale, "reference", d_out)
    for name, expected in judged(inputs, mask, scale, d_out).items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text: f"{name}: {text}")  # noqa: B023


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "scale"), [(False, 0.3), (True, 0.3), (True, -0.3), (False, 0.0)])
def test_the_kernels_parts_are_as_exact_as_plain_pytorch(device, dtype, causal, scale):
    inputs = made(11, 11 if causal else 13, 16, 32, h=4, g=2, dtype=dtype, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    d_out = incoming(inputs[0].new_empty(1, 4, 11, 32))
    mask = allowed(11, inputs[1].shape[2], device, causal=causal)
    ours = in_parts(inputs, CAUSAL if causal else FULL, scale, "triton", d_out)
    assert {x.dtype for x in ours.values()} == {torch.float32}
    plain, exactly = (judged(x, mask, scale, d_out) for x in (inputs, exact))
    check(errors(ours, plain, exactly), outputs={"out", "lse"})


def test_a_part_by_hand():
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 3, 2)  # every score is 0
    v = torch.tensor([1.0, 2.0, 6.0])[None, None, :, None]
    whole = in_parts(
        (q, k, v), [(ALL, slice(0, 1), False), (ALL, slice(1, 3), False)], 1.0, "reference", torch.ones(1, 1, 1, 1)
    )
    assert whole["out"].item() == pytest.approx(3) and whole["lse"].item() == pytest.approx(math.log(3))
    assert whole["dv"].flatten().tolist() == pytest.approx([1 / 3] * 3)


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_that_see_nothing_stay_zero_and_nan_stays_where_it_is_seen(device, impl):
    q, k, v = (x.detach() for x in made(7, 3, 16, device=device))
    parts = [(ALL, slice(0, 3), True)]  # aligned at the end: the first four queries see no key
    d_out = torch.ones(1, 2, 7, 16, device=device)
    for k_seen in (k, torch.cat([k, torch.full_like(k, torch.nan)], 2)):
        ours = in_parts((q, k_seen, v), parts, 0.25, impl, d_out)
        assert (ours["lse"][:, :, :4] == -torch.inf).all() and ours["lse"][:, :, 4:].isfinite().all()
        assert not ours["out"][:, :, :4].any() and not ours["dq"][:, :, :4].any()
        assert all(x.isfinite().all() for name, x in ours.items() if name != "lse")
    v[:, :, 2] = torch.nan
    ours = in_parts((q, k, v), [(ALL, slice(0, 2), False), (slice(5, 7), slice(2, 3), False)], 0.25, impl, d_out)
    assert ours["out"][:, :, :5].isfinite().all() and ours["out"][:, :, 5:].isnan().all()


@everywhere
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_scores_of_ten_thousand_lose_nothing_in_joining(device, impl):
    q, k, v = (x.detach() for x in made(5, 6, 16, device=device))
    q, k = torch.ones_like(q), torch.ones_like(k) * 1e4 / 16
    k[:, :, ::2] *= 1 + 2e-4  # every other score is 10,002
    exact = textbook(q.double(), k.double(), v.double(), torch.ones(5, 6, dtype=torch.bool, device=device), scale=1.0)
    parts = [(ALL, keys, False) for keys in (slice(0, 3), slice(3, 4), slice(4, 6))]
    ours = in_parts((q, k, v), parts, 1.0, impl, torch.ones_like(v[:, :, :5]))["out"]
    at_once = flash_attention(q, k, v, scale=1.0, impl=impl)
    ours, at_once = ((x - exact).abs().max().item() for x in (ours, at_once))
    assert ours < 2 * at_once + 1e-6 and at_once < 1e-3


def test_an_engine_without_the_log_sum_exp_is_refused():
    q, k, v = made(2, 2, 3)
    with pytest.raises(ValueError, match=re.escape("impl='sdpa' keeps its log-sum-exp")):
        partial.engine_of("sdpa", q, k, v)
    with pytest.raises(ValueError, match="impl must be one of"):
        partial.engine_of("flash", q, k, v)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="float16, bfloat16 or float32"):
        partial.engine_of("triton", *(x.double() for x in (q, k, v)))
