"""Codes that are added to embeddings: the learned table and where it ends; the laws of the sinusoidal code."""

import math

import pytest
import torch
from torch import nn

from nondual.positional_encoding import AddedPositions, LearnedPositions, PositionCache, Sinusoidal
from nondual.self_attention import MultiHeadAttention


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


# --- the sinusoidal code ---------------------------------------------------------------------------------------------


def rotation(k, width, base=10000.0):
    """R_k (E, E): each sine and cosine turned by the angle of k steps."""
    turns = []
    for i in range(width // 2):
        angle = k / base ** (2 * i / width)
        turns.append(torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double())
    return torch.block_diag(*turns)


@pytest.mark.claim("A3.2", "holds")
def test_it_is_the_papers_formula_and_k_steps_are_one_rotation():
    """The essay's two lines, number by number; what the paper says of them; and with the code, order is seen."""
    width, code = 12, Sinusoidal(12).double()
    written = [
        [(math.cos if j % 2 else math.sin)(p / 10000 ** ((j - j % 2) / width)) for j in range(width)]
        for p in (0, 1, 17, 4999)
    ]
    rows = code(5000)
    torch.testing.assert_close(rows[[0, 1, 17, 4999]], torch.tensor(written, dtype=torch.float64))

    for k in (1, 7, 1000):
        r = rotation(k, width)
        torch.testing.assert_close(r @ r.T, torch.eye(width, dtype=torch.float64))
        torch.testing.assert_close(rows[k:], rows[:-k] @ r.T)  # from every place by the same R_k
        torch.testing.assert_close(rotation(k + 7, width), r @ rotation(7, width))
    assert torch.linalg.matrix_rank(rows[:100]) == width  # the codes span the space: no other linear map does it

    products = rows[:200] @ rows[:200].T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])  # they depend on the offset alone
    cosines = torch.cos(torch.arange(200)[:, None] / 10000 ** (torch.arange(0, width, 2).double() / width)).sum(1)
    torch.testing.assert_close(products[0], cosines)

    torch.manual_seed(0)
    attention, words = MultiHeadAttention(width, 3).double(), nn.Embedding(5, width).double()
    cat, mat = torch.tensor([[0, 1, 2, 3, 0, 4]]), torch.tensor([[0, 4, 2, 3, 0, 1]])
    with torch.no_grad():
        bare, coded = ([attention(words(ids) + where).mean(1) for ids in (cat, mat)] for where in (0.0, rows[:6]))
    torch.testing.assert_close(*bare)
    assert (coded[0] - coded[1]).abs().max() > 1e-2


def smallest_gap(width, n):
    """The smallest distance between the codes of two of n places, and at how many steps; by the law above."""
    steps = torch.arange(1, n, dtype=torch.float64)
    squares = sum(torch.sin(steps / 10000 ** (i / width) / 2) ** 2 for i in range(0, width, 2))
    gap = 2 * squares.sqrt()
    return gap.min().item(), int(gap.argmin()) + 1


def read_offset(a, b, width, pairs):
    """The offset of two codes from these pairs alone: the slowest says about where, each faster one says it finer."""
    angular, wide = 10000 ** (-torch.arange(0, width, 2).double() / width), [x.double() for x in (a, b)]
    (sin_a, cos_a), (sin_b, cos_b) = ((x[..., 0::2], x[..., 1::2]) for x in wide)
    angle = torch.atan2(sin_b * cos_a - cos_b * sin_a, cos_b * cos_a + sin_b * sin_a)
    slowest = pairs[-1]
    offset = angle[..., slowest] / angular[slowest]
    for i in reversed(pairs[:-1]):
        turns = ((offset * angular[i] - angle[..., i]) / (2 * math.pi)).round()
        offset = (angle[..., i] + 2 * math.pi * turns) / angular[i]
    return offset


