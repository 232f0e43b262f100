"""Retention by its parallel form."""

import torch
from linear_mixer_cases import D, H, N, X, ended, made, qkv

from nondual.efficient_attention.linear_attention import Retention
from nondual.relative_positions import Rotary


def test_retention_by_its_parallel_form():
    mixer = made(Retention)
    q, k, v, z = qkv(mixer)
    q, k = Rotary(D).turn(q), Rotary(D).turn(k)
    gamma = torch.tensor([1 - 2 ** -(5.0 + h) for h in range(H)], dtype=torch.float64)
    apart = torch.arange(N)[:, None] - torch.arange(N)
    decay = torch.where(apart >= 0, gamma[:, None, None] ** apart, 0.0)
    torch.testing.assert_close(mixer(X), ended(mixer, (q @ k.mT * decay / D**0.5) @ v, z), atol=1e-6, rtol=1e-6)
