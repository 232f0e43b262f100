"""The Mamba-2 block: by hand, against transformers' mixer, its laws, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import DRAWS, ErrorBudget
from torch import nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Judge

from nondual.efficient_attention.mamba import MambaCache
from nondual.efficient_attention.mamba2 import GroupRMSNorm, Mamba2
from nondual.transformer import FeedForward, TransformerLayer

B, N, E, S, K, P = 2, 11, 6, 5, 4, 3  # and 6 heads of width 3 in 18 inner channels


def block(dtype=torch.float64, seed=0, **more):
    torch.manual_seed(seed)
    made = Mamba2(E, **(dict(d_state=S, d_conv=K, expand=3, d_head=P, n_groups=2, chunk=4) | more))
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 1.5), made.D.uniform_(-1, 1)  # no weight whose place could not be told
    return made.to(dtype)


def judge(ours: Mamba2) -> Judge:
    """transformers' mixer, with the weights of ours."""
    config = Mamba2Config(
        hidden_size=E,
        num_heads=ours.n_heads,
        head_dim=ours.d_head,
        expand=ours.d_inner // E,
        state_size=ours.d_state,
        conv_kernel=ours.d_conv,
        n_groups=ours.n_groups,
        use_bias=ours.in_proj.bias is not None,
        use_conv_bias=ours.conv1d.bias is not None,
        layer_norm_epsilon=ours.norm.eps,
        time_step_limit=ours.dt_limit,
        chunk_size=ours.chunk or 256,
        num_hidden_layers=1,
    )
    theirs = Judge(config, layer_idx=0).to(ours.D.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def sequence(length=N, dtype=torch.float64, batch=B, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, length, E, dtype=dtype, requires_grad=True)


def gradients(module, x, y, g):
    """The gradients of x and of every parameter, by name."""
    named = dict(module.named_parameters())
    return dict(zip(["x", *named], torch.autograd.grad(y, [x, *named.values()], g)))


def assert_close(ours, theirs, tolerance=1e-12):
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m)


# --- what it computes ----------------------------------------------------------------------------------------------


def test_a_case_by_hand():
    """One head of one channel, one state, a window of one step; A = -1, D = 1, and Δ = softplus(x)."""
    mamba = Mamba2(1, d_state=1, d_conv=1, expand=1, d_head=1, conv_bias=False)
    with torch.no_grad():
        for weight in (mamba.in_proj, mamba.conv1d, mamba.out_proj):
            weight.weight.fill_(1)
        mamba.dt_bias.zero_(), mamba.A_log.zero_()
    h, expected = 0.0, []
    for x in (1.0, -2.0, 3.0):
        u = gate = x / (1 + math.exp(-x))  # silu; B = C = u
        delta = math.log1p(math.exp(x))
        h = math.exp(-delta) * h + delta * u * u
        y = (u * h + u) * gate
        expected.append(y / math.sqrt(y * y + 1e-5))
    y = mamba(torch.tensor([[[1.0], [-2.0], [3.0]]]))
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(n_groups=1, bias=True),
        dict(n_groups=6, d_head=3, conv_bias=False),
        dict(d_head=9, n_groups=2, chunk=3, d_conv=2),
        dict(dt_limit=(0.004, 0.03), eps=0.1),
        dict(d_state=1, chunk=64),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, 11])
def test_it_is_transformers_mixer_forward_and_backward(more, length, in_float64):
    ours = block(**more)
    theirs = judge(ours)
    x, g = sequence(length), torch.randn(B, length, E, dtype=torch.float64)
    y = ours(x)
    with in_float64:  # transformers narrows to float32 inside
        judged = theirs(x)
    torch.testing.assert_close(y, judged, atol=1e-12, rtol=1e-12)
    assert_close(gradients(ours, x, y, g), gradients(theirs, x, judged, g), 1e-11)


def test_the_norm_is_torchs_group_by_group():
    torch.manual_seed(0)
    norm, x = GroupRMSNorm(12, 3, eps=0.01), torch.randn(2, 5, 12)
    norm.weight.data.uniform_(0.5, 2)
    parts = [F.rms_norm(part, (4,), w, eps=0.01) for part, w in zip(x.chunk(3, -1), norm.weight.chunk(3))]
    torch.testing.assert_close(norm(x), torch.cat(parts, -1))


