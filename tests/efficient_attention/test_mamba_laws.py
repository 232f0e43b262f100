"""The laws that the blocks of Mamba and Mamba-2 share: causal, in parts the whole, packed as if alone, any engine."""

import re

import pytest
import torch
import torch.nn.functional as F
from harness import DRAWS, ErrorBudget
from mamba_cases import (
    KINDS,
    WIDTH,
    B,
    K,
    N,
    P,
    S,
    assert_close,
    block,
    gradients,
    mambapys_block,
    run,
    sequence,
    transformers_mixer,
)
from torch import nn

from nondual.efficient_attention.mamba import Mamba, MambaCache
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.transformer import FeedForward, TransformerLayer

both = pytest.mark.parametrize("kind", KINDS)
NEAR = {"mamba": 1e-13, "mamba2": 1e-12}  # outputs in float64
NEAR_GRADIENT = {"mamba": 1e-12, "mamba2": 1e-11}
CONV = {"mamba": (B, K - 1, 3 * 7), "mamba2": (B, K - 1, 18 + 2 * 2 * S)}  # shapes of what a cache holds
STATE = {"mamba": (B, 3 * 7, S), "mamba2": (B, 6, P, S)}


def near(kind):
    return dict(atol=NEAR[kind], rtol=NEAR[kind])


# --- positions -----------------------------------------------------------------------------------------------------


@both
def test_it_drops_into_a_layer_as_any_mixer(kind):
    E = WIDTH[kind]
    torch.manual_seed(0)
    layer = TransformerLayer(block(kind, torch.float32), FeedForward(E, 13), E, norm_first=True)
    x = torch.randn(B, N, E)
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, 4] = True
    out = layer(x, reset=reset)
    torch.testing.assert_close(out, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], 1))


@both
def test_nothing_from_the_future(kind):
    mamba, x = block(kind), sequence(kind)
    for t in (0, 4, N - 1):
        (g,) = torch.autograd.grad(mamba(x)[:, t].square().sum(), x)
        assert torch.equal(g[:, t + 1 :], torch.zeros_like(g[:, t + 1 :]))
        assert (g[:, : t + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize(
    "kind, more", [("mamba", {}), ("mamba2", {}), ("mamba2", {"dt_limit": (0.004, 0.03)})], ids=str
)
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 7, N])
def test_in_parts_it_is_the_whole_and_so_are_the_gradients(cut, kind, more):
    mamba, x = block(kind, **more), sequence(kind)
    cache, g = mamba.new_cache(B), torch.randn(x.shape, dtype=torch.float64)
    whole = mamba(x)
    parts = torch.cat([mamba(x[:, :cut], cache=cache), mamba(x[:, cut:], cache=cache)], 1)
    torch.testing.assert_close(parts, whole, **near(kind))
    assert_close(gradients(mamba, x, parts, g), gradients(mamba, x, whole, g), NEAR_GRADIENT[kind])


@both
@torch.no_grad()
def test_a_prompt_and_then_step_by_step(kind):
    mamba, x = block(kind), sequence(kind)
    cache = mamba.new_cache(B)
    assert (cache.conv.shape, cache.state.shape) == (CONV[kind], STATE[kind])
    outs = [mamba(x[:, :5], cache=cache), *(mamba.step(x[:, t], cache)[:, None] for t in range(5, N))]
    torch.testing.assert_close(torch.cat(outs, 1), mamba(x), **near(kind))
    assert (cache.conv.shape, cache.state.shape) == (CONV[kind], STATE[kind])  # as much after eleven as after none
    for impl in ("auto", "reference"):  # and nothing of what was read is kept alive beside it
        mamba.impl = impl
        mamba(torch.cat([x] * 20, 1), cache=cache)
        for kept in (cache.conv, cache.state):
            assert kept.untyped_storage().nbytes() == kept.nbytes
    cache.reset()
    torch.testing.assert_close(mamba(x, cache=cache), mamba(x))


