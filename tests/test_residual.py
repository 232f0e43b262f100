"""Layer scale and stochastic depth: by their formulas, sample by sample, and in a stack."""

import pytest
import torch
from torch import nn

from nondual.residual import LayerScale, StochasticDepth, dropped
from nondual.transformer import Encoder

B, N, E = 4000, 3, 8


def test_layer_scale_multiplies_each_channel_and_starts_small():
    scale = LayerScale(E, 1e-5)
    x = torch.randn(2, N, E)
    torch.testing.assert_close(scale(x), 1e-5 * x, atol=0, rtol=1e-6)
    with torch.no_grad():
        scale.scale.copy_(torch.arange(E))
    assert torch.equal(scale(x), x * torch.arange(E))
    scale(x).sum().backward()
    torch.testing.assert_close(scale.scale.grad, x.sum((0, 1)))


def test_a_sample_is_left_out_as_a_whole_and_the_mean_stays():
    torch.manual_seed(0)
    path, x = StochasticDepth(0.25), torch.ones(B, N, E)
    out = path(x)
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, (kept / 0.75)[:, None, None].expand(B, N, E)), "whole samples, each 0 or 4/3"
    assert abs(float(kept.float().mean()) - 0.75) < 0.03
    assert path.eval()(x) is x and StochasticDepth(0.0)(x) is x


def test_the_gradient_is_that_of_what_was_kept():
    torch.manual_seed(0)
    x = torch.randn(50, N, E, requires_grad=True)
    out = StochasticDepth(0.5)(x)
    out.sum().backward()
    kept = (out != 0).any((1, 2))
    assert 0 < kept.sum() < 50
    assert torch.equal(x.grad, (2.0 * kept)[:, None, None].expand_as(x))


def test_in_a_stack_the_probability_grows_evenly_and_both_branches_are_scaled():
    stack = Encoder(E, 2, 16, 5, norm_first=True, drop_path=0.2, layer_scale=0.5)
    assert [layer.drop_path.p for layer in stack.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [layer.drop_path.p for layer in Encoder(E, 2, 16, 1, drop_path=0.2).layers] == [0]
    scales = [name for name, _ in stack.named_parameters() if "scale" in name]
    assert len(scales) == 10 and not any("scale" in name for name, _ in Encoder(E, 2, 16, 2).named_parameters())


def test_a_layer_with_both_is_its_formula():
    torch.manual_seed(0)
    (layer,) = Encoder(E, 2, 16, 1, norm_first=True, layer_scale=0.3).double().layers
    x = torch.randn(2, N, E, dtype=torch.float64)
    middle = x + 0.3 * layer.mixer(layer.norm1(x))
    torch.testing.assert_close(layer(x), middle + 0.3 * layer.feed_forward(layer.norm2(middle)))
    nothing = Encoder(E, 2, 16, 3, norm_first=True, layer_scale=0.0)
    x = x.float()
    for layer in nothing.layers:
        assert torch.equal(layer(x), x), "a scale of 0 makes a pre-norm layer the identity"


def test_a_layer_left_out_is_left_out_for_that_sample_alone():
    """With p near 1, most samples pass unchanged through the last layer; each of the others is moved."""
    torch.manual_seed(0)
    last = Encoder(E, 2, 16, 2, norm_first=True, drop_path=0.8).layers[-1].train()
    x = torch.randn(500, N, E)
    same = (last(x) == x).all((1, 2)).float().mean()
    assert abs(float(same) - 0.8**2) < 0.08, "both branches, each by itself"


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan"), 2])
def test_what_is_refused(p):
    with pytest.raises(ValueError, match="drop_path must be at least 0 and below 1, got"):
        StochasticDepth(p)


def test_a_dropout_of_nothing_is_not_called_and_any_other_is():
    x = torch.ones(2, N, E)
    calls = []
    for part in (nn.Dropout(0.0), StochasticDepth(0.0), nn.Dropout(0.5), nn.Identity()):
        part.register_forward_hook(lambda module, *_: calls.append(type(module)))
        assert dropped(x, part.eval()) is x
    assert calls == [nn.Dropout, nn.Identity]
    assert (dropped(x, nn.Dropout(0.5)) == 0).any(), "a dropout that trains drops"
