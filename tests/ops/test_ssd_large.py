"""The kernels of state space duality at the sizes they are for, on a GPU."""

import pytest
import torch
from ssd_cases import DECAYS, TIMED, both_ways, by, check, made, resets, textbook

from nondual.ops.ssd import ssd

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("length", [257, 1025, 2048])
@pytest.mark.parametrize("p, n, h, g", [(64, 128, 24, 1), (64, 256, 4, 2), (128, 128, 4, 4), (59, 111, 6, 3)])
def test_large(dtype, reset, length, p, n, h, g):
    inputs = made(length, b=2, h=h, g=g, p=p, n=n, dtype=dtype, device="cuda", skip="hp")
    check(inputs, reset=resets(length, 2, "cuda") if reset else None)


def in_pieces(size):
    """The textbook, piece by piece, each with the state of the one before: what L² has no room for at once."""

    def run(inputs):
        state, parts = inputs["state"], []
        for start in range(0, inputs["x"].shape[1], size):
            piece = {k: v[:, start : start + size] if k in TIMED else v for k, v in inputs.items()} | {"state": state}
            y, state = textbook(**piece)
            parts.append(y)
        return torch.cat(parts, 1), state

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_and_long(dtype):
    check(made(65537, h=2, p=64, n=128, dtype=dtype, device="cuda"), plain=in_pieces(1024))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rate, lag", DECAYS)
def test_large_at_strong_and_weak_decay(dtype, rate, lag):
    check(made(1025, h=4, p=64, n=128, rate=rate, lag=lag, dtype=dtype, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_runs_are_equal_to_the_bit(dtype):
    inputs = made(2049, b=2, h=24, p=64, n=128, dtype=dtype, device="cuda")
    marks = resets(2049, 2, "cuda")
    first = both_ways(by("triton", reset=marks), inputs)
    for _ in range(99):
        again = both_ways(by("triton", reset=marks), inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """One head at the far end of 2^31 numbers, with the rest and alone: the same bits, forward and backward."""
    length, h, p, n = 32768, 520, 128, 16
    assert length * h * p > 2**31

    def drawn(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    x, delta, B, C = drawn(1, length, h, p), drawn(1, length, h), drawn(1, length, n), drawn(1, length, n)
    A = -torch.rand(h, device="cuda")
    y, state = ssd(x, delta, A, B, C, delta_softplus=True, impl="triton")
    d_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, delta), d_y)
    alone = [v[:, :, -1:].detach().clone().requires_grad_() for v in (x, delta)]
    y_last, state_last = ssd(*alone, A[-1:], B, C, delta_softplus=True, impl="triton")
    assert torch.equal(y[:, :, -1:], y_last) and torch.equal(state[:, -1:], state_last)
    for a, b in zip(grads, torch.autograd.grad(y_last, alone, d_y[:, :, -1:])):
        assert torch.equal(a[:, :, -1:], b)
