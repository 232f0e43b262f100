"""What benchmarks share: plays in numbers, names of run files, intervals, sweeps with the best rate inside, stages."""

import math

import pytest
import torch

from benchmarks import intervals, plays, record, stages, sweeps


def test_intervals_of_a_mean():
    assert intervals.bootstrap(torch.full((9,), 0.25)) == (0.25, 0.25, 0.25)
    for mean, low, high in (
        intervals.bootstrap((torch.arange(400) % 2).float()),
        intervals.normal([i % 2 for i in range(400)]),
    ):
        assert mean == 0.5 and low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)
    assert intervals.by_seeds([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert intervals.by_seeds([1.0, 2.0]) is None


@pytest.mark.parametrize("peak, tried", [(2.0, [1, 2, 4]), (8.0, [1, 2, 4, 8, 16]), (0.5, [0.25, 0.5, 1, 2, 4])])
def test_a_grid_grows_until_the_best_rate_is_inside(peak, tried):
    found = sweeps.grown(lambda rate: abs(math.log(rate / peak)), (1.0, 2.0, 4.0))
    assert list(found) == tried and sweeps.lowest(found) == peak
    shares = sweeps.grown(lambda rate: -abs(math.log(rate / peak)), (1.0, 2.0, 4.0), sweeps.highest)
    assert list(shares) == tried and sweeps.highest(shares) == peak


def test_a_grid_of_one_rate_does_not_grow_and_a_bound_is_kept():
    assert sweeps.grown(lambda rate: rate, (4.0,)) == {4.0: 4.0}
    assert list(sweeps.grown(lambda rate: rate, (2.0, 4.0), beyond=2)) == [0.5, 1.0, 2.0, 4.0]
    assert sweeps.lowest({1.0: 2.0, 2.0: 1.0, 3.0: 1.0}) == 2.0 == sweeps.highest({1.0: 0.0, 2.0: 1.0, 3.0: 1.0})


def test_stages_are_read_again_until_their_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "cache_folder", lambda: tmp_path)
    source, asked = tmp_path / "bench.py", []
    source.write_text("1")

    def ask(stage, part):
        asked.append((stage, part))
        return {"part": part}

    parts = {"first": (1, 2), "second": ("a",)}
    expected = {"first": {"1": {"part": 1}, "2": {"part": 2}}, "second": {"a": {"part": "a"}}}
    assert stages.carried_out(str(source), parts, ask, tiny=True) == expected and len(list(tmp_path.iterdir())) == 1
    for _ in range(2):
        assert stages.carried_out(str(source), parts, ask, tiny=False) == expected
    assert len(asked) == 6
    source.write_text("2")
    assert stages.carried_out(str(source), parts, ask, tiny=False) == expected and len(asked) == 9


def test_plays_that_are_kept_apart_are_not_trained_on(monkeypatch):
    monkeypatch.setattr(plays, "shakespeare", lambda: {"one": "abcabc", "two": "cab", "three": "d"})
    read = plays.in_numbers(("two",))
    assert read.alphabet == ["a", "b", "c", "d"] and read.of["two"].tolist() == [2, 0, 1]
    assert read.train.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert plays.windows(read.of["one"], 2).tolist() == [[0, 1, 2], [2, 0, 1]]
    assert plays.windows(read.of["one"], 2, 1).tolist() == [[0, 1, 2]]
    some = plays.drawn(torch.arange(5), 40, 3, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in some.tolist()} == {(0, 1, 2, 3), (1, 2, 3, 4)}


def test_the_file_of_a_run_tells_it_from_others(tmp_path):
    name = record.run_file(tmp_path, "data recall", "two layers, wide", 0.003, 7, None).name
    assert name == "data-recall_two-layers-wide_0.003_7_None.json"
    assert record.run_file(tmp_path, 0.00001).name == "1e-05.json"
