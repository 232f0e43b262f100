"""What is no tensor, or of another shape, dtype or device, is refused in a sentence that names the argument."""

import numpy as np
import pytest
import torch

from nondual.ops.checks import check_kinds, check_shapes, check_sizes, check_tensors

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "given, told",
    [
        (np.zeros(2), r"x must be a Tensor, got ndarray; use torch.from_numpy\(x\)"),
        ([0.0], r"x must be a Tensor, got list; use torch.tensor\(x\)"),
        (None, "x must be a Tensor, got NoneType"),
    ],
)
def test_what_is_no_tensor_is_refused(given, told):
    with pytest.raises(TypeError, match=told):
        check_tensors({"ready": X, "x": given})


def test_what_is_optional_may_be_none_and_nothing_else():
    check_tensors({"x": X}, {"mask": None, "state": X})
    with pytest.raises(TypeError, match="state must be a Tensor, got float"):
        check_tensors({"x": X}, {"mask": None, "state": 1.0})


def test_another_shape_is_refused_in_letters_and_numbers():
    check_shapes({"x": (X, (2, 3), "(B, L)"), "state": (None, (9,), "(B,)")})
    with pytest.raises(ValueError, match=r"x must be \(B, L\) = \(2, 4\), got \(2, 3\)"):
        check_shapes({"x": (X, (2, 4), "(B, L)")})


@pytest.mark.parametrize(
    "timed, others, reset, told",
    [
        ({"x": X}, {}, X, "reset must be boolean, True where a sequence begins, got torch.float32"),
        ({"x": X.int()}, {}, None, "x must be floating point, got torch.int32"),
        ({"x": X}, {"A": X.cfloat()}, None, "A must be real, floating point, got torch.complex64"),
        (
            {"x": X, "dt": X.double()},
            {},
            None,
            "dt must have the dtype of x, torch.float32, got torch.float64",
        ),
        ({"x": X}, {"A": X.to("meta")}, None, "A must be on the device of x, cpu, got meta"),
        ({"x": X}, {}, X.bool().to("meta"), "reset must be on the device of x, cpu, got meta"),
    ],
)
def test_another_kind_of_number_or_another_device_is_refused(timed, others, reset, told):
    with pytest.raises(ValueError, match=told):
        check_kinds(timed, others, reset)


def test_parameters_may_be_wider_and_what_is_left_out_is_not_asked():
    check_kinds({"x": None, "dt": X.half()}, {"A": X.double(), "D": None}, X.bool())


def test_the_first_size_below_one_is_named():
    check_sizes(heads=1, width=7)
    with pytest.raises(ValueError, match="width must be 1 or more, got 0"):
        check_sizes(heads=1, width=0, depth=-1)
