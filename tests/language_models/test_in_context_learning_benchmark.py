"""benchmarks/in_context.py: that it runs, how rates are chosen, and that its map and its rates are right."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks import in_context, in_context_few, in_context_run
from benchmarks.in_context import SEEDS, SWEEP_SEED, index, interval, swept
from benchmarks.in_context_run import MAPPED, NOISE, PENALTY, D, Run, carry_out, on_the_map, one_step
from nondual.language_models.in_context_learning import gradient_descent, predict, ridge, stored_tasks
from nondual.language_models.in_context_learning.functions import dense, linear


@pytest.fixture
def small(monkeypatch):
    """Few prompts and short ones; as many threads after the test as before it."""
    for name, value in {"TESTED": 20, "LONGEST_FLIPS": 40, "COINS": 20}.items():
        monkeypatch.setattr(in_context_run, name, value)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_runs_and_writes_nothing(small, monkeypatch, capsys):
    monkeypatch.setattr(in_context, "write", None)  # to call it would raise
    in_context.main(["--tiny"])
    said = capsys.readouterr().out
    assert "functions 16" in said and "layer 16" in said and "coins 1" in said and "one layer" in said


def test_the_one_of_three_tasks_runs_and_writes_nothing(small, monkeypatch, capsys):
    monkeypatch.setattr(in_context_few, "write", None)
    in_context_few.main(["--tiny"])
    assert "functions 3" in capsys.readouterr().out


def test_a_run_is_kept_and_not_made_again(small, tmp_path, monkeypatch):
    run = Run("coins 4", 1e-3, 3, 2, tmp_path)
    first = carry_out(run)
    assert (
        run.file.exists() and first["unchanged"] and set(first["divergence"]) == {"from Beta(1, 1)", "from Beta(4, 4)"}
    )
    monkeypatch.setattr(in_context_run, "of_coins", None)
    assert carry_out(run) == first
    assert SWEEP_SEED not in SEEDS


def test_a_rate_at_the_edge_is_not_taken_before_two_beyond_it_are_tried(tmp_path, monkeypatch):
    tried = []

    def loss(run):
        tried.append(run.rate)
        return {"loss": 1 / run.rate}

    monkeypatch.setattr(in_context, "carry_out", loss)
    sweep, best = swept("coins 1", tmp_path, tiny=False)
    assert best == max(sweep) == 3.2e-2 and tried == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]


def test_the_corners_of_the_map_lie_at_the_corners():
    given, tasks = in_context_run.tested(linear()), dense(16, D, torch.Generator().manual_seed(1000))
    at = torch.arange(given.x.shape[1]) == MAPPED
    corners = (
        stored_tasks(given.x, given.y, tasks, NOISE),
        ridge(given.x, given.y, PENALTY),
        gradient_descent(given.x, given.y, steps=1, rate=one_step(MAPPED)),
    )
    said = [predict(weights, given.x)[:, at][:, 0] for weights in corners]
    for i, one in enumerate(said):
        found = on_the_map(one, given, None)
        assert [abs(share - (i == j)) < 1e-3 for j, share in enumerate(found["shares"])] == [True] * 3
        assert found["left over"] < 1e-9 and found["distances"][i] < 1e-9
    middle = on_the_map((said[0] + said[1]) / 2, given, None)
    assert middle["shares"] == pytest.approx([0.5, 0.5, 0], abs=1e-3)


def test_one_step_has_the_rate_with_the_least_error():
    given = in_context_run.tested(linear())

    def error(rate):
        said = predict(gradient_descent(given.x, given.y, steps=1, rate=rate), given.x)
        return (said - given.target)[:, MAPPED].square().mean().item()

    best = min((0.02 * i for i in range(1, 60)), key=error)
    assert best == pytest.approx(one_step(MAPPED), abs=0.05)


def test_the_index_tells_the_two_bayesians_apart():
    far, near = [1.0] * 32, [0.0] * 32
    run = {"distances": {"new": {"ridge": far, "stored tasks": near}}}
    assert index(run, "new") == 1
    run = {"distances": {"new": {"ridge": near, "stored tasks": far}}}
    assert index(run, "new") == -1


def test_an_interval_of_three_by_hand():
    assert interval([1.0, 2.0, 3.0]) == {
        "mean": 2.0,
        "low": round(2 - 4.303 / 3**0.5, 5),
        "high": round(2 + 4.303 / 3**0.5, 5),
    }
