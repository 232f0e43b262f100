"""The matrix that a selective scan never writes down: y = M u, lower triangular, one for each channel.

Source: unrolling Gu and Dao 2023 (2312.00752), equation 2; read as attention by Ali, Zimerman and Wolf 2024
(2403.01590); with one A for all states of a head, the semiseparable matrix of Dao and Gu 2024 (2405.21060), section 3.
Symbols: B batch, L steps (t later, s earlier), D channels, N states.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.discretize import step_length
from nondual.ops.dtypes import accumulation_dtype


# --8<-- [start:matrix]
def selective_scan_matrix(
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "..."],
    C: Float[Tensor, "..."],
    D: Float[Tensor, " d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool = False,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
) -> Float[Tensor, "b d l l"]:
    """The matrix M with `selective_scan(u, …)[0][:, t, d] = Σ_s M[:, d, t, s] u[:, s, d]`, from a state of zero.

        M[t, s] = C_t · exp(A (Δ_{s+1} + … + Δ_t)) Δ_s B_s   where s ≤ t,   0 above the diagonal

    Read as linear attention, C_t is the query, B_s the key and Δ_s u_s the value; the exponential is a mask that decays
    with the time between s and t. The matrix is for study: it takes B·D·L² numbers, the scan's state B·D·N.

    Args:
        delta: step lengths (B, L, D), before bias and softplus.
        A: (D, N).
        B: (B, L, N), (B, L, G, N) or (D, N), as in `selective_scan`.
        C: likewise.
        D: skip (D,), added to the diagonal.
        delta_bias: (D,).
        delta_softplus: take the softplus of delta (+ delta_bias).
        reset: (B, L), True where a sequence begins: M is 0 where t lies in a later sequence than s.

    Returns:
        M (B, D, L, L), in float32 or better, under autocast too: rows are outputs t, columns inputs s.

    Raises:
        TypeError: what is not a tensor.
    """
    check_tensors({"delta": delta, "A": A, "B": B, "C": C}, {"D": D, "delta_bias": delta_bias, "reset": reset})
    wide = accumulation_dtype(delta.dtype)
    A, B, C = (x.to(wide) for x in (A, B, C))
    delta = step_length(delta.to(wide), delta_bias, delta_softplus)
    length = delta.shape[1]
    time = delta.cumsum(1)  # the time at which each step ends
    between = time[:, :, None] - time[:, None]  # (B, t, s, D): Δ_{s+1} + … + Δ_t
    mask = torch.ones(length, length, dtype=torch.bool, device=delta.device).tril()
    if reset is not None:
        sequence = reset.cumsum(1)
        mask = mask & (sequence[:, :, None] == sequence[:, None])
    mask = mask.expand(delta.shape[0], -1, -1)[..., None, None]
    decay = torch.exp((between[..., None] * A).masked_fill(~mask, -torch.inf))  # (B, t, s, D, N)
    B, C = (_for_each_channel(x, delta) for x in (B, C))
    with autocast_off(delta.device.type):  # it would multiply in half precision
        M = torch.einsum("btdn,btsdn,bsdn,bsd->bdts", C, decay, B, delta)
    return M if D is None else M + torch.diag_embed(D[:, None].expand(-1, length))


# --8<-- [end:matrix]


def _for_each_channel(x: Tensor, like: Tensor) -> Tensor:
    """B or C as (B, L, D, N), repeated for the steps or channels that share it."""
    if x.ndim == 2:
        return x.expand(*like.shape[:2], -1, -1)
    x = x.unsqueeze(2) if x.ndim == 3 else x
    return x.repeat_interleave(like.shape[2] // x.shape[2], dim=2)
