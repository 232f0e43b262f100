"""Sums are kept in float32 or wider."""

import pytest
import torch

from nondual.ops.dtypes import accumulation_dtype, at_least_float32


@pytest.mark.parametrize("given, kept", [
    ((torch.float16,), torch.float32),
    ((torch.bfloat16,), torch.float32),
    ((torch.float32,), torch.float32),
    ((torch.float64,), torch.float64),
    ((torch.complex64,), torch.complex64),
    ((torch.float64, torch.bfloat16), torch.float64),
    ((torch.float64, torch.complex64), torch.complex128),
])  # fmt: skip
def test_what_sums_are_kept_in(given, kept):
    assert accumulation_dtype(*given) == kept == at_least_float32(torch.ones(2, dtype=given[0])).to(kept).dtype


def test_what_is_wide_already_is_not_copied():
    for dtype in (torch.float32, torch.float64, torch.complex64):
        x = torch.ones(2, dtype=dtype)
        assert at_least_float32(x) is x
    assert at_least_float32(torch.ones(2, dtype=torch.float16)).dtype == torch.float32
