"""The flow of attention by hand, its laws, and another's solution of the same problems."""

import networkx
import pytest
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from nondual.analysis import attention_flow, attention_rollout

L, B, H, N = 3, 2, 5, 7


def drawn(*shape, n=N, dtype=torch.float64, seed=0):
    """Rows that sum to 1, some weights far larger than others."""
    return (3 * torch.randn(*shape, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)).softmax(-1)


def test_by_hand():
    """Two positions, two layers: first both read position 0, then both read position 1."""
    first, second = torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0.0, 1], [0, 1]])
    found = attention_flow(torch.stack([first, second])[:, None, None])[0]
    # capacities, layer 1: [[1, 0], [.5, .5]]; layer 2: [[.5, .5], [0, 1]]. From output 0 half goes to each position
    # of the middle; from there all can go on to input 0, and a half to input 1. From output 1 all goes to position 1.
    assert found.tolist() == [[1.0, 0.5], [0.5, 0.5]]


def test_one_layer_lets_pass_its_weights():
    weights = drawn(1, B, H)
    torch.testing.assert_close(attention_flow(weights, residual=0.0), weights[0].mean(1))
    with_residual = weights[0].mean(1) / 2 + torch.eye(N, dtype=torch.float64) / 2
    torch.testing.assert_close(attention_flow(weights), with_residual)


def test_of_a_way_the_narrowest_edge_decides():
    """Each position reads one other, so that from an output there is one way."""
    ring = torch.eye(N, dtype=torch.float64).roll(1, 0)
    widths = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64)
    found = attention_flow(widths[:, None, None, None, None] * ring, residual=0.0)[0]
    torch.testing.assert_close(found, 0.2 * ring.matrix_power(3))


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8, 1.0])
def test_it_is_at_least_the_rollout_and_at_most_what_leaves_and_arrives(residual):
    weights = drawn(L, B, H)
    flow = attention_flow(weights, residual=residual)
    assert (flow >= attention_rollout(weights, residual=residual) - 1e-12).all()
    arrives = (1 - residual) * weights[0].mean(1).sum(1) + residual  # the capacities of all edges to each input
    assert (flow <= arrives.clamp(max=1)[:, None] + 1e-12).all()
    if residual == 1.0:
        assert torch.equal(flow[0], torch.eye(N, dtype=torch.float64))


def test_one_more_edge_never_lets_less_pass_and_order_does_not_count():
    weights = drawn(L, 1, 1)
    wider = weights.clone()
    wider[1, 0, 0, 2, 3] += 0.5
    assert (attention_flow(wider) >= attention_flow(weights) - 1e-12).all()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        attention_flow(weights[..., order, :][..., order])[0], attention_flow(weights)[0][order][:, order]
    )


def test_a_causal_stack_lets_nothing_pass_from_the_future():
    causal = drawn(L, B, H).tril()
    flow = attention_flow(causal / causal.sum(-1, keepdim=True))
    assert not flow.triu(1).any() and (flow.tril() > 0).sum() == B * N * (N + 1) // 2


def capacities(weights):
    """The network as a matrix, by position after layer: an edge from (l, i) to (l - 1, j)."""
    mixed = weights.mean(1) / 2 + torch.eye(N, dtype=torch.float64) / 2
    matrix = torch.zeros((L + 1) * N, (L + 1) * N, dtype=torch.float64)
    for layer in range(L):
        matrix[(layer + 1) * N : (layer + 2) * N, layer * N : (layer + 1) * N] = mixed[layer]
    return matrix


def test_scipy_finds_the_same_in_whole_numbers():
    """Its capacities are integers: rounding moves each of the at most L N² edges by 2⁻²⁹."""
    weights = drawn(L, 1, H)[:, 0]
    whole = csr_array((capacities(weights) * 2**28).round().to(torch.int32).numpy())
    found = attention_flow(weights[:, None])[0]
    for i in range(N):
        for j in range(N):
            theirs = maximum_flow(whole, L * N + i, j).flow_value / 2**28
            assert abs(theirs - found[i, j]) <= L * N**2 * 2**-29


def test_networkx_finds_the_same_by_pushing_preflows():
    weights = drawn(L, 1, H, seed=1)[:, 0]
    matrix = capacities(weights)
    network = networkx.DiGraph()
    for i, j in matrix.nonzero().tolist():
        network.add_edge(i, j, capacity=matrix[i, j].item())
    found = attention_flow(weights[:, None])[0]
    for i, j in ((0, 0), (2, 5), (6, 1), (3, 4)):
        theirs = networkx.maximum_flow_value(network, L * N + i, j, flow_func=networkx.algorithms.flow.preflow_push)
        assert theirs == pytest.approx(found[i, j].item(), abs=1e-12)


def test_a_long_chain_of_layers_and_no_position_at_all():
    assert attention_flow(drawn(60, 1, 1, n=2)).shape == (1, 2, 2)
    assert attention_flow(torch.ones(2, 3, 1, 1, 1)).tolist() == [[[1.0]]] * 3
    assert attention_flow(torch.ones(2, 3, 1, 0, 0)).shape == (3, 0, 0)


def test_half_precision_gradients_and_views():
    weights = drawn(L, 1, H, dtype=torch.float32)
    exact = attention_flow(weights)
    torch.testing.assert_close(attention_flow(weights.half()), exact, atol=1e-3, rtol=1e-3)
    assert not attention_flow(weights.requires_grad_()).requires_grad
    turned = weights.detach().transpose(3, 4).contiguous().transpose(3, 4)
    torch.testing.assert_close(attention_flow(turned), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "weights, options, says",
    [
        ([[1.0]], {}, "weights must be a Tensor"),
        (torch.ones(2, 3, 3), {}, r"floating point \(layers, B, H, N, N\), got torch.float32 \(2, 3, 3\)"),
        (torch.ones(0, 1, 1, 2, 2), {}, "of 1 layer and 1 head or more"),
        (torch.ones(1, 1, 1, 2, 2), {"residual": -0.1}, "residual must lie in 0 to 1, got -0.1"),
        (-torch.ones(1, 1, 1, 2, 2), {}, "must be finite and not negative"),
        (torch.full((1, 1, 1, 2, 2), torch.nan), {}, "must be finite and not negative"),
    ],
)
def test_what_is_refused(weights, options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        attention_flow(weights, **options)
