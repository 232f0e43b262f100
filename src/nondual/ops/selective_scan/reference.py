"""The selective scan in plain torch: one step after another, slow, in any floating dtype, wherever torch runs.

Source: Gu and Dao 2023 (2312.00752), equations 1 (the continuous system), 2 (its recurrence) and 4 (zero-order hold),
and Algorithm 2. Symbols: B batch, L steps, D channels, N states of a channel, G groups of channels that share B and C;
h the state, Ā and B̄ what a step of length Δ makes of A and B.

    h(t)' = A h(t) + B u(t)          continuous (1)
    h_t = Ā_t h_{t-1} + B̄_t u_t      one step of length Δ_t (2)
    y_t = C_t h_t + D u_t
    Ā_t = exp(Δ_t A)                 zero-order hold (4): exact where u does not change within the step
    B̄_t = Δ_t B_t                    "zoh-euler", as in the code that was released with the paper
    B̄_t = (exp(Δ_t A) - 1) / A · B_t  "zoh", equation 4 to the end

Where we differ from the paper: x is u here, and D the skip, as in the released code. Differentiable by autograd, twice
too; memory grows with B·L·D·N in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.discretize import Discretization, discretize, step_length
from nondual.ops.dtypes import accumulation_dtype


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    reset: Tensor | None = None,
    discretization: Discretization = "zoh-euler",
) -> tuple[Tensor, Tensor]:
    """Every output and the last state; the input is taken as `nondual.ops.selective_scan` has checked it.

    Args:
        u: input (B, L, D).
        delta: step lengths (B, L, D), before bias and softplus.
        A: (D, N).
        B: (B, L, G, N), or (D, N) where it does not depend on time.
        C: likewise.
        D: skip (D,).
        z: gate (B, L, D), before its SiLU.
        delta_bias: (D,), added to delta.
        delta_softplus: take the softplus of delta then.
        state: the state before the first step (B, D, N); zero where left out.
        reset: (B, L), True where a sequence begins and the state before it is replaced by zero.
        discretization: "zoh-euler" or "zoh".

    Returns:
        y (B, L, D) in u's dtype, and the last state (B, D, N) in float32 (float64 for float64), in memory of its own.
    """
    dtype, wide = u.dtype, accumulation_dtype(u.dtype)
    u, delta, A, B, C = (x.to(wide) for x in (u, delta, A, B, C))
    D, z, delta_bias, state = (None if x is None else x.to(wide) for x in (D, z, delta_bias, state))
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1]) if state is None else state
    # unbind and not u[:, t]: the gradient of each slice would be a tensor of L steps, and L of them make L²
    per_step = zip(u.unbind(1), step_length(delta, delta_bias, delta_softplus).unbind(1), _at(B, u), _at(C, u))
    outputs = []
    # --8<-- [start:scan]
    for t, (u_t, delta_t, B_t, C_t) in enumerate(per_step):  # (B, D) twice, (B, D, N) twice
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None], 0)
        A_bar, B_bar = discretize(delta_t[..., None], A, B_t, discretization)  # (B, D, N)
        h = A_bar * h + B_bar * u_t[..., None]
        outputs.append((C_t * h).sum(-1))
    # --8<-- [end:scan]
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(u)
    h = h if outputs else h.clone()  # writing to the last state must not change the initial one
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y.to(dtype), h


def _at(x: Tensor, u: Tensor) -> list[Tensor]:
    """What B or C is at each step: (D, N), or (B, D, N), each group repeated for its channels."""
    if x.ndim == 2:
        return [x] * u.shape[1]
    share = u.shape[2] // x.shape[2]
    return [x_t.repeat_interleave(share, dim=1) for x_t in x.unbind(1)]
