"""The feed-forward networks against their formulas, forward and backward, in float64."""

import pytest
import torch
import torch.nn.functional as F

from nondual.feed_forward import FeedForward, GatedFeedForward

B, N, E, FF = 2, 7, 12, 29


def draw():
    return torch.randn(B, N, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(y, module, x):
    return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


@pytest.mark.parametrize("activation", [F.gelu, F.relu])
def test_the_plain_network_is_its_formula(activation):
    torch.manual_seed(0)
    module, x = FeedForward(E, FF, activation=activation).double(), draw().requires_grad_()
    one, two = module.linear1, module.linear2
    expected = activation(x @ one.weight.T + one.bias) @ two.weight.T + two.bias
    torch.testing.assert_close(module(x), expected)
    for ours, theirs in zip(gradients(module(x), module, x), gradients(expected, module, x)):
        torch.testing.assert_close(ours, theirs)


def test_swiglu_is_shazeers_formula():
    """2002.05202, equation 6: FFN(x, W, V, W2) = (Swish1(x W) * x V) W2, Swish1(x) = x sigmoid(x)."""
    torch.manual_seed(0)
    module, x = GatedFeedForward(E, FF).double(), draw().requires_grad_()
    assert [name for name, _ in module.named_parameters()] == ["gate.weight", "linear1.weight", "linear2.weight"]
    gate = x @ module.gate.weight.T
    expected = (gate / (1 + torch.exp(-gate)) * (x @ module.linear1.weight.T)) @ module.linear2.weight.T
    torch.testing.assert_close(module(x), expected)
    for ours, theirs in zip(gradients(module(x), module, x), gradients(expected, module, x)):
        torch.testing.assert_close(ours, theirs)


def test_geglu_is_another_activation():
    """Equation 5: (GELU(x W) * x V) W2."""
    torch.manual_seed(0)
    module, x = GatedFeedForward(E, FF, activation=F.gelu).double(), draw()
    expected = (F.gelu(x @ module.gate.weight.T) * (x @ module.linear1.weight.T)) @ module.linear2.weight.T
    torch.testing.assert_close(module(x), expected)


def test_a_gated_network_may_have_biases():
    torch.manual_seed(0)
    module, x = GatedFeedForward(E, FF, bias=True).double(), draw()
    gate, value = (F.linear(x, linear.weight, linear.bias) for linear in (module.gate, module.linear1))
    expected = F.linear(F.silu(gate) * value, module.linear2.weight, module.linear2.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_dropout_is_for_training_only(kind):
    module, x = kind(E, FF, dropout=0.5).double(), draw()
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
