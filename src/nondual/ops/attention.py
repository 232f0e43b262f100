"""Scaled dot-product attention, plainly: softmax(q kᵀ · scale) v.

Source: Vaswani et al. 2017 (1706.03762), section 3.2.1, equation 1; grouped key/value heads: Ainslie et al. 2023
(2305.13245). Symbols: B batch, H query heads, G key/value heads (H a multiple of G), N queries, M keys, D head width.

Two engines. "reference" forms the scores in float32 or better and can return the weights. "sdpa" is torch's fused
scaled_dot_product_attention, which never forms them. "auto" takes "sdpa" unless the weights are asked for.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops import masks
from nondual.ops.impl import choose


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    *,
    mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
    impl: str = "auto",
) -> Float[Tensor, "b h n dv"] | tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n m"]]:
    """Each query's weighted mean of the values, weighted by the softmax of its scores with the keys.

        out[i] = Σ_j a_ij v[j],   a_ij = exp(s_ij) / Σ_l exp(s_il),   s_ij = scale · q[i] · k[j] (+ mask[i, j])

    A query with nothing to attend to (every key masked, or no keys) gives 0 and passes back no gradient, never NaN;
    nn.MultiheadAttention gives NaN there. NaN or inf in a masked key or value is not held back: it can reach every
    row, as in torch, because 0 · NaN is NaN.

    Args:
        q: queries (B, H, N, D), any floating dtype.
        k: keys (B, G, M, D), of the dtype and device of q. H must be a multiple of G.
        v: values (B, G, M, Dv); Dv may differ from D.
        mask: (N, M), or 4-dimensional and broadcastable to (B, H, N, M). Boolean: True where attending is allowed
            (nn.MultiheadAttention means the opposite). Floating, of q's dtype: added to the scores; -inf forbids.
        causal: each query sees its own position and those before, aligned at the end where N != M. Combines with mask.
        scale: factor on q · k; 1/√D where left out.
        dropout: probability of dropping a weight, in [0, 1). For training.
        return_weights: also return the weights (before dropout).
        impl: "auto", "reference" or "sdpa".

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, weights (B, H, N, M)).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; an unknown engine; weights asked of "sdpa".
    """
    check_qkv(q, k, v)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if mask is not None:
        _check_mask(mask, (*q.shape[:3], k.shape[2]), q)
    if return_weights and impl == "sdpa":
        raise ValueError("impl='sdpa' never forms the weights; with return_weights=True use impl='reference' or 'auto'")
    engine = choose(impl, {"reference": _reference, "sdpa": _sdpa}, auto="reference" if return_weights else "sdpa")
    n, m = q.shape[-2], k.shape[-2]
    causal = causal and n != 1  # a single query is the last one: it sees everything
    if causal and (mask is not None or n != m):  # what an engine calls causal is square and alone
        mask, causal = _both(mask, masks.causal(n, m, device=q.device)), False
    out, weights = engine(q, k, v, mask, causal, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, dropout)
    return (out, weights) if return_weights else out


def masked_softmax(
    scores: Float[Tensor, "... m"], mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None
) -> Float[Tensor, "... m"]:
    """Softmax over the last axis, among the allowed entries only; a row with none allowed is all 0, not NaN.

    Args:
        scores: (..., M), any floating dtype.
        mask: broadcastable to scores. Boolean: True where allowed. Floating: added to the scores; -inf forbids.

    Returns:
        Weights (..., M): non-negative, each row summing to 1 (or to 0 where nothing is allowed).
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if scores.shape[-1] == 0:
        return scores
    highest = scores.detach().amax(-1, keepdim=True)
    exp = torch.exp(scores - highest.masked_fill(highest == -torch.inf, 0))
    total = exp.sum(-1, keepdim=True)
    return exp / total.masked_fill(total == 0, 1)


# --8<-- [start:reference]
def _reference(q, k, v, mask, causal, scale, dropout):
    """The equation, line by line, in float32 or better."""
    wide = torch.promote_types(q.dtype, torch.float32)
    share = q.shape[1] // k.shape[1] if k.shape[1] else 1  # query heads to each key head
    k, v = (x.to(wide).repeat_interleave(share, dim=1) for x in (k, v))
    if causal:
        mask = masks.causal(q.shape[-2], device=q.device)
    scores = scale * q.to(wide) @ rearrange(k, "b h m d -> b h d m")  # (B, H, N, M)
    weights = masked_softmax(scores, mask)
    out = F.dropout(weights, dropout) @ v  # (B, H, N, Dv)
    return out.to(q.dtype), weights.to(q.dtype)


# --8<-- [end:reference]


def _sdpa(q, k, v, mask, causal, scale, dropout):
    """torch's fused kernels: the same result, no weights."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped), None


def _both(mask: Tensor | None, allowed: Tensor) -> Tensor:
    """`mask`, and besides it only where `allowed`."""
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else torch.where(allowed, mask, -torch.inf)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k and v that do not fit together, once, at the door of an op: what was expected, what was got.

    Raises:
        ValueError: a rank, dtype, device, width, length, batch or number of heads that does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be 4-dimensional (B, heads, length, width), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with {name}.float()")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must have q's dtype and device, {q.dtype} on {q.device}, got {x.dtype} on {x.device}"
            )
    (b, h, _, d), (bk, g, _, dk) = q.shape, k.shape
    if dk != d:
        raise ValueError(f"k must have q's width D={d}, got {dk}")
    if d == 0:
        raise ValueError("q and k must have a width D of 1 or more, got 0")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, heads and length {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")
    if bk != b:
        raise ValueError(f"k and v must have q's batch B={b}, got {bk}")
    if h != g and (g == 0 or h % g):
        raise ValueError(f"q's heads must be a multiple of k's, got {h} and {g}")


def _check_mask(mask: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> None:
    if mask.dtype != torch.bool and mask.dtype != q.dtype:
        raise ValueError(
            f"mask must be torch.bool (True where attending is allowed) or q's {q.dtype} (added to the scores), "
            f"got {mask.dtype}; convert it with mask.bool()"
        )
    if mask.device != q.device:
        raise ValueError(f"mask must be on q's device {q.device}, got {mask.device}")
    fits = all(a in (1, b) for a, b in zip(mask.shape[-4:], shape[-mask.ndim :])) if mask.ndim in (2, 4) else False
    if not fits:
        raise ValueError(
            f"mask must be (N, M) = {shape[2:]} or broadcast to (B, H, N, M) = {shape}, got {tuple(mask.shape)}; "
            "a padding mask (B, M) becomes mask[:, None, None, :]"
        )
