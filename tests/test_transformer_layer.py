"""The layer against torch's own with copied weights, forward and backward, in float64; and by its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.efficient_attention.mamba import Mamba
from nondual.feed_forward import FeedForward, GatedFeedForward
from nondual.ops import masks
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import MixerBlock, TransformerLayer

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


def test_a_layer_of_root_mean_square_norms_and_a_gated_network_is_its_formula():
    torch.manual_seed(0)
    mixer, network = MultiHeadAttention(E, HEADS), GatedFeedForward(E, FF)
    layer = TransformerLayer(mixer, network, E, norm_first=True, norm=nn.RMSNorm, eps=1e-6).double()
    x = torch.randn(B, N, E, dtype=torch.float64)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    middle = x + mixer(norm(x, layer.norm1.weight))
    expected = middle + network(norm(middle, layer.norm2.weight))
    torch.testing.assert_close(layer(x), expected)


def test_a_block_of_a_mixer_alone_is_its_formula_and_takes_a_wider_residual():
    torch.manual_seed(0)
    block, x = MixerBlock(Mamba(E), E), torch.randn(B, N, E)
    expected = x + block.mixer(F.rms_norm(x, (E,), block.norm.weight, 1e-5))
    torch.testing.assert_close(block(x), expected)
    assert block.bfloat16()(x).dtype == torch.float32
