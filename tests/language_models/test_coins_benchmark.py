"""benchmarks/coins.py: how flips are written, how they are read back, and what they are compared with."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from benchmarks import coins as benchmark
from nondual.language_models.in_context_learning import coins

IDS = torch.tensor([[2, 1, 0, 1, 1], [2, 0, 0, 0, 1]])


class Words:
    """A tokenizer of one token a word, and a model that says the share of heads so far."""

    def encode(self, word, add_special_tokens):
        return [{" tails": 0, " heads": 1, ",": 2}[word]]

    def __call__(self, texts, return_tensors, add_special_tokens):
        rows = [text.removeprefix("Now: ").replace(",", " ,").split() for text in texts]
        return {"input_ids": torch.tensor([[("tails", "heads", ",").index(word) for word in row] for row in rows])}


def model(tokens):
    """Scores of 3 tokens: heads as its share of the flips so far plus one of each, and a tenth for the comma."""
    heads, tails = ((tokens == i).cumsum(1) + 1.0 for i in (1, 0))
    share = 0.9 * torch.stack([tails, heads], -1) / (heads + tails)[..., None]
    return type("Told", (), {"logits": torch.cat([share, torch.full_like(share[..., :1], 0.1)], -1).log()})


def test_flips_are_written_as_words_with_a_comma_after_each():
    assert benchmark.texts(IDS, "Now: ")[0] == "Now: heads, tails, heads, heads,"
    assert benchmark.texts(IDS, "")[1] == "tails, tails, tails, heads,"


def test_a_model_that_follows_laplace_s_rule_is_found_to(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 1)
    share, known = benchmark.read(model, Words(), IDS, "Now: ")
    exact = coins.posterior_predictive(IDS)[:, 1:]
    torch.testing.assert_close(share, exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(known, torch.full_like(known, 0.9), atol=1e-6, rtol=0)
    ids = coins.flips(8, 12, generator=torch.Generator().manual_seed(0))
    found = benchmark.judged(model, Words(), ids, "")
    assert abs(found["divergence"]["the model"]["mean"]) < 1e-6 < found["divergence"]["one half always"]["low"]
    for part in ("first eight flips", "last eight flips"):  # following the rule, it is nearer than one half
        assert found["the model - one half always"][part]["high"] < 0
    assert found["fitted"]["a"] == 1.0 and found["fitted"]["half-life"] is None
    assert found["correlation in the second half"] == pytest.approx(1, abs=1e-3)


def test_without_fading_it_is_the_exact_rule_and_with_much_the_last_flip_alone():
    torch.testing.assert_close(benchmark.fading(IDS, 3.0, 1e12), coins.posterior_predictive(IDS, a=3.0, b=3.0)[:, 1:])
    last = benchmark.fading(IDS, 1e-9, 1e-3)
    torch.testing.assert_close(last, (IDS[:, 1:] == 1).double(), atol=1e-6, rtol=0)
    # the second flip with a = 1 and a half-life of 1: (1 + 0.5) / (2 + 1.5)
    assert benchmark.fading(IDS, 1.0, 1.0)[0, 1] == pytest.approx(1.5 / 3.5)


def test_the_divergence_by_hand():
    half = torch.tensor([0.5], dtype=torch.float64)
    assert benchmark.divergence(half, half) == 0
    assert benchmark.divergence(half, torch.tensor([0.25])).item() == pytest.approx(0.5 * torch.tensor(4 / 3).log())
