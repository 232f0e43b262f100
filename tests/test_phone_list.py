"""benchmarks/phone_list.py: readers answer from what they read so far, and what was measured fits together."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MEASURED = json.loads((ROOT / "docs/measured/phone_list.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def phones():
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("benchmarks.phone_list")
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.parametrize("size", [5, None])
def test_an_answer_depends_on_the_pairs_read_so_far_and_on_no_later_one(phones, size):
    torch.manual_seed(0)
    model = phones.Reader(size)
    names, digits = phones.lists(7, torch.Generator().manual_seed(0))
    other = digits.clone()
    other[:, 5:] = (other[:, 5:] + 3) % phones.DIGITS
    first, second = (phones.answers(model, names, d) for d in (digits, other))
    read = torch.ones(phones.N, phones.N).tril().bool()[:5]
    torch.testing.assert_close(first[:, :5][:, read], second[:, :5][:, read])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_only_names_that_were_read_are_asked_for(phones):
    places = phones.some_places(50, torch.Generator().manual_seed(0))
    assert places.shape == (50, phones.N, phones.ASKED)
    assert (places <= torch.arange(phones.N)[:, None]).all() and (places >= 0).all()
    assert (places.amax((0, 2)) == torch.arange(phones.N)).all()


def test_a_look_up_learns_the_task_in_a_few_steps(phones):
    model = phones.trained(None, 1.2e-2, 0, 150)
    assert phones.tested(model, 1, 50)["right"][-1] > 0.95


def test_what_was_measured_fits_together(phones):
    figures = MEASURED["figures"]
    assert [model["size"] for model in figures["models"]] == [*phones.SIZES, None]
    assert MEASURED["steps"] == phones.STEPS and len(figures["pairs"]) == phones.SHOWN
    for model in figures["models"]:
        best = max(model["sweep"], key=lambda one: sum(one["right"]))
        assert best["rate"] == model["rate"] and [one["rate"] for one in model["sweep"]] == list(phones.RATES)
        assert [seed["seed"] for seed in model["seeds"]] == list(phones.SEEDS)
        for one in model["lists"]:
            assert [len(row) for row in one["answers"]] == [len(row) for row in one["sure"]] == list(range(1, 13))
