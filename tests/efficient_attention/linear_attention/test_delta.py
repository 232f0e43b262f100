"""The delta rule as a mixer, by its matrices step by step."""

import pytest
import torch
import torch.nn.functional as F
from linear_mixer_cases import B, D, E, H, N, X, ended, made, qkv

from nondual.efficient_attention.linear_attention import DeltaNet, GatedDeltaNet


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize("beta_max", [1.0, 2.0])
def test_the_delta_rule_step_by_step(kind, beta_max):
    mixer = made(kind, beta_max=beta_max)
    q, k, v, z = qkv(mixer)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    beta = beta_max * mixer.beta_proj(X).sigmoid()
    alpha = torch.ones_like(beta)
    if kind is GatedDeltaNet:
        alpha = (-mixer.A_log.exp() * F.softplus(mixer.step_proj(X) + mixer.dt_bias)).exp()
    S, outputs = torch.zeros(B, H, D, D, dtype=torch.float64), []
    for t in range(N):
        b, k_t = beta[:, t, :, None, None], k[:, :, t]
        along = torch.eye(D, dtype=torch.float64) - b * k_t[..., :, None] * k_t[..., None, :]  # I - β k kᵀ
        S = along @ (alpha[:, t, :, None, None] * S) + b * k_t[..., :, None] * v[:, :, t, None]
        outputs.append((q[:, :, t, None] @ S)[:, :, 0] / D**0.5)
    torch.testing.assert_close(mixer(X), ended(mixer, torch.stack(outputs, 2), z))


def test_keys_of_length_0_have_a_gradient():
    mixer = made(DeltaNet)
    x = torch.zeros(1, 3, E, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x).sum(), x)
    assert gradient.isfinite().all()
