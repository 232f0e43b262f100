"""What the mixers of linear attention share; their laws are in tests/test_mixers.py."""

import math

import pytest
import torch
from linear_mixer_cases import B, E, H, N, X, ended, made, qkv

from nondual.efficient_attention.linear_attention import (
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    LinearAttentionMixer,
    LinearMixer,
    Retention,
)
from nondual.language_models.causal import CausalLM
from nondual.transformer import MixerBlock

MIXERS = [LinearMixer, LinearAttentionMixer, Retention, GatedLinearAttention, DeltaNet, GatedDeltaNet]


def test_by_itself_it_is_the_sum():
    mixer = made(LinearMixer)
    q, k, v, z = qkv(mixer)
    torch.testing.assert_close(mixer(X), ended(mixer, (q @ k.mT).tril() @ v, z))


@pytest.mark.parametrize("kind", MIXERS)
def test_a_cache_is_of_one_size_and_generates_the_same_tokens(kind):
    torch.manual_seed(0)
    model = CausalLM(31, E, 2, layer=lambda i: MixerBlock(kind(E, H), E))
    with torch.no_grad():
        model.embeddings.weight.normal_()
    ids = torch.randint(31, (B, 5))
    assert torch.equal(model.generate(ids, 9), model.generate(ids, 9, cached=False))
    mixer = model.layers[0].mixer
    cache = mixer.new_cache(B)
    with torch.no_grad():
        sizes = [(mixer(X.float(), cache=cache), cache.conv.numel() + cache.state.numel())[1] for _ in range(3)]
    assert len(set(sizes)) == 1 and cache.length == 3 * N


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_steps_rows_and_resets_of_a_cache(kind):
    mixer = made(kind)
    cache, whole = mixer.new_cache(B), mixer(X)
    mixer(X[:, :-1], cache=cache)
    other = cache.select(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(mixer.step(X[:, -1], cache), whole[:, -1])
    torch.testing.assert_close(mixer.step(X[[1, 1, 0], -1], other), whole[[1, 1, 0], -1])
    cache.reset()
    torch.testing.assert_close(mixer(X, cache=cache), whole)
    assert mixer.bfloat16().new_cache(B).state.dtype == torch.float32


def test_sizes_that_do_not_fit():
    for kind in MIXERS:
        with pytest.raises(ValueError, match="d_model must be a multiple of n_heads, got 12 and 5; or give d_head"):
            kind(E, 5)
        with pytest.raises(ValueError, match="must be 1 or more"):
            kind(E, 3, d_value=0)
        with pytest.raises(ValueError, match="d_conv must be 0 or more, got -1"):
            kind(E, 3, d_conv=-1)
    for beta_max in (0.0, 2.1):
        with pytest.raises(ValueError, match=r"beta_max must be above 0 and at most 2, .*, got"):
            DeltaNet(E, H, beta_max=beta_max)
    with pytest.raises(ValueError, match="d_head must be even, for pairs"):
        Retention(E, 4)  # heads of three numbers cannot be turned in pairs


def test_inputs_that_do_not_fit():
    mixer = made(DeltaNet)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 12\), got \(2, 11, 5\)"):
        mixer(X[..., :5])
    with pytest.raises(ValueError, match="x must be floating point"):
        mixer(X.long())
    with pytest.raises(ValueError, match=r"cache.conv must be \(2, 3, 36\) .*; make one with new_cache\(2\)"):
        mixer(X, cache=mixer.new_cache(3))
    with pytest.raises(ValueError, match=r"x must be \(B, E\), one position"):
        mixer.step(X, mixer.new_cache(B))
    assert math.isfinite(float(mixer(X[:, :0]).detach().sum()))
