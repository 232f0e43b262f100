"""Vectors read at one position and put there: what the layers read, a loop by hand, identity, errors."""

import pytest
import torch
from torch import nn

from nondual.analysis.task_vectors import scores_with, states_at
from nondual.language_models.causal import CausalLM
from nondual.relative_positions import Rotary
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import FeedForward, TransformerLayer

B, N, E, V, LAYERS = 5, 7, 22, 19, 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)

    def layer(_):
        mixer = MultiHeadAttention(E, 2, causal=True, positions=Rotary(10), d_head=10)
        return TransformerLayer(mixer, FeedForward(E, 29), E, norm_first=True)

    return CausalLM(V, E, LAYERS, layer=layer, norm=nn.LayerNorm).double().eval()


@pytest.fixture
def rows():
    torch.manual_seed(1)
    return torch.randint(V, (B, N)), torch.randint(N, (B,))


def test_states_are_what_a_loop_over_the_layers_has(model, rows):
    ids, at = rows
    found, x = states_at(model, ids, at), model.embeddings(ids)
    assert found.shape == (LAYERS, B, E)
    for i, layer in enumerate(model.layers):
        torch.testing.assert_close(found[i], x[torch.arange(B), at])
        x = layer(x)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_rows_own_state_changes_nothing(model, rows, layer):
    ids, at = rows
    own = states_at(model, ids, at)[layer]
    usual = model(ids)[torch.arange(B), at]
    torch.testing.assert_close(scores_with(model, ids, at, layer, own), usual)
    assert not torch.allclose(scores_with(model, ids, at, layer, own + 1 * own.roll(1, 1)), usual)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_another_vector_is_read_by_that_layer_at_that_position_alone(model, rows, layer):
    ids, at = rows
    vectors = torch.randn(1, E, dtype=torch.float64)
    x = model.embeddings(ids)
    for i, block in enumerate(model.layers):
        if i == layer:
            x = x.clone()
            for row in range(B):
                x[row, at[row]] = vectors[0]
        x = block(x)
    wanted = model.scores(model.norm_f(x))[torch.arange(B), at]
    torch.testing.assert_close(scores_with(model, ids, at, layer, vectors), wanted)
    torch.testing.assert_close(scores_with(model, ids, at, layer, vectors.expand(B, E)), wanted)
    torch.testing.assert_close(scores_with(model, ids, at, layer, vectors.float()), wanted, atol=1e-5, rtol=1e-5)


def test_at_layer_0_the_vector_stands_for_the_token(model, rows):
    ids, at = rows
    other = ids.clone()
    other[torch.arange(B), at] = 3
    put = scores_with(model, ids, at, 0, model.embeddings.weight[3:4])
    torch.testing.assert_close(put, model(other)[torch.arange(B), at])


def test_one_token_alone(model):
    ids, at = torch.tensor([[4]]), torch.tensor([0])
    own = states_at(model, ids, at)
    torch.testing.assert_close(scores_with(model, ids, at, 1, own[1]), model(ids)[:, 0])


def test_wrong_input_is_refused(model, rows):
    ids, at = rows
    with pytest.raises(TypeError, match="at must be a Tensor, got int"):
        states_at(model, ids, 3)
    with pytest.raises(ValueError, match=r"ids must be \(B, N\) and at \(B,\)"):
        states_at(model, ids, at[:2])
    with pytest.raises(ValueError, match="at must lie in 0 to 6, got"):
        states_at(model, ids, at + 7)
    own = states_at(model, ids, at)[0]
    with pytest.raises(ValueError, match="layer must be 0 to 2, got 3"):
        scores_with(model, ids, at, 3, own)
    with pytest.raises(ValueError, match=r"vectors must be \(B, E\) = \(5, 22\) or \(1, E\), got \(2, 22\)"):
        scores_with(model, ids, at, 0, own[:2])