def test_it_begins_as_the_released_code_does():
    torch.manual_seed(0)
    mamba = Mamba2(256, d_head=1)  # 512 heads, to see how they lie
    assert mamba.n_heads == 512 and torch.equal(mamba.D, torch.ones(512))
    rates, delta = mamba.A_log.exp(), F.softplus(mamba.dt_bias.double())
    assert rates.min() >= 0.999 and rates.max() <= 16.001
    assert 0.001 <= delta.min() * 1.001 and delta.max() <= 0.1 * 1.001
    for spread in ((rates - 1) / 15, ((delta.log() - math.log(0.001)) / math.log(100)).float()):
        assert torch.histc(spread, 10, 0, 1).min() > 25  # uniform: every tenth holds about a tenth of 512
    assert torch.equal(mamba.norm.weight, torch.ones(512))


def test_it_drops_into_a_layer_as_any_mixer():
    torch.manual_seed(0)
    layer = TransformerLayer(block(torch.float32), FeedForward(E, 13), E, norm_first=True)
    x = torch.randn(B, N, E)
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, 4] = True
    out = layer(x, reset=reset)
    torch.testing.assert_close(out, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1))


# --- laws ----------------------------------------------------------------------------------------------------------


def test_nothing_from_the_future():
    mamba, x = block(), sequence()
    for t in (0, 4, N - 1):
        (g,) = torch.autograd.grad(mamba(x)[:, t].square().sum(), x)
        assert torch.equal(g[:, t + 1 :], torch.zeros_like(g[:, t + 1 :]))
        assert (g[:, : t + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("more", [dict(), dict(dt_limit=(0.004, 0.03))], ids=str)
@pytest.mark.parametrize("cut", [0, 1, 2, 7, N])
def test_in_parts_it_is_the_whole_and_so_are_the_gradients(cut, more):
    mamba, x = block(**more), sequence()
    cache, g = mamba.new_cache(B), torch.randn(B, N, E, dtype=torch.float64)
    whole = mamba(x)
    parts = torch.cat([mamba(x[:, :cut], cache=cache), mamba(x[:, cut:], cache=cache)], 1)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    assert_close(gradients(mamba, x, parts, g), gradients(mamba, x, whole, g), 1e-11)


@torch.no_grad()
def test_a_prompt_and_then_step_by_step():
    mamba, x = block(), sequence()
    cache = mamba.new_cache(B)
    sizes = (cache.conv.shape, cache.state.shape)
    assert sizes == ((B, K - 1, 18 + 2 * 2 * S), (B, 6, P, S))
    outs = [mamba(x[:, :5], cache=cache), *(mamba.step(x[:, t], cache)[:, None] for t in range(5, N))]
    torch.testing.assert_close(torch.cat(outs, 1), mamba(x), atol=1e-12, rtol=1e-12)
    assert (cache.conv.shape, cache.state.shape) == sizes  # as much after eleven as after none
    for impl in ("auto", "reference"):  # and nothing of what was read is kept alive beside it
        mamba.impl = impl
        mamba(torch.cat([x] * 20, 1), cache=cache)
        for kept in (cache.conv, cache.state):
            assert kept.untyped_storage().nbytes() == kept.nbytes
    cache.reset()
    torch.testing.assert_close(mamba(x, cache=cache), mamba(x))


def test_packed_each_is_as_if_alone():
    mamba, x = block(), sequence()
    starts = [0, 1, 3, 8]
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, starts] = True
    spans = list(zip(starts, [*starts[1:], N]))
    cache, last = mamba.new_cache(B), mamba.new_cache(B)
    cache.conv, cache.state = cache.conv + 9, cache.state + 9  # what came before is forgotten
    packed = mamba(x, cache=cache, reset=reset)
    alone = torch.cat([mamba(x[:, a:b], cache=last if b == N else None) for a, b in spans], 1)
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(cache.conv, last.conv)
    torch.testing.assert_close(cache.state, last.state)
    g = torch.randn_like(packed)
    assert_close(gradients(mamba, x, packed, g), gradients(mamba, x, alone, g), 1e-11)


@pytest.mark.parametrize("batch, length", [(B, 0), (0, N), (0, 0)])
def test_nothing_to_read(batch, length):
    mamba, x = block(), sequence(length, batch=batch)
    y = mamba(x, cache=mamba.new_cache(batch))
    assert y.shape == (batch, length, E)
    y.sum().backward()
    assert all(p.grad is None or not p.grad.abs().sum() for p in mamba.parameters())


# --- engines, dtypes and machines ----------------------------------------------------------------------------------


def run(module, x, g, dtype):
    given = x.detach().to(dtype).requires_grad_()
    y = module(given)
    return {"y": y, **gradients(module, given, y, g.to(y.dtype))}


@pytest.mark.parametrize("more", [dict(), dict(impl="chunked"), dict(chunk=None), dict(chunk=16)], ids=str)
def test_the_engine_does_not_matter(more):
    """Against the block in float64: no engine is further off than 2 times (gradients 3) what the reference is."""
    budget = ErrorBudget()
    for seed in range(DRAWS):
        x, g = sequence(37, torch.float32, seed=seed), torch.randn(B, 37, E)
        right = run(block(torch.float32, seed).double(), x, g, torch.float64)
        plain = run(block(torch.float32, seed, impl="reference"), x, g, torch.float32)
        found = run(block(torch.float32, seed, **more), x, g, torch.float32)
        for name, exact in right.items():
            budget.add(name, ours=found[name], plain=plain[name], exact=exact)
    budget.check({"y": 2}, otherwise=3)


def test_narrow_numbers_are_no_further_off_than_in_plain_torch(check_narrow):
    """Under autocast and in bfloat16, next to transformers' mixer in bfloat16: 2 times its error, gradients 3."""
    draw = lambda seed: (sequence(37, torch.float32, seed=seed), torch.randn(B, 37, E))  # noqa: E731
    check_narrow(block, draw, run, lambda ours, x, g: run(judge(ours).bfloat16(), x, g, torch.bfloat16))


def test_on_the_meta_device():
    with torch.device("meta"):
        mamba = Mamba2(8, d_head=4)
        cache = mamba.new_cache(B)
        y = mamba(torch.empty(B, 3, 8), cache=cache)
    assert y.is_meta and y.shape == (B, 3, 8) and cache.state.is_meta


def test_it_compiles_whole():
    mamba, x = block(torch.float32), sequence(5, torch.float32)
    compiled = torch.compile(mamba, fullgraph=True, backend="aot_eager")
    y, judged, g = compiled(x), mamba(x), torch.randn(B, 5, E)
    torch.testing.assert_close(y, judged)
    assert_close(gradients(mamba, x, y, g), gradients(mamba, x, judged, g), 1e-5)
    one, other = mamba.new_cache(B), mamba.new_cache(B)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, cache=one), mamba(x, cache=other))
    torch.testing.assert_close(one.state, other.state)


