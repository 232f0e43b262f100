"""Value residuals: a judge with torch's own attention, outputs and gradients, the start, the cache, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nondual.connections import LayerCall
from nondual.language_models.causal import CausalLM
from nondual.language_models.gpt import GPT
from nondual.recent.value_residual import ValueResidual
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import MixerBlock

B, N, V, E, L, H = 2, 7, 11, 12, 3, 3


def ids():
    return torch.randint(V, (B, N), generator=torch.Generator().manual_seed(1))


def gpt(connection=None, **options):
    torch.manual_seed(0)
    model = GPT(V, E, L, H, max_len=N, **options)
    if connection is not None:
        model.connection = connection
    with torch.no_grad():
        model.embeddings.weight *= 40
    return model.double()


def moved():
    connection = ValueResidual(L)
    with torch.no_grad():
        connection.first.copy_(torch.tensor([0.7, -0.4]))
        connection.own.copy_(torch.tensor([0.2, 1.3]))
    return connection


def test_output_and_gradients_are_those_of_the_equation_with_torchs_attention():
    model = gpt(moved())
    a, b = model.connection.first, model.connection.own
    x, first = model.embeddings(ids()) + model.positions(N), None
    for n, layer in enumerate(model.layers):
        normed, mixer = layer.norm1(x), layer.mixer
        q, k, v = (p(normed).view(B, N, H, -1).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        first = v if first is None else first
        v = v if n == 0 else a[n - 1] * first + b[n - 1] * v
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + mixer.out_proj(out)
        x = x + layer.feed_forward(layer.norm2(x))
    right = model.scores(model.norm_f(x))
    torch.testing.assert_close(model(ids()), right, atol=1e-12, rtol=1e-12)
    pull, given = torch.randn(right.shape, dtype=torch.float64), list(model.parameters())
    for name, ours, theirs in zip(
        dict(model.named_parameters()),
        torch.autograd.grad(model(ids()), given, pull),
        torch.autograd.grad(right, given, pull),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9, msg=name)


def test_with_0_and_1_it_is_the_plain_stream_and_the_papers_start_is_one_half_of_each():
    assert torch.equal(gpt(ValueResidual(L, first=0.0, own=1.0))(ids()), gpt()(ids()))
    start = ValueResidual(4)
    assert start.first.tolist() == start.own.tolist() == [0.5] * 3
    assert sum(x.numel() for x in start.parameters()) == 2 * 3


def test_the_cache_keeps_the_values_as_they_were_mixed():
    model = gpt(moved(), n_kv_heads=1)
    with torch.no_grad():
        cache = model.new_cache(B, N)
        parts = torch.cat([model(part, cache=cache) for part in ids().split([3, 1, 3], 1)], 1)
        torch.testing.assert_close(parts, model(ids()), atol=1e-12, rtol=1e-12)


def test_a_function_of_the_values_is_called_once_with_them_and_cannot_go_with_a_memory():
    torch.manual_seed(0)
    attention, x, seen = MultiHeadAttention(E, H, n_kv_heads=1), torch.randn(B, N, E), []
    doubled = attention(x, values=lambda v: (seen.append(v), 2 * v)[1])
    bias = attention.out_proj.bias
    torch.testing.assert_close(doubled - bias, 2 * (attention(x) - bias))
    assert [v.shape for v in seen] == [(B, 1, N, E // H)]
    with pytest.raises(ValueError, match="values changes those of x itself and cannot go with memory"):
        attention(x, x, values=lambda v: v)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="n_layers must be 1 or more, got 0"):
        ValueResidual(0)

    class Shift(nn.Module):
        def forward(self, x):
            return F.pad(x, (0, 0, 1, -1))

    model = CausalLM(V, E, 2, layer=lambda _: MixerBlock(Shift(), E), connection=ValueResidual(2))
    with pytest.raises(ValueError, match="values must be left out: the mixer of layer 0, Shift, does not take it"):
        model(ids())
    with pytest.raises(ValueError, match=r"layers must have a mixer whose values can be mixed, .*, got Linear"):
        ValueResidual(1)(torch.zeros(1, 2, 3), [LayerCall(nn.Linear(3, 3), {})])


@pytest.mark.parametrize("heads, kv_heads", [((6, 6), (1, 6)), ((6, 6), (2, 3)), ((3, 6), (3, 6)), ((2, 4), (2, 2))])
def test_heads_that_differ_between_layers_are_refused_and_no_cache_has_changed(heads, kv_heads):
    model = CausalLM(
        V, E, 2, layer=lambda i: MixerBlock(MultiHeadAttention(E, heads[i], n_kv_heads=kv_heads[i], causal=True), E),
        connection=ValueResidual(2),
    )  # fmt: skip
    cache = model.new_cache(B, N)
    widths = [E // h for h in heads]
    told = (
        f"mixers must have as many key/value heads of one width in every layer, got {kv_heads[0]} of width {widths[0]} "
        f"in layer 0 and {kv_heads[1]} of width {widths[1]} in layer 1"
    )
    with torch.no_grad(), pytest.raises(ValueError, match=told):
        model(ids(), cache=cache)
    assert [part.length for part in cache] == [0, 0]
