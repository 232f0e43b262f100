"""Circuits read from the parameters: against the layer's own scores and outputs."""

import copy
import math

import pytest
import torch
from analysis_cases import IDS, B, D, E, H, N, draw, layer, watched
from torch import nn

from nondual import MultiHeadAttention
from nondual.analysis import (
    antisymmetric_share,
    attention_layers,
    composition_score,
    ov_circuit,
    qk_circuit,
    weights_of,
)
from nondual.ops.attention import attention

# --- circuits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_scores_and_outputs_follow_from_the_circuits(n_kv_heads):
    """Against the queries and keys that the layer hands to its op, without biases, with shared keys and values."""
    seen = []

    def kept(q, k, v, **options):
        seen[:] = [q, k.repeat_interleave(H // n_kv_heads, 1)]
        return attention(q, k, v, **options)

    module, x = layer(n_kv_heads=n_kv_heads, bias=False, op=kept), draw(B, N, E)
    out, weights = module(x, return_weights=True)
    scores = torch.stack([x @ qk_circuit(module, head) @ x.mT for head in range(H)], 1)
    torch.testing.assert_close(scores, seen[0] @ seen[1].mT)
    torch.testing.assert_close(torch.softmax(scores / math.sqrt(D), -1), weights)
    written = sum(weights[:, head] @ x @ ov_circuit(module, head) for head in range(H))
    torch.testing.assert_close(written, out)
    for head in range(H):
        assert torch.linalg.matrix_rank(qk_circuit(module, head)) == D
        assert torch.linalg.matrix_rank(ov_circuit(module, head)) == D


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_in_models_of_transformers_the_output_follows_from_the_circuit(name, request):
    """Each layer's own input, its eager weights and OV give its output; the value's bias goes through W_O whole."""
    model = request.getfixturevalue(name)
    layers = attention_layers(model)
    with torch.no_grad(), watched(found.value for found in layers) as values:
        with watched(found.output for found in layers) as outs:
            model(IDS)
    assert len(values) == len(outs) == 2
    for found, weights, (x, _), (_, out) in zip(layers, weights_of(model, IDS), values, outs):
        written = sum(weights[:, head] @ x @ ov_circuit(found.module, head) for head in range(4))
        if name == "bert":
            written = written + found.output(found.value.bias)
        torch.testing.assert_close(written, out, rtol=1e-4, atol=1e-5)
        assert qk_circuit(found, 3).shape == (24, 24)


def test_in_bert_the_scores_follow_from_the_circuit_and_the_biases(bert):
    """Scores are known from the weights up to a constant for each query: x_i QK x_jᵀ and the query's bias decide."""
    found = attention_layers(bert)[0]
    with watched([found.query]) as seen:
        weights = weights_of(bert, IDS)[0]
    ((x, _),) = seen
    for head in range(4):
        own = slice(6 * head, 6 * head + 6)
        from_bias = x @ found.key.weight[own].T @ found.query.bias[own]  # what is asked of every key alike
        scores = (x @ qk_circuit(found, head) @ x.mT + from_bias[:, None]) / math.sqrt(6)
        torch.testing.assert_close(scores.softmax(-1), weights[:, head], rtol=1e-4, atol=1e-5)


def test_in_a_llama_the_circuit_is_the_score_of_two_tokens_at_one_place(llama):
    found = attention_layers(llama)[0]
    with torch.no_grad(), watched([found.query, found.key]) as seen:
        llama(IDS)
    (x, q), (_, k) = seen
    for head in range(4):
        plain = q[..., 6 * head : 6 * head + 6] @ k[..., 6 * (head // 2) : 6 * (head // 2) + 6].mT  # before the turn
        torch.testing.assert_close(x @ qk_circuit(found, head) @ x.mT, plain, rtol=1e-4, atol=1e-5)


def test_circuits_of_cross_attention_have_a_side_for_each():
    module = MultiHeadAttention(E, H, d_memory=7)
    assert qk_circuit(module, 1).shape == (E, 7) and ov_circuit(module, 1).shape == (7, E)


# --- composition -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_composition_is_the_ratio_of_the_norms_written_out():
    first, second = layer(), layer(n_kv_heads=2)
    for a in range(H):
        for b in range(H):
            ov, qk, ov_b = ov_circuit(first, a), qk_circuit(second, b), ov_circuit(second, b)
            found = composition_score((first, a), (second, b))
            norm = torch.linalg.matrix_norm
            assert found["q"] == pytest.approx(float(norm(ov @ qk) / (norm(ov) * norm(qk))), rel=1e-9)
            assert found["k"] == pytest.approx(float(norm(qk @ ov.T) / (norm(qk) * norm(ov))), rel=1e-9)
            assert found["v"] == pytest.approx(float(norm(ov @ ov_b) / (norm(ov) * norm(ov_b))), rel=1e-9)
            assert found["random"] == E**-0.5


def test_composition_tells_a_head_that_reads_another_from_one_that_does_not():
    """Head 0 writes where head 1 of the next layer has its keys alone: its keys read it, its queries and values not."""
    first, second = layer(), layer()
    with torch.no_grad():
        basis = torch.linalg.qr(draw(E, E)).Q
        first.out_proj.weight[:, :D] = basis[:, :D]
        second.k_proj.weight[D : 2 * D] = basis[:, :D].T
        second.q_proj.weight[D : 2 * D] = basis[:, D : 2 * D].T
        second.v_proj.weight[D : 2 * D] = basis[:, 2 * D : 3 * D].T
    found = composition_score((first, 0), (second, 1))
    assert found["k"] == pytest.approx(D**-0.5, rel=0.3) and found["k"] > 1.5 * found["random"]
    assert found["q"] < 1e-9 and found["v"] < 1e-9
    with torch.no_grad():
        second.k_proj.weight *= 7
    assert composition_score((first, 0), (second, 1))["k"] == pytest.approx(found["k"])


def test_the_random_score_is_that_of_unrelated_heads():
    """Random rotations between two heads give 1/E as the mean square of a score; the scores of random heads agree."""
    first, second, squares = layer(), layer(), []
    for seed in range(2000):
        turn = torch.linalg.qr(draw(E, E, seed=seed)).Q
        ov, qk = ov_circuit(first, 0), qk_circuit(second, 1)
        squares.append((ov @ turn @ qk).square().sum() / (ov.square().sum() * qk.square().sum()))
    squares = torch.stack(squares)
    error = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - 1 / E) < 4 * error and error < 0.02 / E
    torch.manual_seed(1)
    one, two = (MultiHeadAttention(96, 12) for _ in range(2))
    scores = [composition_score((one, a), (two, b)) for a in range(12) for b in range(12)]
    for kind in "qkv":
        assert math.fsum(score[kind] for score in scores) / 144 == pytest.approx(96**-0.5, rel=0.02)


def test_circuits_of_what_has_none_are_refused():
    module = layer()
    for function in (qk_circuit, ov_circuit):
        with pytest.raises(ValueError, match="head must be 0 to 3, got 4"):
            function(module, 4)
        with pytest.raises(TypeError, match=r"attention must be a MultiHeadAttention or .*, got Linear"):
            function(nn.Linear(2, 2), 0)
        with pytest.raises(TypeError, match="head must be an int, got float"):
            function(module, 1.0)
    with pytest.raises(ValueError, match="both layers must have one width E, got 12 written and 8, 8, 8 read"):
        composition_score((module, 0), (MultiHeadAttention(8, 2), 0))
    silent = copy.deepcopy(module)
    nn.init.zeros_(silent.out_proj.weight)
    with pytest.raises(ValueError, match="composition needs circuits that are not zero"):
        composition_score((silent, 0), (module, 0))


# --- symmetric and antisymmetric parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_the_antisymmetric_share_is_that_of_the_circuit(n_kv_heads):
    module = layer(n_kv_heads=n_kv_heads)
    for head in range(H):
        qk = qk_circuit(module, head).detach()
        part = (qk - qk.T) / 2
        assert antisymmetric_share(module, head) == pytest.approx(float((part.norm() / qk.norm()) ** 2), abs=1e-6)


def test_equal_projections_are_symmetric_and_a_turn_by_a_right_angle_is_antisymmetric():
    module = MultiHeadAttention(2, 1, bias=False)
    with torch.no_grad():
        module.k_proj.weight.copy_(module.q_proj.weight)
        assert antisymmetric_share(module, 0) == pytest.approx(0, abs=1e-12)
        module.q_proj.weight.copy_(torch.eye(2))
        module.k_proj.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        assert antisymmetric_share(module, 0) == pytest.approx(1, abs=1e-12)
        module.k_proj.weight.zero_()
    with pytest.raises(ValueError, match="circuit that is not zero"):
        antisymmetric_share(module, 0)
    with pytest.raises(ValueError, match="got 6 and 4: cross-attention"):
        antisymmetric_share(MultiHeadAttention(6, 2, d_memory=4), 1)


def test_unrelated_projections_have_a_half():
    torch.manual_seed(0)
    module = MultiHeadAttention(96, 12)
    shares = [antisymmetric_share(module, head) for head in range(12)]
    assert all(0.4 < share < 0.6 for share in shares) and abs(sum(shares) / 12 - 0.5) < 0.02
