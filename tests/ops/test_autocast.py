"""What autocast does to our operations' inputs is what it does to torch's own attention."""

import torch
import torch.nn.functional as F
from torch import nn

from nondual.ops.autocast import as_autocast_does, autocast_off, is_autocasting, without_autocast


def test_the_dtypes_are_those_of_torchs_own_attention():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(1, 1, 3, 4).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            (ours,), theirs = as_autocast_does(x), F.scaled_dot_product_attention(x, x, x)
        assert ours.dtype == theirs.dtype


def test_what_is_not_there_stays_so_and_integers_stay_integers():
    with torch.autocast("cpu", torch.bfloat16):
        nothing, mask, x = as_autocast_does(None, torch.ones(2, dtype=torch.bool), torch.randn(2))
    assert nothing is None and mask.dtype == torch.bool and x.dtype == torch.bfloat16
    x = torch.randn(2)
    assert as_autocast_does(x)[0] is x, "outside of autocast nothing is cast"


def test_a_pass_runs_as_wide_as_it_was_given():
    @without_autocast
    def run(ctx, x):
        return nn.functional.linear(x, x)

    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(None, x).dtype == torch.float32 and F.linear(x, x).dtype == torch.bfloat16
    assert run(None, torch.ones(2, 2, device="meta")).is_meta, "where there is no autocast it simply runs"


def test_autocast_off_is_off_inside_and_as_it_was_after():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_off("cpu"):
            assert not is_autocasting("cpu") and F.linear(x, x).dtype == torch.float32
        assert is_autocasting("cpu") and F.linear(x, x).dtype == torch.bfloat16
    assert not is_autocasting("cpu") and not is_autocasting("meta")