@pytest.mark.claim("A3.3", "holds")
def test_each_place_has_a_pattern_of_its_own_and_offsets_are_read_at_several_scales():
    """Unique to 65,536 places. At several scales: slow pairs say about where, fast ones exactly but only for near
    places, and all together exactly."""
    waves = Sinusoidal(512).wavelengths
    torch.testing.assert_close(waves[0].item(), 2 * math.pi)
    torch.testing.assert_close(waves[-1].item(), 2 * math.pi * 10000 ** (510 / 512))  # 60,611; not quite 10000 · 2π
    torch.testing.assert_close(waves[1:] / waves[:-1], (waves[1] / waves[0]).expand(255))

    # In wide codes the nearest two are neighbours, at every length. In narrow ones the gap shrinks as places are added.
    for width in (16, 64, 512):
        gaps = {smallest_gap(width, n) for n in (16, 1024, 65536)}
        assert len(gaps) == 1 and gaps.pop()[1] == 1
    narrow = [smallest_gap(4, n)[0] for n in (16, 1024, 65536)]
    assert narrow == pytest.approx([0.2885, 0.0724, 0.00768], rel=1e-2)
    rows = Sinusoidal(64)(200)
    assert torch.pdist(rows.double()).min() == pytest.approx(smallest_gap(64, 200)[0], abs=1e-6)

    # Rounded once to bfloat16, rows stay distinct. With places and angles in bfloat16 only 897 of 8192 are.
    n, width = 8192, 64
    code = Sinusoidal(width)(n).bfloat16()
    assert len(torch.unique(code.float(), dim=0)) == n
    angles = torch.arange(n).bfloat16()[:, None] / 10000 ** (torch.arange(0, width, 2) / width).bfloat16()
    assert len(torch.unique(torch.cat([angles.sin(), angles.cos()], 1).float(), dim=0)) == 897

    # Offsets from two codes of 8 bits, up to 8191 steps.
    steps = torch.arange(0, n - 100)
    a, b = code[100].expand(len(steps), -1), code[100 + steps]
    every = list(range(width // 2))
    assert torch.equal(read_offset(a, b, width, every).round().long(), steps)
    slow, fast = (read_offset(a, b, width, pairs) for pairs in ([width // 2 - 1], every[:8]))
    assert 3 < (slow - steps).abs().max() < 21  # about where
    near = steps < 20
    assert torch.equal(fast[near].round().long(), steps[near]) and (fast - steps).abs().median() > 1000  # only nearby


def test_the_code_is_in_float32_or_float64_and_its_angles_wider():
    code, exact = Sinusoidal(8), Sinusoidal(8).double()
    far = 10**6
    assert code(3).dtype == torch.float32 and exact(3).dtype == torch.float64
    assert code.bfloat16()(3, start=far).dtype == torch.float32
    assert (code(3, start=far) - exact(3, start=far)).abs().max() < 1e-7
    assert math.sin(far + 2) == pytest.approx(exact(3, start=far)[2, 0].item(), abs=1e-12)
    assert list(code.state_dict()) == [] and list(code.parameters()) == []


def test_scale_and_base():
    torch.testing.assert_close(Sinusoidal(8, scale=0.02)(5), 0.02 * Sinusoidal(8)(5))
    assert Sinusoidal(8, base=16.0).wavelengths.tolist() == pytest.approx([2 * math.pi * 2**i for i in range(4)])
    assert Sinusoidal(6)(4).norm(dim=1).tolist() == pytest.approx([3**0.5] * 4)


@pytest.mark.parametrize("kind", [lambda: Sinusoidal(4), lambda: LearnedPositions(99, 4)])
def test_read_in_parts_and_packed_both_count_alike(kind):
    positions, ids = kind().double(), torch.zeros(2, 5, dtype=torch.long)
    reset = torch.tensor([[False, False, True, False, False], [True, False, False, False, True]])
    expected = positions.at(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]))
    torch.testing.assert_close(positions.of_sequences(ids, reset=reset), expected)
    cache = positions.new_cache()
    parts = [positions.of_sequences(i, cache=cache, reset=r) for i, r in zip(ids.split(2, 1), reset.split(2, 1))]
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    torch.testing.assert_close(positions.of_sequences(ids), positions(5))
    torch.testing.assert_close(positions(3, start=20), positions(23)[20:])
    with pytest.raises(ValueError, match="cache must be of ids' batch 3, got one of 2"):
        positions.of_sequences(torch.zeros(3, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: Sinusoidal(7), ValueError, "d_model must be even and 2 or more, a sine and a cosine each, got 7"),
        (lambda: Sinusoidal(0), ValueError, "d_model must be even and 2 or more, .*, got 0"),
        (lambda: Sinusoidal(8, base=1.0), ValueError, "base must be above 1, got 1.0"),
        (lambda: Sinusoidal(8)(3, start=-1), ValueError, "positions must be 0 or more, got 3 from -1"),
        (lambda: Sinusoidal(8)(-1), ValueError, "positions must be 0 or more, got -1 from 0"),
        (lambda: Sinusoidal(8).at([1]), TypeError, "index must be a Tensor, got list"),
        (lambda: AddedPositions().at(torch.arange(3)), NotImplementedError, r"must have a method at\(index\)"),
    ],
)
def test_a_code_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()
