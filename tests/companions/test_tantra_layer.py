"""Essay B, Transformer Tantra: its code for the feed-forward network, the norm and the block, as printed and mended."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.feed_forward import FeedForward, GatedFeedForward
from nondual.pretrained import minilm
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import TransformerLayer

MEASURED = Path(__file__).parent.parent.parent / "docs/measured"
PRINTED = {  # as printed, without the docstrings
    "feed-forward": """
class FeedForward(nn.Module):
    def forward(self, x):
        expanded = self.linear1(x)
        activated = gelu(expanded)
        return self.linear2(activated)
""",
    "norm": """
def layer_norm(x):
    mean = x.mean(dim=-1, keepdim=True)
    std = x.std(dim=-1, keepdim=True)
    return (x - mean) / (std + eps)
""",
    "block": """
def transformer_block(x):
    attended = attention(x) + x
    return feed_forward(attended) + attended
""",
}


def printed(name, **given):
    """What the printed lines define, with the names that they leave open bound to these."""
    exec(PRINTED[name], given)
    return given


def cosine(q, k):
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT


@pytest.mark.claim("B4", "holds")
def test_the_feed_forward_network_expands_activates_and_compresses():
    torch.manual_seed(0)
    encoder = minilm()
    ours = FeedForward(10, 40)
    theirs = printed("feed-forward", nn=nn, gelu=F.gelu)["FeedForward"]()
    x = torch.randn(2, 7, 10)
    with pytest.raises(AttributeError, match="linear1"):  # the layers are left to the reader
        theirs(x)
    theirs.linear1, theirs.linear2 = ours.linear1, ours.linear2
    assert torch.equal(theirs(x), ours(x))
    wide = torch.linspace(-8, 8, 10_001)
    apart = (F.gelu(wide) - F.gelu(wide, approximate="tanh")).abs().max()
    assert 1e-4 < apart < 1e-3  # GELU exact against its tanh form
    block = encoder.model.encoder.layers[0].feed_forward
    assert (block.linear1.in_features, block.linear1.out_features, block.linear2.out_features) == (384, 1536, 384)
    share = lambda parts: parts["feed-forward"] / (parts["feed-forward"] + parts["attention"])  # noqa: E731
    found = json.loads((MEASURED / "tantra_models.json").read_text())["figures"]
    small, large = (found[name]["parameters"] for name in ("minilm", "smollm2"))
    assert 0.66 < share(small) < 0.67 and 0.74 < share(large) < 0.76
    assert sum(p.numel() for n, p in encoder.model.named_parameters() if ".feed_forward." in n) == small["feed-forward"]
    gated = GatedFeedForward(576, 1536, activation=F.silu, bias=False)  # SmolLM2's: three matrices, 8/3 as wide
    assert 30 * sum(p.numel() for p in gated.parameters()) == large["feed-forward"]


@pytest.mark.claim("B5", "holds if")
@pytest.mark.parametrize("width", [2, 5, 64, 384])
def test_the_printed_norm_is_off_by_a_factor_that_the_width_decides(width):
    torch.manual_seed(0)
    x = torch.randn(50, width).double() * 3 + 1
    with pytest.raises(NameError, match="eps"):
        printed("norm")["layer_norm"](x)
    f = printed("norm", eps=0.0)["layer_norm"]
    right = F.layer_norm(x, (width,), eps=0.0)
    torch.testing.assert_close(f(x), math.sqrt(1 - 1 / width) * right)
    layer = nn.LayerNorm(width, eps=0.0).double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    mended = layer.weight * math.sqrt(width / (width - 1)) * f(x) + layer.bias  # a gain takes the factor up
    torch.testing.assert_close(mended, layer(x))
    # where eps stands counts when x hardly varies: inside the root the result falls once the variance is below eps,
    # outside once the deviation is
    eps, still = 1e-5, torch.randn(50, width).double() * 1e-4
    inside, outside = F.layer_norm(still, (width,), eps=eps), printed("norm", eps=eps)["layer_norm"](still)
    if width > 2:
        assert inside.abs().mean() < 0.1 < 0.5 < outside.abs().mean()
    if width == 384:
        assert round(1 - math.sqrt(1 - 1 / width), 4) == 0.0013


def deep(norm, residual=True, layers=32):
    """Scale of the stream after each of so many layers before training; gradient at its start over that at its end."""
    torch.manual_seed(0)
    x = torch.randn(4, 17, 32).double().requires_grad_()
    seen = [x]
    for _ in range(layers):
        make = (lambda d, eps=0.0: nn.Identity()) if norm is None else nn.LayerNorm
        layer = TransformerLayer(
            MultiHeadAttention(32, 4, bias=False), FeedForward(32, 128), 32, norm=make, norm_first=norm == "before"
        ).double()
        for one in layer.modules():
            if isinstance(one, nn.Linear):  # each branch about as loud as its input
                nn.init.normal_(one.weight, std=one.in_features**-0.5)
        y = seen[-1]
        seen.append(layer(y) if residual else layer.feed_forward(layer.mixer(y)))
    (first, last) = torch.autograd.grad((seen[-1] * torch.randn_like(x)).sum(), (x, seen[-1]))
    return [y.detach().square().mean().sqrt().item() for y in seen], (first.norm() / last.norm()).item(), seen


@pytest.mark.claim("B6", "holds if")
def test_norms_keep_what_layers_read_at_one_scale_at_any_depth():
    after, slope_after, _ = deep("after")
    before, slope_before, seen = deep("before")
    none, slope_none, _ = deep(None)
    assert max(abs(scale - 1) for scale in after) < 0.1
    assert before[-1] < 2 * 32**0.5 and none[-1] > 1e6  # the stream grows like the root of the depth, or exponentially
    assert before[-1] > 3 * before[1]
    assert (F.layer_norm(seen[-1], (32,)).square().mean().sqrt() - 1).abs() < 0.01  # what a branch reads of it
    assert 0.1 < slope_after < 100 and 1 < slope_before < 100
    assert 1e6 < slope_none < math.inf
    found = json.loads((MEASURED / "tantra_models.json").read_text())["figures"]
    small, large = (found[name]["stream"]["scale"] for name in ("minilm", "smollm2"))
    assert max(small) / min(small) < 1.6 and large[-1] / large[0] > 100


@pytest.mark.claim("B7", "holds if")
def test_a_residual_path_keeps_the_input_as_a_term_and_not_its_share():
    _, slope, seen = deep("before")
    _, without, collapsed = deep(None, residual=False)
    assert 1 < slope < 100 and without < 1e-3  # the gradient at the first layer, over that at the last

    def apart(x):
        """One less the mean cosine of two tokens."""
        return 1 - cosine(x, x).masked_select(~torch.eye(17, dtype=torch.bool)).mean()

    assert apart(collapsed[4]) < 0.05  # without the path all tokens soon have one vector
    assert apart(seen[4]) > 0.5 and 0.2 < apart(seen[-1]) < apart(seen[4])  # with it they approach one another slowly
    torch.manual_seed(0)
    layer = TransformerLayer(MultiHeadAttention(12, 3), FeedForward(12, 48), 12, norm_first=True).double()
    x = torch.randn(1, 5, 12).double()
    mix, think = layer.branches()
    middle = x + mix(x)
    torch.testing.assert_close(layer(x) - mix(x) - think(middle), x)  # the input is a term of the sum
    with torch.no_grad():  # and a branch may take it away again: without a norm, a mixer that gives -x
        erases = TransformerLayer(nn.Linear(12, 12), nn.Linear(12, 12), 12, norm=lambda d, eps: nn.Identity()).double()
        for one in erases.modules():
            if isinstance(one, nn.Linear):
                one.weight.copy_(-torch.eye(12))
                one.bias.zero_()
    assert erases(x).abs().max() == 0
    found = json.loads((MEASURED / "tantra_models.json").read_text())["figures"]
    small, large = (found[name]["stream"] for name in ("minilm", "smollm2"))
    assert small["cosine with the input"][-1] < 0.5 and max(large["cosine with the input"][1:]) < 0.15
    assert 14 < large["scale"][1] / large["scale"][0] < 15
    assert large["nearest after a map"]["30"] > 0.5 and large["of tokens not met"]["30"] < 0.05
    assert large["of tokens not met"]["1"] > 0.9  # so a map can find tokens that it was not fitted on


@pytest.mark.claim("B8", "holds if")
def test_the_printed_block_is_a_layer_without_norms():
    torch.manual_seed(0)
    layer = TransformerLayer(
        MultiHeadAttention(12, 3), FeedForward(12, 48), 12, norm=lambda d, eps: nn.Identity()
    ).double()
    x = torch.randn(2, 5, 12).double()
    f = printed("block", attention=layer.mixer, feed_forward=layer.feed_forward)["transformer_block"]
    assert torch.equal(f(x), layer(x))
    scales, _, _ = deep(None, layers=8)
    assert scales[-1] > 30
    found = json.loads((MEASURED / "tantra.json").read_text())["figures"]["norms"]
    two, eight = found["2 layers"], found["8 layers"]
    last = lambda arm: [run["curve"][-1] for run in arm["runs"]]  # noqa: E731
    assert min(last(two["as printed"])) > 0.98
    apart = two["norm before, small inputs"]["mean"] - two["as printed, small inputs"]["mean"]
    assert round(apart, 2) == 0.35
    assert eight["as printed"]["mean"] < eight["norm before"]["mean"]
    for depth in (two, eight):  # not later than with norms after the sums
        assert depth["as printed"]["mean"] > depth["norm after"]["mean"] - 0.01
        assert depth["as printed"]["rate"] < depth["norm before"]["rate"]
