"""Masks drawn by hand, and the counts that define them."""

import numpy as np
import pytest
import torch

from nondual.ops import masks


def rows(mask):
    return ["".join("01"[int(cell)] for cell in row) for row in mask.tolist()]


def test_causal_by_hand():
    assert rows(masks.causal(3)) == ["100", "110", "111"]


def test_causal_is_aligned_at_the_end():
    assert rows(masks.causal(2, 4)) == ["1110", "1111"]
    assert rows(masks.causal(4, 2)) == ["00", "00", "10", "11"]


def test_sliding_window_by_hand():
    assert rows(masks.sliding_window(4, window=2)) == ["1000", "1100", "0110", "0011"]


@pytest.mark.parametrize("window", [1, 2, 5, 13, 40])
def test_a_window_keeps_exactly_w_keys(window):
    kept = masks.sliding_window(13, 29, window=window).sum(-1)
    assert kept.tolist() == [min(window, 17 + i) for i in range(13)]


def test_a_window_as_long_as_the_keys_is_causal():
    assert torch.equal(masks.sliding_window(7, 11, window=11), masks.causal(7, 11))


def test_prefix_by_hand():
    assert rows(masks.prefix(4, 2)) == ["1100", "1100", "1110", "1111"]
    of_rows = masks.prefix(3, torch.tensor([0, 2, 9], dtype=torch.uint8))
    assert of_rows.shape == (3, 1, 3, 3)
    assert [rows(mask[0]) for mask in of_rows] == [["100", "110", "111"], ["110", "110", "111"], ["111"] * 3]
    for length in (0, 1):
        assert torch.equal(masks.prefix(5, length), masks.causal(5))


def test_padding_by_hand():
    mask = masks.padding(torch.tensor([2, 0, 3]), 3)
    assert mask.shape == (3, 1, 1, 3)
    assert rows(mask[:, 0, 0]) == ["110", "000", "111"]


@pytest.mark.parametrize("n, m", [(0, 0), (0, 3), (3, 0)])
def test_empty_lengths_give_empty_masks(n, m):
    assert masks.causal(n, m).shape == (n, m)
    assert masks.sliding_window(n, m, window=2).shape == (n, m)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: masks.sliding_window(3, window=0), "window must be 1 or more"),
        (lambda: masks.causal(-1), "must be 0 or more"),
        (lambda: masks.prefix(3, -1), "length must be an integer, 0 or more, or integers .*, got -1"),
        (lambda: masks.prefix(3, 1.5), "length must be an integer, 0 or more, or integers .*, got 1.5"),
        (lambda: masks.prefix(3, torch.tensor([1.5])), "length must be integers"),
        (lambda: masks.padding(torch.tensor([0.5]), 3), "lengths must be integers"),
        (lambda: masks.padding(torch.tensor(3), 3), "lengths must be integers"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_lengths_of_any_integer_dtype(dtype):
    assert rows(masks.padding(torch.tensor([2, 0, 3]).to(dtype), 3)[:, 0, 0]) == ["110", "000", "111"]


@pytest.mark.parametrize("lengths, says", [([2, 3], "got list; use torch.tensor"), (np.array([2]), "got ndarray")])
def test_lengths_that_are_no_tensor_are_named(lengths, says):
    with pytest.raises(TypeError, match=f"lengths must be a Tensor, {says}"):
        masks.padding(lengths, 3)
