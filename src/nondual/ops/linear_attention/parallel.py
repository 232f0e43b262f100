"""Linear attention by its matrix: out = (Q Kᵀ ∘ decay) V, with N x N weights, as softmax attention has them.

Source: Sun et al. 2023 (2307.08621), equation 5, for the parallel form; Yang et al. 2024 (2406.06484), section 3.3, for
that of the delta rule, which needs a triangular system to be solved. Symbols as in `nondual.ops.linear_attention`; t is
the step that reads, s an earlier one that was written.

The delta rule writes u_t in place of v_t, and u_t depends on all that was written before:

    u_t = β_t (v_t - Σ_{s<t} decay(s, t) (k_t · k_s) u_s)     so that     (I + strictly lower(β K Kᵀ ∘ decay)) U = β V

It is plain rather than quick: time and memory grow with N² (with N² D where each channel decays). Differentiable by
autograd, twice too, and in forward mode.
"""

import torch
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.linear_attention.inputs import Inputs
from nondual.ops.linear_attention.resets import within_resets


def linear_attention(given: Inputs) -> tuple[Tensor, Tensor]:
    """Every output and the last state, from the arguments of the engine "reference"."""
    with autocast_off(given.q.device.type):
        out, S = within_resets(_linear_attention, given.in_full())
    return out.to(given.q.dtype), S


def _linear_attention(given: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, beta, S = given.q, given.k, given.v, given.beta, given.first_state()
    if not given.causal:
        S = S + k.mT @ v
        return q @ S, S
    decay, from_start, to_end, whole = _decays(given)
    # --8<-- [start:parallel]
    u = v
    if beta is not None:  # what is written of v: the difference from what the keys before and the first state read
        u = solve(k, beta, decay, beta[..., None] * (v - (from_start * k) @ S))
    out = weights(q, k, decay) @ u + (from_start * q) @ S
    S = whole * S + (to_end * k).mT @ u
    # --8<-- [end:parallel]
    return out, S


def weights(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """(q_t · k_s) decay(s, t), (B, H, N, N), from a decay (…, N, N) or, of each channel, (…, N, N, D)."""
    if decay.ndim == 5:
        return torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, decay)
    return (q @ k.mT) * decay


def solve(k: Tensor, beta: Tensor, decay: Tensor, right: Tensor) -> Tensor:
    """U of (I + strictly lower(β K Kᵀ ∘ decay)) U = right."""
    lower = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)


def _decays(given: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How much is left of what was written, 0 where it is later or in another sequence.

    Returns:
        at step t of a write in step s (…, N, N), or (…, N, N, D) where each channel decays; at each step of the first
        state (…, N, 1 or D); at the end of each step's write (…, N, 1 or D), and of the first state (…, 1 or D, 1).
    """
    n, device, dtype = given.q.shape[2], given.q.device, given.q.dtype
    visible = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    first = torch.ones(n, dtype=torch.bool, device=device)  # the steps that the first state reaches
    if given.reset is not None:
        sequence = given.reset.cumsum(1)
        visible = (visible & (sequence[:, :, None] == sequence[:, None]))[:, None]  # (B, 1, N, N)
        first = (sequence == 0)[:, None]  # (B, 1, N)
    steps = given.steps()
    if steps is None:
        steps = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device)
    steps = steps.expand(-1, -1, n, -1)
    # Σ over s < r <= t, summed anew for each s: the plainest way, without differences of large sums
    later = torch.ones(n, n, dtype=torch.bool, device=device).tril(-1)[..., None]
    log = steps[:, :, :, None].masked_fill(~later, 0).cumsum(2)  # (…, N, N, 1 or D)
    decay = log.masked_fill(~visible[..., None], -torch.inf).exp().to(dtype)
    from_start = steps.cumsum(2).masked_fill(~first[..., None], -torch.inf).exp().to(dtype)
    whole = from_start[:, :, -1, :, None]
    each_channel = given.log_decay is not None and given.log_decay.ndim == 4
    return decay if each_channel else decay.squeeze(-1), from_start, decay[:, :, -1], whole
