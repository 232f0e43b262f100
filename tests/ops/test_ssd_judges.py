"""State space duality against what others wrote: the scan and the decoding step of Mamba-2 in transformers."""

import pytest
import torch
from transformers.models.mamba2 import modeling_mamba2 as theirs

from nondual.ops.ssd import ssd, ssd_step


def drawn(length, h=4, p=6, g=2, n=5):
    draw = torch.Generator().manual_seed(0)
    shapes = (2, length, h, p), (2, length, h), (h,), (2, length, g, n), (2, length, g, n), (h,), (h,), (2, h, p, n)
    x, delta, A, B, C, D, bias, state = (torch.randn(s, generator=draw) for s in shapes)
    return [v.requires_grad_() for v in (x, delta, -A.exp(), B, C, D, bias, state)]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("length", [1, 16, 37])
def test_the_scan_of_mamba_2(impl, length):
    x, delta, A, B, C, D, bias, state = inputs = drawn(length)
    ours = ssd(x, delta, A, B, C, D, None, bias, True, state, impl=impl, chunk=8)
    judged = theirs.mamba2_chunk_scan(
        x, delta, A, B, C, 8, D=D, dt_bias=bias, initial_states=state, dt_softplus=True, return_final_states=True
    )
    torch.testing.assert_close(ours[0], judged[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], judged[1], atol=1e-5, rtol=1e-5)
    grads = (torch.autograd.grad((y.sin().sum(), s.sin().sum()), inputs) for y, s in (ours, judged))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_step_of_mamba_2():
    x, delta, A, B, C, D, bias, state = (v.detach() for v in drawn(1))
    x, delta, B, C = (v[:, 0] for v in (x, delta, B, C))
    z = torch.randn_like(x)
    y, after = ssd_step(x, delta, A, B, C, D, z, bias, True, state)
    h, p, n = state.shape[1:]
    spread = (v[..., None].expand(*v.shape, p) for v in (delta, D, bias))  # a head's own for each of its channels
    delta, D, bias = spread
    expected = theirs.mamba2_selective_state_update(
        state, x, delta, A[:, None, None].expand(h, p, n), B, C, D, dt_bias=bias, dt_softplus=True, z=z
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, state)  # which that function writes over
