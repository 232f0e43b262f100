"""benchmarks/ttt.py: that it runs, what its texts are, and that the memory of every model can be frozen."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks import ttt, ttt_run
from benchmarks.ttt_run import (
    ALPHABET,
    BINS,
    CHANGE,
    LONG,
    MIXERS,
    binned,
    enciphered,
    folded,
    model_of,
    size,
    without_a_model,
    writing,
)


@pytest.fixture
def threads():
    """As many threads after the test as before it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def short(monkeypatch):
    """Windows of 24 characters that change after 12, from texts made here."""
    text = folded("the quick brown fox jumps over the lazy dog " * 40)
    windows = text[: 25 * 4].view(4, 25)
    texts = ttt_run.Texts(text, windows, windows, windows.flip(0))
    monkeypatch.setattr(ttt_run, "read", lambda: texts)
    for name, value in {"CONTEXT": 20, "LONG": 24, "CHANGE": 12, "BINS": (0, 8, 24), "AFTER_BINS": (0, 12)}.items():
        monkeypatch.setattr(ttt_run, name, value)
    for name, value in {"CONTEXT": 20, "BINS": (0, 64, 1024), "read": lambda: texts}.items():
        monkeypatch.setattr(ttt, name, value)


def test_it_runs_and_writes_nothing(threads, short, monkeypatch, capsys):
    monkeypatch.setattr(ttt, "write", None)  # to call it would raise
    ttt.main(["--tiny"])
    said = capsys.readouterr().out
    assert "TTT-MLP" in said and "frozen less written" in said


def test_a_text_in_27_characters_and_in_a_cipher():
    ids = folded("Dharma-kṣetre,\n  Macbeth!")
    assert "".join(ALPHABET[i] for i in ids) == "dharma ksetre macbeth"
    rows = ids.repeat(3, 1)
    secret = enciphered(rows, torch.Generator().manual_seed(0))
    assert torch.equal(secret == 0, rows == 0) and not torch.equal(secret[0], secret[1])
    for row in secret:  # one for one
        assert (
            len(set(zip(ids.tolist(), row.tolist(), strict=True))) == len(set(ids.tolist())) == len(set(row.tolist()))
        )


def test_half_of_the_windows_change(short):
    text, generator = ttt_run.read().train, torch.Generator().manual_seed(0)
    whole = {tuple(window.tolist()) for window in text.unfold(0, 21, 1)}
    drawn = torch.cat([ttt_run.draw(generator) for _ in range(50)])
    unchanged = sum(tuple(window.tolist()) in whole for window in drawn) / len(drawn)
    assert drawn.shape[1] == 21 and 0.4 < unchanged < 0.6


def test_the_models_are_of_one_size_and_their_memories_can_be_frozen():
    sizes = [size(model_of(name)) for name in MIXERS]
    assert max(sizes) <= 1.01 * min(sizes) and LONG == 2 * CHANGE == BINS[-1]
    for name in ttt.FIXED:
        model, ids = model_of(name).eval(), torch.randint(27, (1, 30), generator=torch.Generator().manual_seed(0))
        caches = model.new_cache(1)
        with torch.no_grad(), writing(model, 0.0):
            model(ids, cache=caches)
        state = caches[0].state
        held, start = (
            (state, 0) if name == "linear attention" else (state.weights[0][0], model.layers[0].mixer.weights[0])
        )
        assert torch.equal(held, start + torch.zeros_like(held)), name
        assert model(ids).isfinite().all()


def test_two_who_know_nothing_of_a_cipher(short, monkeypatch):
    monkeypatch.setattr(ttt_run, "AFTER_BINS", (0, 1, 2))
    texts = ttt_run.Texts(torch.tensor([0, 1, 2, 3]), *[torch.zeros(1, 25, dtype=torch.long)] * 3)  # a space in four
    monkeypatch.setattr(ttt_run, "read", lambda: texts)
    found = without_a_model(texts.held_out)
    assert found["spaces"] == [2.0, 2.0]
    assert found["counting"] == pytest.approx([math.log2(27), math.log2(28 / 2)], abs=1e-4)


def test_bins_are_means_between_edges():
    assert binned(torch.arange(6.0), (0, 2, 6)) == [0.5, 3.5]


def test_a_run_is_kept_and_rates_go_beyond_the_edge(short, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(ttt, "carry_out", lambda run: kept.append(run.rate) or {"choose": abs(run.rate - 0.04)})
    assert list(ttt.swept("TTT-Linear", (0.005, 0.01, 0.02), 1, tmp_path)) == [0.005, 0.01, 0.02, 0.04, 0.08]
    run = ttt_run.Run("linear attention", 1e-2, 3, 1, tmp_path, 2)
    first = ttt_run.carry_out(run)
    assert run.file.exists() and set(first["after"]) == {"English", "cipher", "Sanskrit"}
    monkeypatch.setattr(ttt_run, "train", None)
    assert ttt_run.carry_out(run) == first
