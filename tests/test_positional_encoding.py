"""The learned table: what it gives, and where it ends."""

import pytest
import torch

from nondual.positional_encoding import LearnedPositions, PositionCache


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


def test_positions_of_packed_sequences_count_from_0():
    positions, ids = LearnedPositions(7, 4), torch.zeros(2, 5, dtype=torch.long)
    reset = torch.tensor([[False, False, True, False, False], [True, False, False, False, True]])
    expected = positions.table.weight[torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]])]
    assert torch.equal(positions.of_sequences(ids, reset=reset), expected)
    assert torch.equal(positions.of_sequences(ids), positions(5))
    cache = positions.new_cache()
    parts = [positions.of_sequences(ids[:, :3], cache=cache, reset=reset[:, :3])]
    parts.append(positions.of_sequences(ids[:, 3:4], cache=cache))
    parts.append(positions.of_sequences(ids[:, 4:], cache=cache, reset=reset[:, 4:]))
    assert torch.equal(torch.cat(parts, 1), expected) and cache.length == 5 and cache.start.tolist() == [2, 4]


def test_positions_that_run_out_are_named_before_the_cache_changes():
    positions, ids, cache = LearnedPositions(7, 4), torch.zeros(2, 5, dtype=torch.long), PositionCache()
    positions.of_sequences(ids, cache=cache)
    with pytest.raises(ValueError, match="positions must lie in 0 to 6, got 5 from 5: shorten the input"):
        positions.of_sequences(ids, cache=cache)
    with pytest.raises(ValueError, match="positions must lie in 0 to 6, got 9: shorten the input"):
        positions.of_sequences(ids, cache=cache, reset=torch.zeros(2, 5, dtype=torch.bool))
    assert cache.length == 5 and cache.start is None
    with pytest.raises(TypeError, match="cache must begin with a PositionCache, from new_cache, got int"):
        positions.of_sequences(ids, cache=5)
    with pytest.raises(ValueError, match=r"reset must be boolean \(B, N\)"):
        positions.of_sequences(ids, reset=torch.zeros(2, 5))
