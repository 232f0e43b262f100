"""benchmarks/shakespeare.py: how rates are chosen, what its intervals are, and that its models differ in one thing."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.shakespeare import RATES, SEEDS, SWEEP_SEED, best_rate, difference
from benchmarks.shakespeare_run import MODELS, Convolved, Run, size


def test_the_rate_is_the_best_of_those_that_did_not_diverge(tmp_path):
    runs = [Run("mamba", rate, SWEEP_SEED, 10, tmp_path) for rate in RATES]
    for run, bits in zip(runs, (3.0, 2.5, 2.4, 2.6, None), strict=True):
        run.file.write_text(json.dumps({"chosen_on_bits": bits}))
    assert best_rate("mamba", runs) == RATES[2]
    for run in runs:
        run.file.write_text(json.dumps({"chosen_on_bits": None}))
    with pytest.raises(RuntimeError, match="mamba diverged at every rate"):
        best_rate("mamba", runs)


def test_the_seeds_that_are_reported_had_no_part_in_choosing_the_rate():
    assert SWEEP_SEED not in SEEDS and len(set(SEEDS)) == len(SEEDS) == 3


def test_the_interval_of_three_differences_by_hand():
    found = difference([2.0, 2.2, 2.4], [1.0, 1.1, 1.2])  # differences 1.0, 1.1, 1.2: mean 1.1, deviation 0.1
    assert found["each"] == [1.0, 1.1, 1.2] and found["mean"] == 1.1
    half = 4.303 * 0.1 / 3**0.5
    assert found["interval"] == pytest.approx([1.1 - half, 1.1 + half], abs=1e-4)


def test_the_five_models_are_of_one_size_and_the_controls_differ_in_the_convolution():
    torch.manual_seed(0)
    models = {name: make(60) for name, make in MODELS.items()}
    sizes = {name: size(model) for name, model in models.items()}
    assert max(sizes.values()) <= 1.02 * min(sizes.values()), sizes

    def shapes(name, without=""):
        state = models[name].state_dict()
        return {key: tuple(x.shape) for key, x in state.items() if not without or without not in key}

    assert shapes("mamba", "conv1d.weight") == shapes("mamba, no convolution", "conv1d.weight")
    added = [key for key in shapes("transformer, convolution") if "conv1d" in key]
    assert len(added) == 2 * 2  # a weight and a bias in each of two layers
    assert sum(isinstance(module, Convolved) for module in models["transformer, convolution"].modules()) == 2
    rest = {key.replace("mixer.mixer.", "mixer."): x for key, x in shapes("transformer, convolution", "conv1d").items()}
    assert rest == shapes("transformer")
