"""The block and the stack against torch's own layer with copied weights, forward and backward, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.ops import masks
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import Encoder, FeedForward, TextEncoder, TransformerLayer

B, N, E, HEADS, FF = 2, 7, 12, 3, 29


def layer_pair(norm_first, activation):
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        E, HEADS, FF, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True, dtype=torch.float64
    )
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours = TransformerLayer(
        MultiHeadAttention(E, HEADS), FeedForward(E, FF, activation=activation), E, norm_first=norm_first
    ).double()
    names = {"self_attn": "mixer", "linear1": "feed_forward.linear1", "linear2": "feed_forward.linear2"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for their, our in names.items():
            name = name.replace(their, our)
        state[name] = tensor
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", [F.gelu, F.relu])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_torchs_encoder_layer_forward_and_backward(norm_first, activation, masked):
    ours, theirs = layer_pair(norm_first, activation)
    theirs.train()  # its fast path has no gradients
    x = torch.randn(B, N, E, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mask = masks.causal(N) if masked else None
    out = ours(a, mask=mask)
    expected = theirs(b, src_mask=None if mask is None else ~mask)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.feed_forward.linear1.weight.grad, theirs.linear1.weight.grad)
    torch.testing.assert_close(ours.norm2.weight.grad, theirs.norm2.weight.grad)
    stacked = torch.cat([ours.mixer.q_proj.weight.grad, ours.mixer.k_proj.weight.grad, ours.mixer.v_proj.weight.grad])
    torch.testing.assert_close(stacked, theirs.self_attn.in_proj_weight.grad)


def test_any_mixer_drops_in():
    class Shift(nn.Module):
        def forward(self, x):
            return x.roll(1, 1)

    block = TransformerLayer(Shift(), nn.Identity(), E)
    assert block(torch.randn(B, N, E)).shape == (B, N, E)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_stack_returns_every_layers_weights(norm_first):
    encoder = Encoder(E, HEADS, FF, n_layers=3, norm_first=norm_first)
    x = torch.randn(B, N, E)
    mask = masks.padding(torch.tensor([N, 4]), N)
    out, weights = encoder(x, mask=mask, return_weights=True)
    assert weights.shape == (3, B, HEADS, N, N)
    assert (weights[:, 1, :, :, 4:] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, B, HEADS, N))
    torch.testing.assert_close(encoder(x, mask=mask), out)


def test_padding_does_not_change_a_sentence():
    torch.manual_seed(0)
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=2).eval()
    ids = torch.randint(31, (1, 5))
    padded = F.pad(ids, (0, 4), value=3)
    out = encoder(padded, mask=masks.padding(torch.tensor([5]), 9))
    torch.testing.assert_close(out[:, :5], encoder(ids), atol=1e-6, rtol=1e-5)


def test_dropout_is_for_training_only():
    encoder = Encoder(E, HEADS, FF, n_layers=1, dropout=0.5)
    x = torch.randn(B, N, E)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


@pytest.mark.parametrize(
    "ids, says",
    [
        (torch.tensor([[3, 31]]), "ids must lie in 0 to 30, got 3 to 31"),
        (torch.tensor([[-1, 2]]), "ids must lie in 0 to 30, got -1 to 2"),
        (torch.zeros(1, 17, dtype=torch.long), "positions must lie in 0 to 15, got 17"),
        (torch.zeros(1, 3), r"ids must be integers \(B, N\)"),
        (torch.zeros(3, dtype=torch.long), r"ids must be integers \(B, N\)"),
    ],
)
def test_bad_ids_are_named(ids, says):
    with pytest.raises(ValueError, match=says):
        TextEncoder(31, 16, E, HEADS, FF, n_layers=1)(ids)


def test_zero_length_and_empty_batch():
    encoder = TextEncoder(31, 16, E, HEADS, FF, n_layers=1)
    assert encoder(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, E)
    assert encoder(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, E)
