"""Synapses, neuron-level models, pairs and synchronisation: the paper's formulas written with loops, and refusals."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from nondual.recent import NeuronModels, Synapses, Synchronisation, UNetSynapses, dense_pairs, random_pairs
from nondual.training import decay_groups

B, D, M, H, P, T = 3, 7, 5, 2, 11, 13


def seeded(module):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype) / 2)
    return module


def numbers(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def glu(x):
    """First half times the logistic of the second."""
    half = len(x) // 2
    return x[:half] / (1 + torch.exp(-x[half:]))


# --- neuron-level models -------------------------------------------------------------------------------------------


def neuron_by_neuron(models, history):
    """Equation 3 with a loop over inputs and one over neurons, each with two matrices of its own."""
    out = torch.zeros(history.shape[:2], dtype=history.dtype)
    for b in range(len(history)):
        for d in range(history.shape[1]):
            hidden = glu(history[b, d] @ models.weight1[d] + models.bias1[d])
            out[b, d] = glu(hidden @ models.weight2[d] + models.bias2[d])[0]
    return out


def test_a_neurons_model_reads_its_own_history_with_its_own_weights():
    models, history = seeded(NeuronModels(D, M, d_hidden=H).double()), numbers(B, D, M).requires_grad_()
    twin = history.detach().clone().requires_grad_()
    slope = numbers(B, D, seed=2)
    (models(history) * slope).sum().backward()
    ours = {name: p.grad.clone() for name, p in models.named_parameters()}
    models.zero_grad()
    right = neuron_by_neuron(models, twin)
    (right * slope).sum().backward()
    torch.testing.assert_close(models(history), right)
    torch.testing.assert_close(history.grad, twin.grad)
    for name, p in models.named_parameters():
        torch.testing.assert_close(ours[name], p.grad)


def test_no_neuron_sees_anothers_history():
    models, history = seeded(NeuronModels(D, M, d_hidden=H).double()), numbers(B, D, M).requires_grad_()
    models(history)[:, 4].sum().backward()
    assert history.grad[:, 4].abs().min() > 0
    assert not history.grad[:, [0, 1, 2, 3, 5, 6]].any()


def test_a_neuron_by_hand():
    """One pre-activation of 2, H = 1: 2 · 3 times σ(0), then 3 · 1 times σ(0)."""
    models = NeuronModels(1, 1, d_hidden=1)
    with torch.no_grad():
        models.weight1.copy_(torch.tensor([[[3.0, 0.0]]]))
        models.weight2.copy_(torch.tensor([[[1.0, 0.0]]]))
    assert models(torch.tensor([[[2.0]]])).item() == 1.5


def test_biases_and_decays_have_no_weight_decay():
    module = nn.ModuleList([NeuronModels(D, M), Synchronisation(random_pairs(D, P), D)])
    for model in (module, copy.deepcopy(module)):
        assert [name for name, _ in decay_groups(model, 0.1)[0]["params"]] == ["0.weight1", "0.weight2"]


# --- synchronisation -----------------------------------------------------------------------------------------------


def pair_by_pair(history, pairs, r):
    """Equations 9 and 10 over a whole history (B, t, D), with loops over inputs and pairs; divided by a root."""
    ticks = history.shape[1]
    back = torch.arange(ticks - 1, -1, -1, dtype=history.dtype)
    out = torch.zeros(len(history), pairs.shape[1], dtype=history.dtype)
    for b in range(len(history)):
        for p, (i, j) in enumerate(pairs.T.tolist()):
            weights = torch.exp(-r[p] * back)
            out[b, p] = (history[b, :, i] * weights * history[b, :, j]).sum() / weights.sum().sqrt()
    return out


def run(synchronisation, history):
    """The synchronisation after each tick, (B, t, P)."""
    state, found = synchronisation.new_state(len(history)), []
    for z in history.unbind(1):
        now, state = synchronisation(z, state)
        found.append(now)
    return torch.stack(found, 1)


def synchronisation_of(pairs, lowest=0.05, highest=2.0):
    module = Synchronisation(pairs, D).double()
    with torch.no_grad():
        module.decay.copy_(torch.linspace(lowest, highest, module.size))
    return module


def test_step_by_step_it_is_the_sum_over_the_whole_history():
    torch.manual_seed(0)
    module, history = synchronisation_of(random_pairs(D, P, n_self=3)), numbers(B, T, D).requires_grad_()
    twin, r = history.detach().clone().requires_grad_(), module.decay.detach().clone().requires_grad_()
    slope = numbers(B, T, P, seed=2)
    found = run(module, history)
    right = torch.stack([pair_by_pair(twin[:, : t + 1], module.pairs, r) for t in range(T)], 1)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    (found * slope).sum().backward()
    (right * slope).sum().backward()
    torch.testing.assert_close(history.grad, twin.grad)
    torch.testing.assert_close(module.decay.grad, r.grad)


def test_finite_differences_agree():
    module = synchronisation_of(random_pairs(D, 5, generator=torch.Generator().manual_seed(0)))

    def last(history, r):
        return run_with(module, history, r)

    assert gradcheck(last, (numbers(2, 3, D).requires_grad_(), module.decay.detach().clone().requires_grad_()))


def run_with(module, history, r):
    """The last synchronisation, with these decays in place of the module's own."""

    def call(history):
        return run(module, history)[:, -1]

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, history):
            return call(history)

    return torch.func.functional_call(Holder(), {"inner.decay": r}, (history,))


