"""What Mamba and Mamba-2 are made of, by itself: the first step lengths. Their laws are in test_mamba_laws.py."""

import torch
import torch.nn.functional as F

from nondual.efficient_attention.mamba_parts import step_bias


def test_the_first_steps_lie_where_they_are_asked_for_in_any_default_dtype():
    """dt_min and dt_max are met and the floor too: in float32 to rounding, in bfloat16 as near as its digits are."""
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            for low, high, expected in ((0.01, 0.01, 0.01), (1e-7, 1e-6, 1e-4), (0.3, 0.3, 0.3)):
                bias = step_bias(50, low, high)
                assert bias.dtype == dtype
                step = F.softplus(bias.double())
                assert ((step / expected - 1).abs() < near).all(), (dtype, low, step.min(), step.max())
        finally:
            torch.set_default_dtype(default)


def test_the_first_steps_spread_over_the_whole_range():
    torch.manual_seed(0)
    steps = F.softplus(step_bias(500, 1e-3, 1e-1).double())
    assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1 * 1.001
