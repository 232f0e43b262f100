"""The longest chain of operations that wait for one another, counted on computations whose chain is known."""

import pytest
import torch
from torch import nn

from nondual.analysis.critical_path import is_arithmetic, longest_chain, products
from nondual.ops.attention import attention
from nondual.ops.linear_recurrence import parallel, sequential


def test_side_by_side_is_one_and_one_after_another_is_as_many():
    a, x = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    assert longest_chain(torch.cat([x @ a for _ in range(7)])) == 1
    y = x
    for _ in range(7):
        y = y @ a
    assert longest_chain(y) == 7 and longest_chain((y + x @ a).tanh()) == 7


def test_it_is_the_longest_of_the_ways():
    a = torch.randn(3, 3, requires_grad=True)
    assert longest_chain((a @ a) @ (a @ a @ a)) == 3


def test_attention_waits_for_two_products_whatever_the_length():
    for n in (2, 50):
        q, k, v = (torch.randn(1, 1, n, 4, requires_grad=True) for _ in range(3))
        assert longest_chain(attention(q, k, v, causal=True)) == 2
        assert longest_chain(attention(q, k, v, return_weights=True)[0]) == 2


def test_a_linear_recurrence_takes_n_steps_or_a_few_for_each_doubling():
    chains = {}
    for n in (64, 128, 256):
        a, b = (torch.randn(1, n, 3, requires_grad=True) for _ in range(2))
        for run in (sequential, parallel):
            chains[run, n] = longest_chain(run(a, b, torch.zeros(1, 3)), is_arithmetic)
    assert [chains[sequential, n] for n in (64, 128, 256)] == [128, 256, 512]
    assert chains[parallel, 256] - chains[parallel, 128] == chains[parallel, 128] - chains[parallel, 64] <= 4


def test_a_deep_graph_is_no_deep_recursion():
    y = torch.ones(2, 2, requires_grad=True)
    a = torch.eye(2)
    for _ in range(5000):
        y = y @ a
    assert longest_chain(y) == 5000


def test_names():
    assert [products(f"{name}Backward0") for name in ("Addmm", "Mul", "Mmm")] == [1, 0, 0]
    assert is_arithmetic("MulBackward0") and not is_arithmetic("ViewBackward0")
    assert not is_arithmetic("torch::autograd::AccumulateGrad")


def test_what_has_no_graph_is_refused():
    with pytest.raises(ValueError, match="y must have a graph"):
        longest_chain(torch.ones(2))
    with pytest.raises(TypeError, match="y must be a Tensor, got float"):
        longest_chain(1.0)
    assert longest_chain(nn.Linear(2, 2)(torch.ones(1, 2))) == 1
