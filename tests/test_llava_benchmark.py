"""benchmarks/captions.py, llava.py and flamingo.py: texts and labels, batches, and what is asked, on small models."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nondual.language_models.gpt import GPT
from nondual.multimodal.flamingo import Flamingo
from nondual.multimodal.llava import Llava, Projector

ROOT = Path(__file__).parent.parent
STOP = 30


@pytest.fixture(scope="module")
def modules():
    """The benchmarks, by name."""
    sys.path.insert(0, str(ROOT))
    try:
        return {name: importlib.import_module(f"benchmarks.{name}") for name in ("captions", "llava", "flamingo")}
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def captions(modules):
    return modules["captions"]


@pytest.fixture
def data(captions):
    """Eight concepts of one picture each; the first five are trained on, the last three are tested."""
    draw = torch.Generator().manual_seed(0)
    patches = torch.randn(8, captions.VIEWS, 16, 128, generator=draw)
    tokens = [[3], [4, 5], [6], [7, 8, 9], [10, 11], [12], [13, 14], [15]]
    row = torch.arange(8)
    names = tuple(f"thing {i}" for i in range(8))
    groups = ("a", "b") * 4
    return captions.Captions(
        patches, row, row[:5], names, groups, tokens, row[5:6], row[5:], row.repeat(3, 1), names, torch.arange(3)
    )


@pytest.fixture
def asked(captions):
    """A small LLaVA with one vector a picture, and its task."""
    torch.manual_seed(0)
    model = Llava(nn.Identity(), GPT(40, 12, 2, 3, max_len=24), Projector(128, 12, layers=1), mark=-200, d_vision=128)
    with torch.no_grad():
        model.language_model.embeddings.weight.normal_()
    return model.eval(), captions.Task(None, [1, -200], True, lambda model: {}, lambda model, data: {})


def test_a_text_is_prompt_name_and_full_stop_and_only_the_last_two_are_learnt(captions):
    ids, labels = captions.texts([[5], [6, 7]], [1, -200])
    assert ids.tolist() == [[1, -200, 5, STOP, STOP], [1, -200, 6, 7, STOP]]
    assert labels.tolist() == [[-100, -100, 5, STOP, -100], [-100, -100, 6, 7, STOP]]


@torch.no_grad()
def test_nats_are_what_the_models_own_loss_averages(captions, asked, data):
    model, task = asked
    ids, labels = captions.texts(data.tokens[5:], task.prompt)
    images = task.vectors(data.patches[5:, 0])
    each = captions.nats(model, ids, images, labels)
    assert images.shape == (3, 1, 128) and each.shape == (3, ids.shape[1] - 1)
    torch.testing.assert_close(each.sum() / (labels != -100).sum(), model.loss(ids, images, labels))


@torch.no_grad()
def test_losses_stand_in_the_order_that_was_asked_for(captions, asked, data):
    model, task = asked
    which = torch.tensor([6, 5, 7])
    found = captions.losses(model, task, data, which)
    for loss, i in zip(found, which.tolist()):
        ids, labels = captions.texts([data.tokens[i]], task.prompt)
        torch.testing.assert_close(loss, model.loss(ids, task.vectors(data.patches[i : i + 1, 0]), labels))


@torch.no_grad()
def test_the_likeliest_name_is_chosen_and_the_one_that_gains_most(captions, asked, data, monkeypatch):
    """With three names all are on the shortlist: both choices against every name scored by itself."""
    monkeypatch.setattr(captions, "SHORTLIST", 3)
    model, task = asked
    captions_of = [data.tokens[int(i)] for i in data.test]
    average = task.vectors(data.patches[data.train, 0].mean(0, keepdim=True))

    def score(name, image):
        ids, labels = captions.texts([name], task.prompt)
        return -float(model.loss(ids, image, labels)) * (len(name) + 1)

    table = torch.tensor(
        [[score(n, task.vectors(data.patches[i : i + 1, 0])) for n in captions_of] for i in data.test.tolist()]
    )
    prior = torch.tensor([score(n, average) for n in captions_of])
    found = captions.choices(model, task, data)
    assert found == {"chosen": table.argmax(1).tolist(), "gained": (table - prior).argmax(1).tolist()}


def test_a_batch_has_names_of_about_one_length_and_the_deaf_see_other_pictures(captions, asked, data, monkeypatch):
    monkeypatch.setattr(captions, "BATCH", 4)
    _, task = asked
    marked = torch.arange(8.0)[:, None, None, None].expand_as(data.patches)  # every picture is its own number
    data = data._replace(patches=marked)
    strangers = 0
    for seed in range(20):
        own, other = (
            captions.batch_of(task, data, deaf, torch.Generator().manual_seed(seed)) for deaf in (False, True)
        )
        assert torch.equal(own[0], other[0]) and torch.equal(own[2], other[2])  # the same texts
        for row, picture in zip(own[0].tolist(), own[1][:, 0, 0].tolist()):
            name = data.tokens[int(picture)]
            assert row[2 : 2 + len(name)] == name and picture < 5  # a name with its own picture, of the training
        strangers += int((own[1] != other[1])[:, 0, 0].sum())
    assert strangers > 20


def test_differences_are_paired_by_concept_and_shares_count_groups(captions, data):
    a, b = [{"test": [1.0, 2.0, 3.0]}], [{"test": [2.0, 4.0, 3.0]}]
    found = captions.difference(a, b)
    assert found["interval"][0] == -1 and found["by seed"] == [-1]
    shares = captions.shares(data, [0, 1, 0])  # concepts 5, 6, 7 of groups b, a, b
    assert math.isclose(shares["name"][0], 2 / 3, abs_tol=1e-3) and shares["group"][0] == 1
    less = captions.compared(data, [0, 1, 0], [1, 1, 2])  # names: one right more, one less; groups: one right more
    assert less["name"][0] == 0 and math.isclose(less["group"][0], 1 / 3, abs_tol=1e-3)


@torch.no_grad()
def test_a_swapped_picture_moves_no_caption_before_it(modules, data, monkeypatch):
    monkeypatch.setattr(modules["flamingo"], "INTRODUCTION", (20, 21))
    monkeypatch.setattr(modules["flamingo"], "MARK", 39)
    torch.manual_seed(0)
    resampler = modules["flamingo"].PerceiverResampler(128, 4, n_layers=1, n_heads=2, d_head=8)
    model = Flamingo(
        nn.Identity(), GPT(40, 12, 2, 3, max_len=24), resampler, mark=39, d_vision=128, n_heads=2, d_head=4, d_ff=8
    ).eval()
    test = torch.tensor([4, 5, 6, 7])
    shut = modules["flamingo"].swapped(model, data._replace(test=test))
    assert all(each["largest"] == 0 for picture in shut.values() for each in picture.values())
    for layer in model.gated_layers:
        layer.attention_gate.fill_(1.0)
    found = modules["flamingo"].swapped(model, data._replace(test=test))
    assert found["second picture swapped"]["first caption"]["largest"] == 0
    assert found["second picture swapped"]["second caption"]["largest"] > 1e-4
    assert found["first picture swapped"]["first caption"]["largest"] > 1e-4


def test_captions_are_written_by_the_weights_that_the_training_kept_and_written_once(
    modules, captions, data, monkeypatch, tmp_path
):
    flamingo, asked = modules["flamingo"], []

    def made(arm):
        torch.manual_seed(0)
        model, resampler = GPT(40, 12, 2, 3, max_len=24), flamingo.PerceiverResampler(128, 4, n_layers=1, d_head=8)
        return Flamingo(nn.Identity(), model, resampler, mark=39, d_vision=128, n_heads=2, d_head=4, d_ff=8)

    def written(model, task, data, shown):
        asked.append((shown, {round(float(gate), 4) for layer in model.gated_layers for gate in layer.openness()}))
        return [{"name": "thing 5", "written": "thing"}]

    monkeypatch.setattr(captions, "written", written)
    monkeypatch.setattr(captions.Plan, "best", lambda self, arm: 1e-3)
    trained = made("gated")
    with torch.no_grad():
        for layer in trained.gated_layers:
            layer.attention_gate.fill_(1.0)
            layer.feed_forward_gate.fill_(1.0)
    torch.save(trained.trained_state_dict(), tmp_path / "flamingo_gated_0.001_1_7.pt")
    task = flamingo.TASK._replace(made=made)
    whole = captions.Plan("flamingo", task, tmp_path, 7, (1, 2), first={"gated": 1e-3}, of={})
    for _ in range(2):
        assert captions.all_written(whole, "gated", data) == [{"name": "thing 5", "written": "thing"}]
    assert asked == [(3, {round(math.tanh(1.0), 4)})]  # all three test pictures, by open gates, once


@pytest.mark.parametrize("least, tried", [(1e-2, 4), (3e-3, 3), (1.0, 7), (1e-4, 5)])
def test_a_rate_is_chosen_whose_neighbours_are_worse(captions, monkeypatch, tmp_path, least, tried):
    """Losses that rise on both sides of one rate: it is found from afar, and no rate is trained with twice."""
    ladder, runs = captions.LADDER, []

    def carry_out(run, task):
        runs.append(run.rate)
        assert run.seed == captions.SWEEP_SEED and run.asked == "tune" and run.steps == 7
        return {"tune": abs(ladder.index(run.rate) - ladder.index(least))}

    monkeypatch.setattr(captions, "carry_out", carry_out)
    whole = captions.Plan("llava", None, tmp_path, 7, (1, 2), first={"linear": 3e-3}, of={"deaf": "linear"})
    assert whole.best("deaf") == least and len(runs) == len(set(runs)) == tried
