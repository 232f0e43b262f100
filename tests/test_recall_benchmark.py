"""benchmarks/recall.py: that it runs, how rates are chosen, what counts as recalled, and that arms are of one size."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import recall, recall_run
from benchmarks.recall import FEW, MANY, SWEEP_SEED, by_rule, merit, most_recalled
from benchmarks.recall_run import EEG_PARTS, chrono, eeg_model, eeg_windows, gap_model, mixers, one_of, pairs, size


@pytest.fixture
def threads():
    """As many threads after the test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_runs_and_writes_nothing(threads, monkeypatch, capsys):
    monkeypatch.setattr(recall, "write", None)  # to call it would raise
    recall.main(["--tiny"])
    said = capsys.readouterr().out
    assert "recall LSTM 64" in said and "gap 3 x 1 attention" in said and "EEG attention" in said


def test_a_run_is_kept_and_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recall_run, "LONGEST", 2)
    run = recall_run.Run("recall", "LSTM 8", 1e-2, 3, 2, tmp_path)
    first = recall_run.carry_out(run)
    assert run.file.exists() and first["seed"] == 3 and len(first["right"]) == len(first["bits"]) == 2
    monkeypatch.setattr(recall_run, "tabled", None)
    assert recall_run.carry_out(run) == first


def test_what_is_recalled_ends_at_the_first_number_that_is_not():
    assert most_recalled([1.0, 0.95, 0.9, 0.89, 0.95]) == 3
    assert most_recalled([0.5]) == 0 and most_recalled([0.9, 0.9]) == 2


def test_a_rate_is_judged_by_the_loss_or_by_what_it_took_to_succeed():
    assert merit({"loss": 0.5}) < merit({"loss": 0.6}) < merit({"failed": "the loss is nan"})
    assert merit({"steps": 100, "best": 1.0}) < merit({"steps": 200, "best": 0.99})
    assert merit({"steps": 400, "best": 1.0}) < merit({"steps": 400, "best": 0.9}) < merit({"steps": 400, "best": 0.5})


def test_the_seeds_that_are_reported_had_no_part_in_choosing_the_rate():
    assert SWEEP_SEED not in MANY and set(FEW) < set(MANY) and len(MANY) == 8


def test_the_three_arms_of_recall_are_of_one_size():
    sizes = {}
    for arm in ("LSTM 64", "Mamba 16", "attention 64"):
        width, blocks, state = mixers(arm)
        sizes[arm] = sum(size(block) for block in blocks)
        assert width == 64 and state == {"LSTM 64": 128, "Mamba 16": 128 * 19, "attention 64": 0}[arm]
    assert max(sizes.values()) < 1.2 * min(sizes.values()), sizes
    eeg = [size(eeg_model(arm)) for arm in ("attention", "LSTM", "attention, ALiBi")]
    assert max(eeg) < 1.25 * min(eeg), eeg


def test_one_pair_can_be_known_from_the_start_of_training():
    torch.manual_seed(0)
    (keys, values), answers = one_of(pairs, torch.Generator().manual_seed(0))
    assert keys.shape == values.shape and answers.shape == (32, 8) and keys.max() < 16
    model = gap_model("LSTM, chrono", 7)
    assert model((torch.zeros(2, 9, dtype=torch.long),)).shape == (2, 9, 8)


def test_chrono_cells_last_from_one_step_to_the_gap():
    torch.manual_seed(0)
    hidden = 400
    bias = dict(chrono(4, hidden, 100).network.named_parameters())["bias_ih_l0"]
    forget = torch.sigmoid(bias[hidden : 2 * hidden])
    lasts = 1 / (1 - forget)  # the steps after which a cell has lost all but 1/e
    assert 2 < lasts.min() < 6 and 95 < lasts.max() <= 100 and 45 < lasts.mean() < 56
    torch.testing.assert_close(torch.sigmoid(bias[:hidden]), 1 - forget)


def test_the_parts_of_the_recording_do_not_overlap_and_the_targets_are_the_samples_after():
    assert EEG_PARTS["train"].stop == EEG_PARTS["choose"].start and EEG_PARTS["choose"].stop == EEG_PARTS["test"].start
    (x,), after = eeg_windows("test")
    whole = recall_run.eeg()[EEG_PARTS["test"]]
    assert torch.equal(x[5], whole[5:69]) and torch.equal(after[5, 10], whole[16:20].flatten())
    assert len(x) == 160 - 64 - 4 + 1 and torch.equal(after[-1, -1], whole[-4:].flatten())


def test_linear_regression_beats_the_last_value_on_the_recording():
    found = by_rule()
    assert found["linear"]["test"] < found["last value"]["test"]
