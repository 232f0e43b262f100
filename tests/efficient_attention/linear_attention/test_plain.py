"""Linear attention with a feature map and a normaliser, by softmax's formula with another weight."""

import torch
import torch.nn.functional as F
from linear_mixer_cases import D, X, ended, made, qkv

from nondual.efficient_attention.feature_maps import Taylor, elu_plus_one
from nondual.efficient_attention.linear_attention import LinearAttentionMixer


def test_the_plain_one_by_softmaxs_formula_with_another_weight():
    mixer = made(LinearAttentionMixer)
    q, k, v, z = qkv(mixer)
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    torch.testing.assert_close(mixer(X), ended(mixer, weights / weights.sum(-1, keepdim=True) @ v, z))
    assert mixer.d_features == D and made(LinearAttentionMixer, feature_map=Taylor()).d_features == 1 + D + D**2


def test_elu_plus_one_is_what_the_plain_one_takes():
    assert made(LinearAttentionMixer).feature_map is elu_plus_one
