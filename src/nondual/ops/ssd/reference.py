"""State space duality in plain torch, one step after another: slow, in any floating dtype, wherever torch runs.

Source: Dao and Gu 2024 (2405.21060), section 3 (the recurrence and its semiseparable matrix), with the discretisation
of the released code, Δ B for the input. Symbols: B batch, L steps, H heads, P a head's channels, N states of a channel,
G groups of heads that share B and C; h the state (P, N) of a head.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ
    y_t = h_t C_t + D x_t

Where we differ from the paper: A is the continuous rate, one number for each head, and Δ the length of the step; the
paper's A_t is our exp(Δ_t A), its X our Δ x. Differentiable by autograd, twice too; memory grows with B·L·H·P·N in the
backward.
"""

from typing import TypeVarTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.discretize import step_length
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.ssd.inputs import Inputs

Given = TypeVarTuple("Given")  # each of them Tensor, or Tensor | None


def ssd(given: Inputs) -> tuple[Tensor, Tensor]:
    """Every output and the last state.

    Args:
        given: what `nondual.ops.ssd.ssd` has checked; its chunk means nothing here.

    Returns:
        y (B, L, H, P) in x's dtype, and the last state (B, H, P, N) in float32 or better, in memory of its own.
    """
    x, delta, A, B, C, D, z, delta_bias, delta_softplus, state, reset, _ = given
    dtype, (x, delta, A, B, C, D, z, delta_bias, state) = x.dtype, wide(x, delta, A, B, C, D, z, delta_bias, state)
    delta = step_length(delta, delta_bias, delta_softplus)
    share = x.shape[2] // B.shape[2]
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if state is None else state
    outputs = []
    # unbind, not x[:, t]: the gradient of a slice is as long as what it was cut from, and L of them make L²
    # --8<-- [start:recurrence]
    for t, (x_t, delta_t, B_t, C_t) in enumerate(zip(*(v.unbind(1) for v in (x, delta, B, C)))):
        B_t, C_t = (v.repeat_interleave(share, dim=1)[:, :, None] for v in (B_t, C_t))  # (B, H, 1, N)
        if reset is not None:
            h = h.masked_fill(reset[:, t, None, None, None], 0)
        h = torch.exp(delta_t * A)[..., None, None] * h + (delta_t[..., None] * x_t)[..., None] * B_t
        outputs.append((h * C_t).sum(-1))
    # --8<-- [end:recurrence]
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    h = h if outputs else h.clone()  # a caller may write to the last state, and must not so change the first
    return skip_and_gate(y, x, D, z).to(dtype), h


def wide(x: Tensor, *rest: *Given) -> tuple[Tensor, *Given]:
    """All of them in float32, or in float64 where x is, as states and sums are."""
    dtype = accumulation_dtype(x.dtype)
    given = cast("tuple[Tensor | None, ...]", (x, *rest))
    return cast("tuple[Tensor, *Given]", tuple(None if v is None else v.to(dtype) for v in given))


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z), each where it is given."""
    if D is not None:
        y = y + (D if D.ndim == 2 else D[:, None]) * x
    return y if z is None else y * F.silu(z)