def test_a_synchronisation_by_hand():
    """Two ticks of neurons (1, 2) and (3, -1): without decay (2 - 3) / √2, with e^-r = 1/4 (2/4 - 3) / √(5/4)."""
    history = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    module = Synchronisation(torch.tensor([[0, 0], [1, 1]]), 2)
    with torch.no_grad():
        module.decay[1] = math.log(4)
    torch.testing.assert_close(run(module, history)[0, 1], torch.tensor([-1 / math.sqrt(2), -2.5 / math.sqrt(1.25)]))


def test_without_decay_the_square_of_a_neuron_is_its_norm():
    """Equation 5: a neuron with itself gives ‖z‖² / √t."""
    history = numbers(B, T, D)
    found = run(Synchronisation(torch.arange(D).expand(2, -1), D).double(), history)[:, -1]
    torch.testing.assert_close(found, history.square().sum(1) / math.sqrt(T))


@pytest.mark.parametrize("value, acts_as", [(-2.0, 0.0), (40.0, 15.0)])
def test_a_decay_outside_acts_as_the_edge_and_can_come_back(value, acts_as):
    pairs, history = random_pairs(D, P), numbers(B, T, D)
    module, at_edge = (synchronisation_of(pairs, r, r) for r in (value, acts_as))
    found = run(module, history)
    torch.testing.assert_close(found, run(at_edge, history))
    found.sum().backward()
    run(at_edge, history).sum().backward()
    torch.testing.assert_close(module.decay.grad, at_edge.decay.grad)
    assert module.decay.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """2,000 products of 1: a sum in bfloat16 would stop at 256."""
    module = Synchronisation(torch.tensor([[0], [1]]), 2).to(dtype)
    state = module.new_state(1)
    for _ in range(2000):
        found, state = module(torch.ones(1, 2, dtype=dtype), state)
    assert state.products.dtype == torch.float32
    assert found.dtype == dtype
    assert state.products.item() == 2000


# --- pairs ---------------------------------------------------------------------------------------------------------


def test_random_pairs_are_different_and_begin_with_those_of_one_neuron():
    pairs = random_pairs(D, 25, n_self=4, generator=torch.Generator().manual_seed(0))
    assert pairs.shape == (2, 25)
    assert (pairs[0, :4] == pairs[1, :4]).all()
    assert (pairs[0, 4:] != pairs[1, 4:]).all()
    assert len({frozenset(pair) for pair in pairs.T.tolist()}) == 25
    again = random_pairs(D, 25, n_self=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pairs, again)


