"""What every mixer does alike, and the helpers that they share."""

from functools import partial

import pytest
import torch
from torch import nn

from nondual.decoder import Decoder
from nondual.efficient_attention.linear_attention import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    LinearAttentionMixer,
    LinearMixer,
    Retention,
)
from nondual.efficient_attention.mamba import Mamba
from nondual.efficient_attention.mamba2 import Mamba2
from nondual.efficient_attention.native_sparse_attention import NativeSparseAttention
from nondual.efficient_attention.s4d import S4D
from nondual.mixers import CachedMixer, as_before_if_raised, check_reset, check_takes, sequence_starts
from nondual.ops import masks
from nondual.recent import TTTMLP, TTTLinear
from nondual.self_attention import MultiHeadAttention
from nondual.transformer import Encoder

B, N, E = 2, 9, 12
MIXERS = {
    "attention": partial(MultiHeadAttention, E, 4, causal=True),
    "grouped heads": partial(MultiHeadAttention, E, 4, n_kv_heads=2, causal=True),
    "mamba": partial(Mamba, E, d_state=5),
    "mamba2": partial(Mamba2, E, d_state=5, d_head=4),
    "s4d": partial(S4D, E, 6),
    "linear attention": partial(LinearAttentionMixer, E, 3),
    "linear attention, no feature map": partial(LinearMixer, E, 3, d_value=5),
    "retention": partial(Retention, E, 3),
    "gated linear attention": partial(GatedLinearAttention, E, 3, d_value=5),
    "delta rule": partial(DeltaNet, E, 3),
    "delta rule, negative too": partial(DeltaNet, E, 3, d_conv=0, beta_max=2.0),
    "gated delta rule": partial(GatedDeltaNet, E, 3, d_value=5),
    "native sparse attention": partial(NativeSparseAttention, E, 4, n_kv_heads=2, block=2, selected=3, window=3),
    "test-time training, linear": partial(TTTLinear, E, 3, mini_batch=4),
    "test-time training, MLP": partial(TTTMLP, E, 3, mini_batch=4),
}
WHOLE = {"s4d", "native sparse attention", "test-time training, linear", "test-time training, MLP"}
PACKED = [name for name in MIXERS if name not in WHOLE]
STARTS = [[0, 4], [0, 1]]  # of the sequences packed in either row


