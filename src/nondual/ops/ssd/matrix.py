"""The semiseparable matrix that state space duality multiplies by without writing it down: y = M x, one for each head.

Source: Dao and Gu 2024 (2405.21060), section 3, definition 3.2 and equation 3, and section 5 (the same as masked
attention). Symbols: B batch, L steps (t later, s earlier), H heads, N states, G groups of heads that share B and C.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.discretize import step_length
from nondual.ops.dtypes import accumulation_dtype


# --8<-- [start:matrix]
def ssd_matrix(
    delta: Float[Tensor, "b l h"],
    A: Float[Tensor, " h"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, " h"] | None = None,
    delta_bias: Float[Tensor, " h"] | None = None,
    delta_softplus: bool = False,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b h l l"]:
    """The matrix M with `ssd(x, …)[0][:, t, h] = Σ_s M[:, h, t, s] x[:, s, h]`, from a state of zero.

        M[t, s] = (C_t · B_s) exp(A (Δ_{s+1} + … + Δ_t)) Δ_s   where s ≤ t,   0 above the diagonal

    C_t is the query and B_s the key of a linear attention; the exponential takes the place of the causal mask of ones.
    Any block of M below its diagonal has rank N or less.

    Args:
        delta: step lengths (B, L, H), before bias and softplus.
        A: (H,).
        B: (B, L, G, N), or (B, L, N).
        C: likewise.
        D: skip (H,), added to the diagonal.
        delta_bias: (H,).
        delta_softplus: take the softplus of delta (+ delta_bias).
        reset: (B, L), True where a sequence begins: what came before has no weight from there on.

    Returns:
        M (B, H, L, L), in float32 or better, under autocast too: rows are outputs t, columns inputs s.

    Raises:
        TypeError: what is not a tensor.
    """
    check_tensors({"delta": delta, "A": A, "B": B, "C": C}, {"D": D, "delta_bias": delta_bias, "reset": reset})
    wide = accumulation_dtype(delta.dtype)
    heads, length = delta.shape[2], delta.shape[1]
    B, C = (v.to(wide) if v.ndim == 4 else v.to(wide).unsqueeze(2) for v in (B, C))
    B, C = (v.repeat_interleave(heads // v.shape[2], dim=2) for v in (B, C))
    delta = step_length(delta.to(wide), delta_bias, delta_softplus).mT  # (B, H, L)
    steps = delta * A.to(wide)[:, None]
    visible = torch.ones(length, length, dtype=torch.bool, device=delta.device).tril()
    # Σ over s < r ≤ t, summed anew for each s: the plainest way, without differences of large sums
    between = steps[..., None].expand(-1, -1, -1, length).masked_fill(~visible.tril(-1), 0).cumsum(-2)
    if reset is not None:
        sequence = reset.cumsum(1)
        visible = (visible & (sequence[:, :, None] == sequence[:, None]))[:, None]
    decay = between.masked_fill(~visible, -torch.inf).exp()
    with autocast_off(delta.device.type):  # it would multiply in half precision
        M = torch.einsum("bthn,bshn->bhts", C, B) * decay * delta[:, :, None]
    return M if D is None else M + torch.diag_embed(D.to(wide)[:, None].expand(-1, length))


# --8<-- [end:matrix]