def test_all_pairs_there_are():
    every = random_pairs(D, D * (D + 1) // 2, n_self=D)
    dense = dense_pairs(torch.arange(D))
    assert {frozenset(pair) for pair in every.T.tolist()} == {frozenset(pair) for pair in dense.T.tolist()}
    assert dense.shape == (2, D * (D + 1) // 2)


def test_semi_dense_pairs_by_hand():
    assert dense_pairs(torch.tensor([5, 3]), torch.tensor([1, 0])).tolist() == [[5, 5, 3], [1, 0, 0]]


# --- synapses ------------------------------------------------------------------------------------------------------


def normal(x, norm):
    return (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias


def test_synapses_layer_by_layer():
    module, x = seeded(Synapses(P, D).double()), numbers(B, P)
    for row, found in zip(x, module(x)):
        mixed = module.linear.weight @ row + module.linear.bias
        torch.testing.assert_close(found, normal(glu(mixed), module.norm))


def test_the_u_net_layer_by_layer():
    """Three levels: widths 31, 26, 21, 16 and back; each layer linear, norm, SiLU; each sum normalised."""
    module, x = seeded(UNetSynapses(P, 31, levels=3).double()), numbers(B, P)
    assert [layer[1].out_features for layer in module.down] == [26, 21, 16]
    assert sum(p.numel() for p in module.parameters()) == sum(
        a * b + 3 * b for a, b in [(P, 31), (31, 26), (26, 21), (21, 16), (16, 21), (21, 26), (26, 31)]
    ) + 2 * (31 + 26 + 21)

    def layer(of, row):
        row = normal(of[1].weight @ row + of[1].bias, of[2])
        return row / (1 + torch.exp(-row))

    for row, found in zip(x, module(x)):
        at31 = layer(module.first, row)
        at26 = layer(module.down[0], at31)
        at21 = layer(module.down[1], at26)
        up21 = normal(layer(module.up[2], layer(module.down[2], at21)) + at21, module.norms[2])
        up26 = normal(layer(module.up[1], up21) + at26, module.norms[1])
        torch.testing.assert_close(found, normal(layer(module.up[0], up26) + at31, module.norms[0]))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: NeuronModels(D, 0), "memory must be a whole number of 1 or more, got 0"),
        (lambda: NeuronModels(D, M, d_hidden=True), "d_hidden must be a whole number of 1 or more, got True"),
        (lambda: Synapses(0, D), "d_in must be"),
        (lambda: Synapses(P, D, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: UNetSynapses(P, D), "narrowest must not be above d_model, got 16 and 7"),
        (lambda: UNetSynapses(P, 31, levels=0), "levels must be"),
        (lambda: random_pairs(D, 22), "n_pairs must be n_self \\+ 21 at the most, as many as 7 neurons have, got 22"),
        (lambda: random_pairs(D, 5, n_self=6), "n_self must be a whole number from 0 to 5"),
        (lambda: random_pairs(D, 0), "n_pairs must be"),
        (lambda: dense_pairs(torch.arange(0)), r"left must be \(J,\) int64 with J of 1 or more"),
        (lambda: dense_pairs(torch.arange(3), torch.arange(2)), "right must have as many neurons as left, 3, got 2"),
        (lambda: dense_pairs(torch.rand(3)), "left must be"),
        (lambda: Synchronisation(torch.tensor([[0], [D]]), D), "pairs must be indices of neurons, 0 to 6, got 0 to 7"),
        (lambda: Synchronisation(torch.zeros(3, 2, dtype=torch.int64), D), r"pairs must be \(2, P\) int64"),
        (lambda: Synchronisation(torch.zeros(2, 2), D), r"pairs must be \(2, P\) int64"),
    ],
)
def test_what_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="pairs must be a Tensor, got list"):
        Synchronisation([[0], [1]], D)
    with pytest.raises(TypeError, match="right must be a Tensor"):
        dense_pairs(torch.arange(2), [0, 1])