def test_its_state_comes_back():
    one, other = block(seed=0), block(seed=2)
    assert list(one.state_dict()) == [
        "dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight",
    ]  # fmt: skip
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(sequence()), other(sequence()))


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(d_model=0), r"d_model must be 1 or more, got 0"),
        (dict(d_state=0), r"d_state must be 1 or more, got 0"),
        (dict(d_head=0), r"d_head must be 1 or more, got 0"),
        (dict(n_groups=0), r"n_groups must be 1 or more, got 0"),
        (dict(d_head=5), r"expand \* d_model must be a multiple of d_head, got 16 and 5"),
        (dict(n_groups=3), r"n_groups must divide the heads, 16 / 4 = 4, got 3"),
        (dict(dt_max=0.0001), r"dt_min and dt_max must be in order and above 0, got 0.001 and 0.0001"),
        (dict(dt_limit=(0.1, 0.0)), r"dt_limit must be two bounds in order, 0 or more, got \(0.1, 0.0\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValueError, match=says):
        Mamba2(**(dict(d_model=8, d_head=4) | settings))


@torch.no_grad()
def test_inputs_that_do_not_fit_are_named():
    mamba, cache = block(), block().new_cache(3)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 6\), got \(2, 11, 7\)"):
        mamba(torch.zeros(B, N, E + 1))
    with pytest.raises(ValueError, match=r"x must be \(B, E\), one position of each sequence, got \(2, 11, 6\)"):
        mamba.step(sequence(), mamba.new_cache(B))
    with pytest.raises(ValueError, match=r"cache.conv must be \(2, 3, 38\) for x \(2, 11, 6\) .*new_cache\(2\)"):
        mamba(sequence(), cache=cache)
    with pytest.raises(ValueError, match=r"cache.state must be \(3, 6, 3, 5\) .*, got \(3, 6, 3, 6\)"):
        mamba(sequence(batch=3), cache=MambaCache(cache.conv, F.pad(cache.state, (0, 1))))
    with pytest.raises(ValueError, match=r"reset must be"):
        mamba(sequence(), reset=torch.zeros(B, N + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"nonsense"):
        block(impl="nonsense")(sequence())
    with pytest.raises(TypeError, match=r"return_weights"):  # it has none
        TransformerLayer(mamba, nn.Identity(), E).double()(sequence(), return_weights=True)
