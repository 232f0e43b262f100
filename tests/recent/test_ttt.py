"""TTT layers: by hand, the laws of every mixer, the language model, and the claim that training goes on in use."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from nondual.language_models.causal import CausalLM
from nondual.mixers import CachedMixer
from nondual.ops.linear_attention import linear_attention
from nondual.ops.ttt import NormedResidual, ttt
from nondual.recent import TTT, TTTMLP, TTTCache, TTTLinear
from nondual.training import optimiser, train
from nondual.transformer_layer import MixerBlock

B, N, E, H, M, V = 2, 11, 12, 3, 4, 29
LAYERS = {
    "linear": partial(TTTLinear, E, H, mini_batch=M),
    "mlp": partial(TTTMLP, E, H, mini_batch=M),
    "bare": partial(TTT, E, H, mini_batch=M, d_conv=0, gate=False, inner_bias=False, d_head=5),
    "three maps": partial(TTT, E, H, mini_batch=M, hidden=(2, 3), d_head=5, d_conv=2),
}


def make(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    with torch.no_grad():  # away from the first values, at which some gradients are 0
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    layer.base_rate = 1.0
    return layer


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- by hand -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_one_token_by_hand():
    """Width 2: k = q = x, v = -x. From zero weights f(k) = k, so that the loss is what the labels differ by."""
    layer = TTT(2, 1, mini_batch=1, d_conv=0, gate=False, inner_bias=False).double()
    eye = torch.eye(2, dtype=torch.float64)
    layer.in_proj.weight.copy_(torch.cat([eye, eye, -eye]))
    layer.out_proj.weight.copy_(eye)
    layer.norm = nn.Identity()
    layer.weights[0].zero_()
    layer.rate_proj.weight.zero_()
    x = torch.tensor([[[1.0, 3.0]]]).double()
    # z = 0, so that its deviation is sqrt(eps) = 1e-3: g = (2, 6), less its mean (-2, 2), over 1e-3. η = 1/2 · 1/2.
    # W = -1/4 · k gᵀ · 1e3, and q W = -1/4 · 10 · (-2, 2) · 1e3: normalised (1, -1).
    torch.testing.assert_close(layer(x), x + torch.tensor([1.0, -1.0]).double())
    layer.base_rate = 0.0
    torch.testing.assert_close(layer(x), x)


def test_first_rates_and_shares():
    layer = TTTLinear(E, H, base_rate=0.8, mini_batch=M)
    assert layer.shares().tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    nn.init.zeros_(layer.rate_proj.weight)
    assert layer.rates(torch.randn(B, N, E)).unique().tolist() == pytest.approx([0.8 / (E / H) / 2])
    with torch.no_grad():
        layer.share_offset.fill_(-0.5)
    assert layer.shares().tolist() == pytest.approx([0.5, 0, 0, 0])
    assert TTTMLP(E, H).base_rate == 0.1 and TTTLinear(E, H).base_rate == 1.0
    assert [tuple(w.shape) for w in TTTMLP(E, H).weights] == [(H, 5, 16), (H, 17, 4)]


# --- judges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_and_every_gradient_are_those_of_the_token_by_token_form(name):
    layer, x, found = make(name), draw(B, N, E).requires_grad_(), []
    for impl in ("dual", "reference"):
        layer.impl = impl
        out = layer(x)
        given = [x, *layer.parameters()]
        found.append((out, torch.autograd.grad((out * draw(B, N, E, seed=3)).sum(), given)))
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)
    assert all(g.abs().max() > 0 for g in found[0][1])


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cuts", [[3, 0, 2, 6], [1] * N, [4, 4, 3]])
@torch.no_grad()
def test_in_parts_it_is_the_whole(name, cuts):
    layer, x = make(name), draw(B, N, E)
    assert isinstance(layer, CachedMixer)
    cache = layer.new_cache(B)
    parts = torch.cat([layer(part, cache=cache) for part in x.split(cuts, 1)], 1)
    torch.testing.assert_close(parts, layer(x), atol=1e-10, rtol=1e-10)
    cache.reset()
    torch.testing.assert_close(layer(x, cache=cache), layer(x))


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_no_position_sees_a_later_one(name):
    layer, x = make(name), draw(B, N, E)
    other = torch.cat([x[:, :5], draw(B, N - 5, E, seed=2)], 1)
    torch.testing.assert_close(layer(other)[:, :5], layer(x)[:, :5], atol=1e-12, rtol=1e-12)
    assert not torch.isclose(layer(other)[:, 5:], layer(x)[:, 5:]).all(-1).any()


@torch.no_grad()
def test_a_caches_rows_can_be_taken_for_a_beam_search():
    layer, x = make("mlp"), draw(B, N, E)
    cache = layer.new_cache(B)
    assert cache.select(torch.tensor([1])).conv.shape[0] == 1
    layer(x[:, :6], cache=cache)
    rows = torch.tensor([1, 1, 0])
    chosen, kept = cache.select(rows), copy.copy(cache)
    torch.testing.assert_close(layer(x[rows, 6:], cache=chosen), layer(x)[rows, 6:], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(layer(x[:, 6:], cache=kept), layer(x)[:, 6:], atol=1e-10, rtol=1e-10)
    assert cache.state.seen == 6 - M


def test_a_call_that_raises_changes_no_cache():
    layer, x = make("linear"), draw(B, N, E)
    cache = layer.new_cache(B)
    with torch.no_grad():
        layer(x, cache=cache)
    before = dict(vars(cache))
    layer.norm = nn.LayerNorm(7).double()
    with pytest.raises(RuntimeError):
        layer(x, cache=cache)
    assert all(vars(cache)[name] is value for name, value in before.items())


# --- in a language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TTTLinear, TTTMLP])
def test_a_language_model_trains_and_generates_the_same_with_caches_and_without(kind):
    torch.manual_seed(0)
    model = CausalLM(V, E, 2, layer=lambda i: MixerBlock(kind(E, H, mini_batch=M), E))
    ids = torch.randint(V, (B, 23))
    history = train(
        model, model.loss, lambda g: ids, optimiser=optimiser(model, 1e-2), steps=30, log_every=10, name=None
    )
    assert history[-1]["loss"] < history[0]["loss"] - 0.2
    model.eval()
    cached, whole = (model.generate(ids[:, :5], 9, cached=c) for c in (True, False))
    assert torch.equal(cached, whole)
    with pytest.raises(ValueError, match=r"reset must be left out: the mixer of layer 0, TTT(Linear|MLP), does not"):
        model(ids, reset=torch.zeros(B, 23, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_and_autocast(dtype):
    layer, x = make("linear").to(dtype), draw(B, N, E).to(dtype)
    cache = layer.new_cache(B)
    out = layer(x, cache=cache)
    assert out.dtype == cache.conv.dtype == dtype and cache.state.weights[0].dtype == torch.float32
    assert out.isfinite().all()
    full = make("linear").float()
    with torch.autocast("cpu", torch.bfloat16):
        assert full(x.float()).isfinite().all()


def test_compiled_at_several_lengths():
    layer = make("linear")
    compiled = torch.compile(layer, backend="aot_eager")
    for n in (3, 9):
        torch.testing.assert_close(compiled(draw(B, n, E)), layer(draw(B, n, E)))


# --- errors --------------------------------------------------------------------------------------------------------


def test_wrong_arguments_and_inputs_are_named():
    for says, options in {
        "d_model must be a multiple of n_heads, got 12 and 5; or give d_head": {"n_heads": 5},
        "mini_batch must be 1 or more, got 0": {"mini_batch": 0},
        "d_conv must be 0 or more, got -1": {"d_conv": -1},
        r"hidden\[0\] must be 1 or more, got 0": {"hidden": (0,)},
        "base_rate must be 0 or more, got -1.0": {"base_rate": -1.0},
    }.items():
        with pytest.raises(ValueError, match=says):
            TTT(**{"d_model": E, "n_heads": H} | options)
    layer, x = make("linear"), draw(B, N, E)
    for says, given, cache in (
        (r"x must be \(B, N, 12\), got \(2, 11, 11\)", x[..., 1:], None),
        ("x must be floating point, got torch.int64", x.long(), None),
        (r"cache.conv must be \(2, 3, 24\) for x \(2, 11, 12\).*new_cache\(2\)", x, layer.new_cache(3)),
    ):
        with pytest.raises(ValueError, match=says):
            layer(given, cache=cache)
    with pytest.raises(TypeError, match="cache must be a TTTCache, from this module's new_cache, got list"):
        layer(x, cache=[])
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        layer([1.0])
    assert isinstance(layer.new_cache(1), TTTCache)


# --- the claim -----------------------------------------------------------------------------------------------------


@pytest.mark.claim("A8.1", "holds if")
def test_in_use_the_inner_model_is_trained_and_the_layer_is_not():
    """The border begins to dissolve: what is trained while it is used is the inner model, by real gradient steps.

    No parameter of the layer changes in use. The inner weights do, and each step lowers the loss that it descends. In
    the plain limit that is no news: the same steps are what linear attention has always done.
    """
    layer, x = make("linear").eval(), draw(1, N, E)
    before = copy.deepcopy(layer.state_dict())
    cache = layer.new_cache(1)
    with torch.no_grad():
        layer(x, cache=cache)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert (cache.state.weights[0] - layer.weights[0]).abs().max() > 1e-3

    # Each small step lowers the loss of what it was taken on.
    k, v = draw(1, H, 1, 4, seed=5), draw(1, H, 1, 4, seed=6)
    head = NormedResidual(torch.ones(H, 4).double(), torch.zeros(H, 4).double())
    start, rate = [draw(H, 4, 4, seed=7)], torch.full((1, H, 1), 1e-3).double()
    _, state = ttt(k, k, v, rate, start, head=head, mini_batch=1)

    def loss(w):
        return (head.output(k @ w, k) - v).square().sum((-1, -2))

    assert (loss(state.weights[0]) < loss(start[0])).all()

    # Without norm, from zero and in one batch it is linear attention, exactly.
    q, k, v = (draw(B, H, N, 4, seed=i) for i in range(3))
    out, _ = ttt(q, k, v, torch.ones(B, H, N).double(), [torch.zeros(H, 4, 4).double()], mini_batch=N)
    torch.testing.assert_close(out, linear_attention(q, k, v)[0], atol=1e-12, rtol=1e-12)
