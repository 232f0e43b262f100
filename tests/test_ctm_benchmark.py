"""benchmarks/ctm*.py: that they run, that the twins differ in one thing, and what is measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import ctm, ctm_run
from benchmarks.ctm_run import (
    BITS,
    Inputs,
    LSTMThinker,
    draw,
    lstm_width,
    machine,
    model_of,
    parameters,
    parity,
    right,
    stopped,
    stopping_ticks,
    surest,
)
from nondual.recent import Thoughts


@pytest.fixture(autouse=True)
def threads():
    """As many threads after a test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def thoughts_of(certainties: torch.Tensor, classes: torch.Tensor) -> Thoughts:
    """Thoughts that name these classes (B, T)."""
    return Thoughts(torch.nn.functional.one_hot(classes, 5).float(), certainties, certainties[..., None], None)


# --- tasks and models ----------------------------------------------------------------------------------------------


def test_parity_by_hand():
    bits, answers = parity(50, torch.Generator().manual_seed(0))
    assert bits.shape == answers.shape == (50, BITS)
    for row, answer in zip(bits.tolist(), answers.tolist()):
        assert answer == [sum(row[: i + 1]) % 2 for i in range(BITS)]


def test_a_seed_gives_all_arms_the_same_batches():
    for task in ("digits", "parity"):
        a, b = (draw(task, torch.Generator().manual_seed(4)) for _ in range(2))
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y)


@pytest.mark.parametrize("task", ["fashion", "digits", "parity"])
def test_the_lstm_has_as_many_parameters(task):
    ours, theirs = parameters(machine(task)), parameters(LSTMThinker(task, lstm_width(task)))
    assert 0.97 < theirs / ours <= 1


def test_the_twins_differ_in_their_part_alone():
    ours = machine("digits")
    private = sum(p.numel() for p in ours.neurons.parameters())
    for arm in ("states", "shared"):
        twin = model_of("digits", arm)
        assert twin.output.size == ours.output.size and twin.action.size == ours.action.size
        missing = parameters(ours) - parameters(twin)
        shared = sum(p.numel() for p in twin.neurons.parameters())
        assert missing == {"states": 128, "shared": private - shared}[arm]
    assert parameters(model_of("digits", "CTM, 2 ticks")) == parameters(ours)


def test_states_are_read_as_they_are():
    module, z = ctm_run.States(torch.tensor([[0, 2], [0, 2]]), 3), torch.tensor([[2.0, 3.0, 5.0]])
    assert module(z, module.new_state(1))[0].tolist() == [[2.0, 5.0]]


# --- what is measured ----------------------------------------------------------------------------------------------


def test_stopping_by_hand():
    """Three inputs, three ticks: one sure at tick 2, one at tick 1, one never (its surest is tick 2)."""
    sure = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.1, 0.1], [0.3, 0.6, 0.5]])
    y = torch.tensor([4, 4, 4])
    thoughts = thoughts_of(sure, torch.tensor([[0, 4, 0], [0, 4, 4], [0, 4, 0]]))
    table = right(thoughts, y)
    assert stopping_ticks(sure, 0.8).tolist() == [2, 1, 3]
    ticks, correct, dealt = stopped(thoughts, table, 0.8)
    assert (ticks, correct) == (2.0, pytest.approx(2 / 3))
    assert dealt == pytest.approx((1 + 0 + 1) / 3)  # ticks 2, 1, 2: right in 3, 0 and 3 of 3
    assert surest(thoughts, table).tolist() == [1, 0, 1]


def test_right_answers_of_several_questions_are_averaged():
    predictions = torch.nn.functional.one_hot(torch.tensor([[[1, 0], [1, 1]]]), 2).float()
    thoughts = Thoughts(predictions, torch.zeros(1, 2), torch.zeros(1, 2, 1), None)
    assert right(thoughts, torch.tensor([[1, 1]])).tolist() == [[0.5, 1.0]]


def test_rank_correlation_is_spearmans():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (2, 60), generator=draw).float()
    assert abs(ctm.rank_correlation(a, a + b) - spearmanr(a, a + b).statistic) < 1e-9


def test_what_is_hidden_and_how_much():
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + 1
    shares = [(ctm.hidden(x, share) == 0) for share in (0.0, 0.2, 0.6)]
    assert [mask.sum().item() / x.numel() for mask in shares] == pytest.approx([0, 10 / 49, 29 / 49])
    assert (shares[2] | ~shares[1]).all()
    assert torch.equal(ctm.hidden(x, 0.0), x)
    assert torch.equal(ctm.noisy(x, 0.0), x)


def test_the_best_rate_is_inside_its_grid(monkeypatch, tmp_path):
    tune = {4e-3: 0.5, 8e-3: 0.6, 1.6e-2: 0.7, 3.2e-2: 0.8, 6.4e-2: 0.1}
    monkeypatch.setattr(ctm, "carry_out", lambda run: {"tune": tune[run.rate]})
    found = ctm.sweep(ctm.Plan(ctm.STEPS, tmp_path), "digits", "CTM")
    assert list(found) == sorted(tune) and ctm.best_of(found) == 3.2e-2


def test_a_stored_model_says_the_same(tmp_path):
    torch.manual_seed(0)
    model = model_of("fashion", "CTM").eval()
    ctm.store(model, tmp_path / "ctm.safetensors")
    x = Inputs(torch.randn(5, 1, 28, 28), torch.zeros(5))
    again = ctm.load(tmp_path / "ctm.safetensors")
    torch.testing.assert_close(again(x.x).predictions, model(x.x).predictions, rtol=1e-2, atol=1e-2)
    assert torch.equal(again.output.pairs, model.output.pairs)
    assert (tmp_path / "ctm.safetensors").stat().st_size < 300_000


@pytest.mark.timeout(400)
def test_it_runs_and_keeps_what_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(ctm, "ARMS", {"fashion": ("CTM", "LSTM"), "digits": ("CTM", "states"), "parity": ("CTM",)})
    monkeypatch.setattr(ctm, "SHORTER", (1,))
    plan = ctm.Plan(dict.fromkeys(ctm.STEPS, 1), tmp_path, tiny=True)
    found = ctm.carry_out_all(plan)
    assert len(found["stopping"]["CTM"][0]) == len(ctm.THRESHOLDS)
    assert len(found["longer"]["LSTM"][0]["by_tick"]) == 16
    assert found["trained_ticks"]["1"]["by_tick"][0][0] == found["trained_ticks"]["1"]["test"][0]
    monkeypatch.setattr(ctm_run, "train", None)  # no run is made again
    assert json.dumps(ctm.carry_out_all(plan)) == json.dumps(found)  # as text, since nan is not nan
