"""The learned table: what it gives, and where it ends."""

import pytest
import torch

from nondual.positional_encoding import LearnedPositions


def test_gives_the_rows_of_its_table():
    positions = LearnedPositions(7, 5)
    assert torch.equal(positions(4), positions.table.weight[:4])
    assert torch.equal(positions(3, start=4), positions.table.weight[4:])
    assert positions(0).shape == (0, 5)


def test_only_the_rows_used_get_a_gradient():
    positions = LearnedPositions(7, 5)
    positions(2, start=3).sum().backward()
    assert positions.table.weight.grad.sum(1).tolist() == [0, 0, 0, 5, 5, 0, 0]


@pytest.mark.parametrize("n, start", [(8, 0), (1, 7), (3, 5), (1, -1), (-1, 0)])
def test_a_position_past_the_table_is_named(n, start):
    with pytest.raises(ValueError, match=f"positions must lie in 0 to 6, got {n} from {start}"):
        LearnedPositions(7, 5)(n, start=start)
