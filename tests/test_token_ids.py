"""Token ids where they enter a model: what is taken, what is refused, and where values cannot be looked at."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nondual.token_ids import check_ids, has_values

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_any_integer_dtype_in_range(dtype):
    ids = torch.tensor([[0, 5, 12]])
    found = check_ids("ids", ids.to(dtype), 13)
    assert found.dtype in (torch.int32, torch.int64) and torch.equal(found.long(), ids)
    with pytest.raises(ValueError, match="words must lie in 0 to 11, got 0 to 12"):
        check_ids("words", ids.to(dtype), 12)


@pytest.mark.parametrize(
    "ids, error, says",
    [
        (torch.tensor([[-1, 3]]), ValueError, "ids must lie in 0 to 12, got -1 to 3"),
        (torch.tensor([1, 3]), ValueError, r"ids must be integers \(B, N\), got torch.int64 \(2,\)"),
        (torch.tensor([[1.0]]), ValueError, r"ids must be integers \(B, N\), got torch.float32 \(1, 1\)"),
        (torch.tensor([[True]]), ValueError, r"ids must be integers \(B, N\), got torch.bool \(1, 1\)"),
        (torch.tensor([[1j]]), ValueError, r"ids must be integers \(B, N\), got torch.complex64 \(1, 1\)"),
        ([[1]], TypeError, r"ids must be a Tensor, got list; use torch.tensor\(ids\)"),
    ],
)
def test_what_is_refused(ids, error, says):
    with pytest.raises(error, match=says):
        check_ids("ids", ids, 13)


def test_no_ids_at_all():
    assert check_ids("ids", torch.zeros(2, 0, dtype=torch.long), 13).shape == (2, 0)


def test_where_values_cannot_be_looked_at_the_range_is_not_checked():
    ids = torch.tensor([[99]])
    assert has_values(ids)
    assert not has_values(ids.to("meta")) and check_ids("ids", ids.to("meta"), 13).is_meta
    torch.func.vmap(lambda one: check_ids("ids", one[None], 13))(ids)
    torch.compile(lambda x: check_ids("ids", x, 13), fullgraph=True, backend="eager")(ids)
    with FakeTensorMode():
        check_ids("ids", torch.zeros(2, 3, dtype=torch.long), 13)
