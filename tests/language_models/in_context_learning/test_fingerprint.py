"""The fingerprint: the same for the same numbers, another for any that differs."""

import copy

import pytest
import torch
from torch import nn

from nondual.language_models.in_context_learning.fingerprint import fingerprint


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2).to(torch.bfloat16))


def test_it_is_the_same_for_a_copy_and_on_every_call():
    one = model()
    assert fingerprint(one) == fingerprint(one) == fingerprint(copy.deepcopy(one)) == fingerprint(model())
    assert len(fingerprint(one)) == 64


def test_one_bit_of_one_number_changes_it_and_so_does_a_buffer():
    one, other = model(), model()
    with torch.no_grad():
        other[0].bias[2] = torch.nextafter(other[0].bias[2], torch.tensor(9.0))
    assert fingerprint(one) != fingerprint(other)
    other = model()
    other[1](torch.randn(4, 5))  # its running mean moves
    assert fingerprint(one) != fingerprint(other)


def test_shapes_dtypes_and_names_count():
    assert fingerprint(nn.Linear(2, 2, bias=False)) != fingerprint(nn.Linear(4, 1, bias=False))
    zeros = nn.Linear(2, 2)
    nn.init.zeros_(zeros.weight), nn.init.zeros_(zeros.bias)
    assert fingerprint(zeros) != fingerprint(copy.deepcopy(zeros).to(torch.float16))
    assert fingerprint(nn.ModuleDict({"a": zeros})) != fingerprint(nn.ModuleDict({"b": zeros}))


def test_numbers_laid_out_otherwise_in_memory_count_as_the_same():
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.load_state_dict(one.state_dict())
    other.weight = nn.Parameter(other.weight.detach().mT.contiguous().mT)
    assert not other.weight.is_contiguous() and fingerprint(one) == fingerprint(other)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        fingerprint({})
