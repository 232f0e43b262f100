"""What Mamba and Mamba-2 compute in float32 although their parameters are in half precision."""

import pytest
import torch

from nondual.efficient_attention import mamba, mamba2

MODULES = {"mamba": (mamba, mamba.Mamba, "selective_scan"), "mamba2": (mamba2, mamba2.Mamba2, "ssd")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_rates_and_states_are_float32(name, dtype, monkeypatch):
    """A = -exp(A_log) is taken in float32, and states are kept in it: rounded, a decay over many steps is another."""
    module, kind, scan = MODULES[name]
    torch.manual_seed(0)
    mixer = (kind(16) if name == "mamba" else kind(32, d_state=8, d_head=16)).to(dtype)
    seen, run = [], getattr(module, scan)
    monkeypatch.setattr(module, scan, lambda *args, **options: seen.append(args[2]) or run(*args, **options))
    cache = mixer.new_cache(2)
    assert cache.state.dtype == torch.float32 and cache.conv.dtype == dtype
    with torch.no_grad():
        mixer(torch.randn(2, 5, 16 if name == "mamba" else 32, dtype=dtype), cache=cache)
    assert cache.state.dtype == torch.float32 and cache.conv.dtype == dtype
    (A,) = seen
    torch.testing.assert_close(A, -mixer.A_log.float().exp(), rtol=1e-6, atol=0)


def test_no_step_begins_below_the_floor():
    steps = torch.nn.functional.softplus(mamba.step_bias(500, 1e-6, 1e-5, floor=1e-4).double())
    torch.testing.assert_close(steps, torch.full_like(steps, 1e-4), rtol=1e-4, atol=0)
    drawn = torch.nn.functional.softplus(mamba.step_bias(500, 1e-3, 1e-1).double())
    assert 1e-3 * 0.999 <= drawn.min() < 2e-3 and 5e-2 < drawn.max() <= 1e-1 * 1.001