@both
def test_packed_each_is_as_if_alone(kind):
    mamba, x = block(kind), sequence(kind)
    starts = [0, 1, 3, 8]
    reset = torch.zeros(B, N, dtype=torch.bool)
    reset[:, starts] = True
    spans = list(zip(starts, [*starts[1:], N]))
    cache, last = mamba.new_cache(B), mamba.new_cache(B)
    before = torch.nan if kind == "mamba" else 9  # in Mamba-2 a NaN may reach its chunk, as nondual.ops.ssd says
    cache.conv, cache.state = cache.conv + before, cache.state + before  # what came before is forgotten
    packed = mamba(x, cache=cache, reset=reset)
    alone = torch.cat([mamba(x[:, a:b], cache=last if b == N else None) for a, b in spans], 1)
    torch.testing.assert_close(packed, alone, **near(kind))
    torch.testing.assert_close(cache.conv, last.conv)
    torch.testing.assert_close(cache.state, last.state)
    g = torch.randn_like(packed)
    assert_close(gradients(mamba, x, packed, g), gradients(mamba, x, alone, g), NEAR_GRADIENT[kind])


@both
@pytest.mark.parametrize("batch, length", [(B, 0), (0, N), (0, 0)])
def test_nothing_to_read(batch, length, kind):
    mamba, x = block(kind), sequence(kind, length, batch=batch)
    cache = mamba.new_cache(batch)
    y = mamba(x, cache=cache)
    assert y.shape == x.shape and cache.conv.shape == (batch, *CONV[kind][1:])
    y.sum().backward()
    assert all(p.grad is None or not p.grad.abs().sum() for p in mamba.parameters())


# --- engines, dtypes and machines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, more",
    [
        ("mamba", {}),
        ("mamba2", {}),
        ("mamba2", {"impl": "chunked"}),
        ("mamba2", {"chunk": None}),
        ("mamba2", {"chunk": 16}),
    ],
    ids=str,
)
def test_the_engine_does_not_matter(kind, more):
    """Against the block in float64: no engine is further off than 2 times (gradients 3) what the reference is."""
    budget = ErrorBudget()
    for seed in range(DRAWS):
        x = sequence(kind, 37, torch.float32, seed=seed)
        g = torch.randn(x.shape)
        right = run(block(kind, torch.float32, seed, impl="reference").double(), x, g, torch.float64)
        plain = run(block(kind, torch.float32, seed, impl="reference"), x, g, torch.float32)
        found = run(block(kind, torch.float32, seed, **more), x, g, torch.float32)
        for name, exact in right.items():
            budget.add(name, ours=found[name], plain=plain[name], exact=exact)
    budget.check({"y": 2}, otherwise=3)


def by_mambapy(ours, x, g):
    """mambapy's block under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return run(mambapys_block(ours), x, g, torch.float32)


def by_transformers(ours, x, g):
    """transformers' mixer in bfloat16."""
    return run(transformers_mixer(ours).bfloat16(), x, g, torch.bfloat16)


@pytest.mark.parametrize("kind, judged", [("mamba", by_mambapy), ("mamba2", by_transformers)], ids=KINDS)
def test_narrow_numbers_are_no_further_off_than_in_plain_torch(kind, judged):
    """Under autocast, in parts too, and in bfloat16, next to an independent block: 2 times its error, gradients 3."""
    budget = ErrorBudget()
    for seed in range(DRAWS):
        ours, x = block(kind, torch.float32, seed), sequence(kind, 37, torch.float32, seed=seed)
        g = torch.randn(x.shape)
        exact = run(block(kind, torch.float32, seed).double(), x, g, torch.float64)
        plain = judged(ours, x, g)
        cache = ours.new_cache(B)
        with torch.autocast("cpu", torch.bfloat16):
            cast = run(ours, x, g, torch.float32)
            parts = torch.cat([ours(x[:, :5], cache=cache), ours(x[:, 5:], cache=cache)], 1)
        assert cast["y"].dtype == parts.dtype == torch.bfloat16 and cache.state.dtype == torch.float32
        half = run(ours.bfloat16(), x, g, torch.bfloat16)
        assert half["y"].dtype == torch.bfloat16 and ours.new_cache(B).conv.dtype == torch.bfloat16
        budget.add("y", ours=parts, plain=plain["y"], exact=exact["y"])
        for name, right in exact.items():
            for narrow in (cast[name], half[name]):
                budget.add(name, ours=narrow.bfloat16(), plain=plain[name], exact=right)
    budget.check({"y": 2}, otherwise=3, ulps=1)


