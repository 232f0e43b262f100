"""Gated linear attention: its decays by their formula."""

import torch
from linear_mixer_cases import D, H, X, ended, made, qkv

from nondual.efficient_attention.linear_attention import GatedLinearAttention
from nondual.ops.linear_attention import linear_attention


def test_the_decays_of_gla():
    mixer = made(GatedLinearAttention)
    q, k, v, z = qkv(mixer)
    alpha = mixer.decay_proj(X).sigmoid() ** (1 / 16)
    out, _ = linear_attention(q, k, v, log_decay=alpha.log().unflatten(-1, (H, D)).transpose(1, 2), scale=D**-0.5)
    torch.testing.assert_close(mixer(X), ended(mixer, out, z))
