"""Parts that are not trained: no gradients, evaluation mode, and nothing of them in a checkpoint."""

import pytest
import torch
from torch import nn

from nondual.multimodal.frozen import FrozenParts


class Two(FrozenParts):
    """A tower and a reader, one after the other."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
        self.reader = nn.Linear(4, 2)

    def forward(self, x):
        return self.reader(self.tower(x))


def test_a_frozen_part_has_no_gradient_and_the_rest_has():
    model = Two().freeze("tower")
    model(torch.ones(1, 3)).sum().backward()
    assert {name: p.grad is not None for name, p in model.named_parameters()} == {
        "tower.0.weight": False, "tower.0.bias": False, "reader.weight": True, "reader.bias": True,
    }  # fmt: skip


def test_dropout_in_a_frozen_part_stays_off_in_training_mode():
    model = Two().freeze("tower").train()
    assert model.training and model.reader.training
    assert not model.tower.training and not model.tower[1].training
    x = torch.ones(64, 3)
    assert torch.equal(model(x), model(x))
    assert model.freeze().train().tower[1].training  # thawed, it drops again
    assert not model.eval().tower.training


def test_freezing_again_freezes_what_is_named_and_nothing_else():
    model = Two().freeze("tower").freeze("reader")
    assert model.frozen == ("reader",)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    assert all(p.requires_grad for p in model.freeze().parameters())


def test_what_two_parts_share_is_frozen_with_either():
    model = Two()
    model.reader.weight = nn.Parameter(torch.randn(2, 4))
    model.tower.shared = nn.Module()
    model.tower.shared.weight = model.reader.weight
    model.freeze("tower")
    assert not model.reader.weight.requires_grad and model.reader.bias.requires_grad


def test_a_checkpoint_of_the_trained_parts_is_enough():
    model, other = Two().freeze("tower"), Two()
    state = model.trained_state_dict()
    assert sorted(state) == ["reader.bias", "reader.weight"] and not any(p.requires_grad for p in state.values())
    other.tower.load_state_dict(model.tower.state_dict())
    other.load_state_dict(state, strict=False)
    x = torch.randn(2, 3)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_a_name_that_no_child_has_is_refused_and_nothing_is_changed():
    model = Two().freeze("tower")
    with pytest.raises(ValueError, match="names must be among tower, reader, got 'vision'"):
        model.freeze("vision")
    assert model.frozen == ("tower",) and not model.tower[0].weight.requires_grad