@pytest.mark.parametrize("make", [lambda: Mamba(8), lambda: Mamba2(8, d_head=4)], ids=KINDS)
def test_on_the_meta_device(make):
    with torch.device("meta"):
        mamba = make()
        cache = mamba.new_cache(B)
        y = mamba(torch.empty(B, 3, 8), cache=cache)
    assert y.is_meta and y.shape == (B, 3, 8) and cache.state.is_meta


@both
def test_it_compiles_whole(kind):
    mamba, x = block(kind, torch.float32), sequence(kind, 5, torch.float32)
    compiled = torch.compile(mamba, fullgraph=True, backend="aot_eager")
    y, judged, g = compiled(x), mamba(x), torch.randn(x.shape)
    torch.testing.assert_close(y, judged)
    assert_close(gradients(mamba, x, y, g), gradients(mamba, x, judged, g), 1e-5)
    one, other = mamba.new_cache(B), mamba.new_cache(B)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, cache=one), mamba(x, cache=other))
    torch.testing.assert_close(one.state, other.state)


NAMES = {
    "mamba": [
        "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight",
        "dt_proj.bias", "out_proj.weight",
    ],
    "mamba2": [
        "dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight",
    ],
}  # fmt: skip


@both
def test_its_state_comes_back(kind):
    one, other = block(kind, seed=0), block(kind, seed=2)
    assert list(one.state_dict()) == NAMES[kind]
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(sequence(kind)), other(sequence(kind)))


# --- what it refuses -----------------------------------------------------------------------------------------------


@both
@torch.no_grad()
def test_inputs_that_do_not_fit_are_named(kind):
    E, mamba, cache = WIDTH[kind], block(kind), block(kind).new_cache(3)
    conv, state, x = CONV[kind], (3, *STATE[kind][1:]), sequence(kind)

    def refused(says):
        return pytest.raises(ValueError, match=re.escape(says))

    with refused(f"x must be (B, N, {E}), got (2, 11, {E + 1})"):
        mamba(torch.zeros(B, N, E + 1))
    with refused(f"x must be (B, N, {E}), got (11, {E})"):
        mamba(torch.zeros(N, E))
    with refused(f"x must be (B, E), one position of each sequence, got (2, 11, {E})"):
        mamba.step(x, mamba.new_cache(B))
    with refused(f"cache.conv must be {conv} for x (2, 11, {E}) in this module, got {(3, *conv[1:])}; ") as raised:
        mamba(x, cache=cache)
    assert raised.match(r"make one with new_cache\(2\)")
    x = sequence(kind, batch=3)
    with refused(f"cache.state must be {state} for x (3, 11, {E}) in this module, got {(*state[:-1], S + 1)}"):
        mamba(x, cache=MambaCache(cache.conv, F.pad(cache.state, (0, 1))))
    with refused("cache.conv must be on the device of x, cpu, got meta"):
        mamba(x, cache=MambaCache(cache.conv.to("meta"), cache.state))
    with refused("reset must be"):
        mamba(x, reset=torch.zeros(3, N + 1, dtype=torch.bool))
    with refused("nonsense"):
        block(kind, impl="nonsense")(x)
    with pytest.raises(TypeError, match=r"return_weights"):  # it has none
        TransformerLayer(mamba, nn.Identity(), E).double()(x, return_weights=True)
