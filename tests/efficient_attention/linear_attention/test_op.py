"""Linear attention as the op of MultiHeadAttention: what it computes there, and what it refuses."""

import pytest
import torch

from nondual.efficient_attention.feature_maps import PositiveRandomFeatures, Taylor, elu_plus_one
from nondual.efficient_attention.linear_attention import LinearAttention
from nondual.ops import masks
from nondual.self_attention import MultiHeadAttention

X = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def module(*args, causal=False, **options):
    torch.manual_seed(0)
    return MultiHeadAttention(12, 4, n_kv_heads=2, causal=causal, op=LinearAttention(*args, **options)).double()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("φ", [elu_plus_one, Taylor(), PositiveRandomFeatures(3, 5)])
def test_weights_by_the_formula(φ, causal):
    mha = module(φ, causal=causal)
    out, weights = mha(X, return_weights=True)
    q = φ(mha.q_proj(X).unflatten(-1, (4, 3)).transpose(1, 2))
    k = φ(mha.k_proj(X).unflatten(-1, (2, 3)).transpose(1, 2)).repeat_interleave(2, 1)
    v = mha.v_proj(X).unflatten(-1, (2, 3)).transpose(1, 2).repeat_interleave(2, 1)
    expected = (q @ k.mT).tril() if causal else q @ k.mT
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, mha.out_proj((expected @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(out, mha(X))


def test_padded_keys_are_not_read():
    mha, mask = module(), masks.padding(torch.tensor([5, 9]), 9)
    out = mha(X, mask=mask)
    torch.testing.assert_close(out[:1], mha(X[:1], X[:1, :5]))
    torch.testing.assert_close(out[1:], mha(X[1:]))
    _, weights = mha(X, mask=mask, return_weights=True)
    assert not weights[0, ..., 5:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_in_half_precision_and_across_to_a_memory():
    mha = module().bfloat16()
    assert mha(X.bfloat16(), X[:, :4].bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module().float()(X.float())


def test_features_with_weights_are_saved_and_moved():
    mha = module(PositiveRandomFeatures(3, 5))
    assert "op.feature_map.rows" in mha.state_dict()
    assert mha.to("meta").op.feature_map.rows.is_meta


def test_what_it_refuses():
    mha = module(causal=True)
    with pytest.raises(ValueError, match="causal linear attention, got 1 and 3; to go on from a cache use LinearAtt"):
        cache = mha.new_cache(2, 9)
        with torch.no_grad():
            mha(X[:, :2], cache=cache)
            mha(X[:, 2:3], cache=cache)
    with pytest.raises(ValueError, match=r"mask must be boolean \(B, 1, 1, M\) with M = 9 for linear attention"):
        mha(X, mask=masks.causal(9))
    with pytest.raises(ValueError, match="for sequences packed along N, and for a cache, use LinearAttentionMixer"):
        mha(X, reset=torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="dropout must be 0 for linear attention"):
        MultiHeadAttention(12, 4, dropout=0.1, op=LinearAttention()).double()(X)
    with pytest.raises(TypeError, match="k must be a Tensor"):
        LinearAttention()(X, None, X)