def make(name):
    torch.manual_seed(0)
    return MIXERS[name]().double()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resets():
    reset = torch.zeros(B, N, dtype=torch.bool)
    for row, starts in enumerate(STARTS):
        reset[row, starts] = True
    return reset


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXERS)
def test_no_position_sees_a_later_one(name):
    mixer, x = make(name), draw(B, N, E)
    other = torch.cat([x[:, :5], draw(B, N - 5, E, seed=2)], 1)
    torch.testing.assert_close(mixer(other)[:, :5], mixer(x)[:, :5], atol=1e-12, rtol=1e-12)
    assert not torch.isclose(mixer(other)[:, 5:], mixer(x)[:, 5:]).all(-1).any()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_in_parts_it_is_the_whole(name):
    mixer, x = make(name), draw(B, N, E)
    assert isinstance(mixer, CachedMixer)
    cache = mixer.new_cache(B, N)
    parts = torch.cat([mixer(part, cache=cache) for part in x.split([4, 0, 1, 1, N - 6], 1)], 1)
    torch.testing.assert_close(parts, mixer(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", PACKED)
def test_packed_each_is_as_if_alone_forward_and_backward(name):
    mixer, x, reset = make(name), draw(B, N, E).requires_grad_(), resets()
    packed = mixer(x, reset=reset)
    alone = []
    for row, starts in enumerate(STARTS):
        spans = zip(starts, [*starts[1:], N])
        alone.append(torch.cat([mixer(x[row : row + 1, a:b]) for a, b in spans], 1))
    alone = torch.cat(alone)
    torch.testing.assert_close(packed, alone, atol=1e-12, rtol=1e-12)
    g, parameters = draw(B, N, E, seed=3), list(mixer.parameters())
    for ours, theirs in zip(*(torch.autograd.grad((y * g).sum(), [x, *parameters]) for y in (packed, alone))):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("cuts", [[5, 4], [2, 1, 1, 1, 1, 1, 1, 1], [1] * N, [0, N]])
@torch.no_grad()
def test_packed_and_in_parts(name, cuts):
    """A cache goes on where the last sequence began, also in calls that say nothing of resets."""
    mixer, x, reset = make(name), draw(B, N, E), resets()
    whole, cache, at, parts = mixer(x, reset=reset), mixer.new_cache(B, N), 0, []
    for n in cuts:
        here = reset[:, at : at + n]
        parts.append(mixer(x[:, at : at + n], cache=cache, reset=here if here.any() else None))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=1e-12)


def test_attention_that_is_not_causal_sees_its_own_sequence_whole():
    attention, x, reset = MultiHeadAttention(E, 4).double(), draw(B, N, E), resets()
    alone = torch.cat([attention(x[:1, :4]), attention(x[:1, 4:])], 1)
    torch.testing.assert_close(attention(x, reset=reset)[:1], alone)
    masked = attention(x, reset=reset, mask=masks.causal(N))
    torch.testing.assert_close(masked, attention(x, reset=reset, causal=True))
    bias = torch.zeros(N, N, dtype=torch.float64).masked_fill(~masks.causal(N), -torch.inf)
    torch.testing.assert_close(attention(x, reset=reset, mask=bias), masked)


# --- the helpers ---------------------------------------------------------------------------------------------------


def test_where_sequences_began_by_hand():
    reset = torch.tensor([[False, False, True, False, True]])
    assert sequence_starts(reset, 5).tolist() == [[0, 0, 2, 2, 4]]
    assert sequence_starts(reset, 5, length=10).tolist() == [[0, 0, 12, 12, 14]]
    assert sequence_starts(reset, 5, length=10, start=torch.tensor([7])).tolist() == [[7, 7, 12, 12, 14]]
    assert sequence_starts(None, 2, length=10, start=torch.tensor([7])).tolist() == [[7, 7]]
    assert sequence_starts(None, 2, length=10) is None


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_what_raises_has_changed_no_cache(name, held_by):
    mixer, x = make(name), draw(B, N, E)
    cache = mixer.new_cache(B, N)
    mixer(x[:, :4], cache=cache)
    before = held_by(cache)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(*((mixer, "op") if name == "s4d" else (mixer.out_proj, "forward")), lambda *_: 1 / 0)
        for part in (x[:, 4:], x[:, 4:5]):
            with pytest.raises(ZeroDivisionError):
                mixer(part, cache=cache)
            assert held_by(cache) == before
    torch.testing.assert_close(mixer(x[:, 4:], cache=cache), mixer(x)[:, 4:])


def test_caches_in_caches_and_lists_are_put_back_too(held_by):
    class Cache:
        def __init__(self, inner):
            self.inner, self.read, self.named = inner, [1, 2], {"a": 1}

    cache = [Cache(Cache(None)), Cache(())]
    cache[1].inner = cache[0]  # met twice
    before = held_by(cache)
    with pytest.raises(ZeroDivisionError), as_before_if_raised(cache):
        cache[0].inner.read.append(3)
        cache[0].inner.named["b"], cache[0].inner.more, cache[0].read = 2, 5, []
        cache.append(None)
        raise ZeroDivisionError
    assert held_by(cache) == before and not hasattr(cache[0].inner, "more") and cache[0].inner.named == {"a": 1}


def test_caches_are_put_back_and_none_is_no_cache():
    class Cache:
        def __init__(self):
            self.state = 1

    cache = Cache()
    with pytest.raises(KeyboardInterrupt), as_before_if_raised(None, cache):
        cache.state = 2
        raise KeyboardInterrupt
    assert cache.state == 1
    with as_before_if_raised(cache):
        cache.state = 3
    assert cache.state == 3


def test_what_a_mixer_does_not_take_is_named():
    class Average(nn.Module):
        def forward(self, x, *, cache=None):
            return x

    class Anything(nn.Module):
        def forward(self, x, **options):
            return x

    check_takes(Average(), "cache", "layer 0")
    check_takes(Anything(), "reset", "layer 0")
    with pytest.raises(ValueError, match="reset must be left out: the mixer of layer 3, Average, does not take it"):
        check_takes(Average(), "reset", "layer 3")


@pytest.mark.parametrize("model", [Encoder, Decoder])
def test_a_stack_names_the_layer_that_makes_no_cache(model):
    class Average(nn.Module):
        def forward(self, x):
            return x

    stack = model(E, 4, 2 * E, 2).double()
    stack.layers[1].mixer = Average()
    says = "the mixer of layer 1, Average, has no new_cache: call without a cache"
    with pytest.raises(ValueError, match=says):
        stack.new_cache(B, N)


@pytest.mark.parametrize("name", PACKED)
def test_resets_and_caches_that_do_not_fit(name):
    mixer, x = make(name), draw(B, N, E)
    for reset in (torch.zeros(B, N), torch.zeros(B, N + 1, dtype=torch.bool), [[True] * N] * B):
        with pytest.raises((ValueError, TypeError), match="reset must be"):
            mixer(x, reset=reset)
        with pytest.raises((ValueError, TypeError), match="reset must be"):
            check_reset(reset, x)
    with pytest.raises(
        TypeError,
        match=r"cache must be a (KVCache|MambaCache|LinearAttentionCache), from this module's new_cache, got list",
    ):
        mixer(x, cache=[])


def test_attention_says_what_its_cache_needs():
    attention, x = MultiHeadAttention(E, 4), torch.zeros(B, N, E)
    with pytest.raises(ValueError, match="max_len must be given, 1 or more: attention keeps every position, got None"):
        attention.new_cache(B)
    with pytest.raises(ValueError, match="reset marks sequences within x and cannot go with memory"):
        attention(x, x, reset=resets())
    assert attention.bfloat16().new_cache(B, 3).keys.dtype == torch.bfloat16
    assert attention.to("meta").new_cache(B, 3).keys.is_meta


def test_s4d_holds_its_state_in_a_cache_or_leaves_it_to_the_caller():
    mixer, x = make("s4d"), draw(B, N, E)
    cache, (_, state) = mixer.new_cache(B), mixer(x, return_state=True)
    mixer(x, cache=cache)
    torch.testing.assert_close(cache.state, state)
    with pytest.raises(ValueError, match="state must be left out where there is a cache, which holds it"):
        mixer(x, state, cache=cache)
    with pytest.raises(TypeError, match="cache must be an S4DCache, from this module's new_cache, got Tensor"):
        mixer(x, cache=state)
    with pytest.raises(ValueError, match=r"state must be complex \(B, D, N/2\)"):
        mixer(x, cache=mixer.new_cache(B + 1))
    assert cache.state is not state
    cache.reset()
    assert not cache.state.any() and make("s4d").bfloat16().new_cache(B).state.dtype == torch.complex64
