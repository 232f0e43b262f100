"""The Mamba-2 block: by hand, and against transformers' mixer. Its laws are in test_mamba_laws.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from mamba_cases import WIDTH, B, assert_close, block, gradients, sequence, transformers_mixer

from nondual.efficient_attention.mamba2 import GroupRMSNorm, Mamba2

# --- what it computes ----------------------------------------------------------------------------------------------


def test_a_case_by_hand():
    """One head of one channel, one state, a window of one step; A = -1, D = 1, and Δ = softplus(x)."""
    mamba = Mamba2(1, d_state=1, d_conv=1, expand=1, d_head=1, conv_bias=False)
    with torch.no_grad():
        for weight in (mamba.in_proj, mamba.conv1d, mamba.out_proj):
            weight.weight.fill_(1)
        mamba.dt_bias.zero_(), mamba.A_log.zero_()
    h, expected = 0.0, []
    for x in (1.0, -2.0, 3.0):
        u = gate = x / (1 + math.exp(-x))  # silu; B = C = u
        delta = math.log1p(math.exp(x))
        h = math.exp(-delta) * h + delta * u * u
        y = (u * h + u) * gate
        expected.append(y / math.sqrt(y * y + 1e-5))
    y = mamba(torch.tensor([[[1.0], [-2.0], [3.0]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(n_groups=1, bias=True),
        dict(n_groups=6, d_head=3, conv_bias=False),
        dict(d_head=9, n_groups=2, chunk=3, d_conv=2),
        dict(dt_limit=(0.004, 0.03), eps=0.1),
        dict(d_state=1, chunk=64),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 11])
def test_it_is_transformers_mixer_forward_and_backward(more, length, in_float64):
    ours = block("mamba2", **more)
    theirs = transformers_mixer(ours)
    x, g = sequence("mamba2", length), torch.randn(B, length, WIDTH["mamba2"], dtype=torch.float64)
    y = ours(x)
    with in_float64:  # transformers narrows to float32 inside
        judged = theirs(x)
    torch.testing.assert_close(y, judged, atol=1e-12, rtol=1e-12)
    assert_close(gradients(ours, x, y, g), gradients(theirs, x, judged, g), 1e-11)


def test_the_norm_is_torchs_group_by_group():
    torch.manual_seed(0)
    norm, x = GroupRMSNorm(12, 3, eps=0.01), torch.randn(2, 5, 12)
    norm.weight.data.uniform_(0.5, 2)
    parts = [F.rms_norm(part, (4,), w, eps=0.01) for part, w in zip(x.chunk(3, -1), norm.weight.chunk(3))]
    torch.testing.assert_close(norm(x), torch.cat(parts, -1))


def test_it_begins_as_the_released_code_does():
    torch.manual_seed(0)
    mamba = Mamba2(256, d_head=1)  # 512 heads, to see how they lie
    assert mamba.n_heads == 512 and torch.equal(mamba.D, torch.ones(512))
    rates, delta = mamba.A_log.exp(), F.softplus(mamba.dt_bias.double())
    assert rates.min() >= 0.999 and rates.max() <= 16.001
    assert 0.001 <= delta.min() * 1.001 and delta.max() <= 0.1 * 1.001
    for spread in ((rates - 1) / 15, ((delta.log() - math.log(0.001)) / math.log(100)).float()):
        assert torch.histc(spread, 10, 0, 1).min() > 25  # uniform: every tenth holds about a tenth of 512
    assert torch.equal(mamba.norm.weight, torch.ones(512))


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(d_model=0), r"d_model must be 1 or more, got 0"),
        (dict(d_state=0), r"d_state must be 1 or more, got 0"),
        (dict(d_head=0), r"d_head must be 1 or more, got 0"),
        (dict(n_groups=0), r"n_groups must be 1 or more, got 0"),
        (dict(d_head=5), r"expand \* d_model must be a multiple of d_head, got 16 and 5"),
        (dict(n_groups=3), r"n_groups must divide the heads, 16 / 4 = 4, got 3"),
        (dict(dt_max=0.0001), r"dt_min and dt_max must be in order and above 0, got 0.001 and 0.0001"),
        (dict(dt_limit=(0.1, 0.0)), r"dt_limit must be two bounds in order, 0 or more, got \(0.1, 0.0\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValueError, match=says):
        Mamba2(**(dict(d_model=8, d_head=4) | settings))
