"""benchmarks/summary.py: that it runs, that its laws are right by hand, and that its arms differ in their rule."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import summary, summary_run
from benchmarks.recall_run import size
from benchmarks.summary import ARMS, SEEDS, SWEEP_SEED, delta_law, merit, swept
from benchmarks.summary_run import STATE, WIDTH, bits, mixer, pairs

EVERY_ARM = sorted({arm for arms in ARMS.values() for arm in arms})


@pytest.fixture
def threads():
    """As many threads after the test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_runs_and_writes_nothing(threads, monkeypatch, capsys):
    monkeypatch.setattr(summary, "write", None)  # to call it would raise
    monkeypatch.setattr(summary, "ARMS", {"recall": ("softmax", "sum"), "parity": ("delta", "delta 2")})
    monkeypatch.setattr(summary, "WIDTHS", (16,))
    monkeypatch.setattr(summary, "BETWEEN", (0, 2))
    summary.main(["--tiny"])
    said = capsys.readouterr().out
    assert "recall softmax" in said and "parity delta 2" in said and "'overwriting'" in said


def test_a_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    run = summary_run.Run("parity", "delta 2", 1e-2, 3, 2, tmp_path)
    first = summary_run.carry_out(run)
    assert run.file.exists() and first["seed"] == 3 and len(first["right"]) == summary_run.READ
    monkeypatch.setattr(summary_run, "counted", None)
    assert summary_run.carry_out(run) == first


@pytest.mark.parametrize("d", [1, 2, 7])
def test_the_law_of_the_delta_rule_by_hand(d):
    """One pair is read exactly. Of two, the second is, and the first is missed by (k1 · k2)(v2 - (k1 · k2) v1)."""
    assert delta_law(1, d) == 0
    square, fourth = 1 / d, 3 / (d * (d + 2))  # of k1 · k2
    assert delta_law(2, d) == pytest.approx((square + fourth) / 2)


def test_a_rate_is_judged_by_longer_rows_where_there_are_any_and_the_grid_grows_at_its_edge(monkeypatch, tmp_path):
    assert merit({"loss": 0.5}) < merit({"loss": 0.1, "choose": 0.6}) < merit({"failed": "the loss is nan"}) == math.inf
    monkeypatch.setattr(summary, "carry_out", lambda run: {"loss": abs(math.log(run.rate / 0.08))})
    sweep, best = swept("recall", "sum", (3e-3, 1e-2, 3e-2), 1, tmp_path)
    assert best == 0.09 and list(sweep) == [3e-3, 1e-2, 3e-2, 0.09, 0.3]


def test_where_other_seeds_do_worse_the_second_best_rate_is_tried_with_them(monkeypatch, tmp_path):
    losses = {(3e-3, 0): 0.9, (1e-2, 0): 0.5, (3e-2, 0): 0.6}

    def carry_out(run):
        return {"loss": losses.get((run.rate, run.seed), {3e-3: 2.0, 1e-2: 1.5, 3e-2: 0.7}[run.rate])}

    monkeypatch.setattr(summary, "carry_out", carry_out)
    found = summary.trained("recall", "gated", tmp_path, False)
    assert found["rate"] == 0.03 and len(found["runs"]) == 8
    assert found["tried_with_eight_seeds"] == {"0.01": 1.5, "0.03": 0.7}
    losses[1e-2, 0] = 1.45
    losses[3e-2, 0], losses[3e-3, 0] = 1.5, 1.5
    assert summary.trained("recall", "gated", tmp_path, False)["rate"] == 0.01


def test_the_seeds_that_are_reported_had_no_part_in_choosing_the_rate():
    assert SWEEP_SEED not in SEEDS and len(SEEDS) == 8


def test_the_arms_of_recall_are_of_one_size_in_parameters_and_state():
    sizes, states = {}, {}
    for arm in ARMS["recall"]:
        module, states[arm] = mixer(arm)
        sizes[arm] = size(module)
    assert max(sizes.values()) < 1.15 * min(sizes.values())
    assert states.pop("softmax") == 2 * STATE and states.pop("linear") == STATE * (STATE + 1)
    assert set(states.values()) == {STATE**2}


@pytest.mark.parametrize("arm", EVERY_ARM)
def test_no_arm_sees_what_comes_later(arm):
    torch.manual_seed(0)
    module, x = mixer(arm)[0], torch.randn(2, 11, WIDTH)
    changed = x.clone()
    changed[:, 7:] += 1
    torch.testing.assert_close(module(changed)[:, :7], module(x)[:, :7])
    assert (module(changed)[:, 7:] - module(x)[:, 7:]).abs().max() > 1e-4


def test_the_two_arms_of_the_delta_rule_start_from_the_same_numbers():
    torch.manual_seed(0)
    one = mixer("delta")[0].state_dict()
    torch.manual_seed(0)
    other = mixer("delta 2")[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_the_models_read():
    (row,), parity = bits(50, 3, torch.Generator().manual_seed(0))
    assert parity[:, -1].tolist() == [int(sum(each) % 2) for each in row.tolist()]
    (keys, values), answers = pairs(2, 5, torch.Generator().manual_seed(0))
    for i in range(2):
        held = dict(zip(keys[i, :5].tolist(), values[i, :5].tolist()))
        assert len(held) == 5 and answers[i].tolist() == [held[key] for key in keys[i, 5:].tolist()]
