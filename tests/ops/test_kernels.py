"""What the host side of the kernels shares."""

import pytest
import torch

from nondual.ops.kernels import block_size, chip_of, contiguous_rows, multiprocessors, strides


def test_a_block_is_the_next_power_of_two_and_at_least_16():
    assert [block_size(width) for width in (1, 15, 16, 17, 64, 65, 200, 256)] == [16, 16, 16, 32, 64, 128, 256, 256]


def test_rows_are_copied_only_where_their_numbers_lie_apart():
    x = torch.arange(24.0).view(2, 3, 4)
    for view in (x, x[:, :, 1:3], x.transpose(0, 1)):
        assert contiguous_rows(view) is view
    apart = x.mT
    rows = contiguous_rows(apart)
    assert rows.is_contiguous() and torch.equal(rows, apart)


def test_strides_by_the_names_that_kernels_give_them():
    q, dk = torch.empty(2, 3, 4, 5), torch.empty(2, 3, 4, 5).transpose(1, 2)
    assert strides("bhn", q=q, dk=dk) == {"s_qb": 60, "s_qh": 20, "s_qn": 5, "s_dkb": 60, "s_dkh": 5, "s_dkn": 20}
    assert strides("b", q=q) == {"s_qb": 60} and strides("bh") == {}


@pytest.mark.parametrize(
    "capability, chip",
    [((7, 5), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80")],
)
def test_a_chip_by_its_capability(capability, chip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chip_of(torch.device("cuda", 0)) == chip
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert chip_of(torch.device("cuda", 0)) == "gfx942"


def test_without_a_gpu():
    assert chip_of(torch.device("cpu")) == chip_of(torch.device("meta")) == "sm_80"
    assert multiprocessors(torch.device("cpu"), 8) == 8
