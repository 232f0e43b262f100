"""Scaled dot-product attention, plainly: softmax(q kᵀ · scale) v.

Source: Vaswani et al. 2017 (1706.03762), section 3.2.1, equation 1; grouped key/value heads: Ainslie et al. 2023
(2305.13245). Symbols: B batch, H query heads, G key/value heads (H a multiple of G), N queries, M keys, D head width,
Dv width of the values.

Two engines (`ENGINES` is their table). "reference" forms the scores in float32 or better, under
autocast too, and can return the weights. "sdpa" is torch's fused scaled_dot_product_attention, which never forms them.
"auto" takes "reference" where the weights are asked for, for forward-mode derivatives and under the transforms of
torch.func (grad, vjp, jacrev, vmap, and so gradients for each sample), and "sdpa" for all else.
"""

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nondual.ops import masks
from nondual.ops.autocast import as_autocast_does, autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype, at_least_float32
from nondual.ops.impl import Engine, Limit, Preference, choose, has_tangent, refuses_transforms

Impl = Literal["auto", "reference", "sdpa"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    impl: Impl = "auto",
) -> Float[Tensor, "b h n dv"] | tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n m"]]:
    """Each query's weighted mean of the values, weighted by the softmax of its scores with the keys.

        out[i] = Σ_j a_ij v[j],   a_ij = exp(s_ij) / Σ_l exp(s_il),   s_ij = scale · q[i] · k[j] (+ mask[i, j])

    A query with nothing to attend to (every key masked, or no keys) gives 0 and passes back no gradient, never NaN;
    nn.MultiheadAttention gives NaN there. NaN or inf in a masked key or value is not held back: it can reach every
    row, as in torch, because 0 · NaN is NaN.

    Under autocast q, k, v and a floating mask are cast as torch casts them for its own attention, so that their dtypes
    may differ: to autocast's dtype, all but float64. ("reference" is then in float32 again, forward and backward; but
    torch.compile casts the products of any backward pass that it traces under autocast.)

    Args:
        q: queries (B, H, N, D), any floating dtype.
        k: keys (B, G, M, D), of the dtype and device of q. H must be a multiple of G.
        v: values (B, G, M, Dv); Dv may differ from D.
        mask: (N, M), or 4-dimensional and broadcastable to (B, H, N, M). Boolean: True where attending is allowed
            (nn.MultiheadAttention means the opposite). Floating, of q's dtype or float32: added to the scores; -inf
            forbids.
        causal: each query sees its own position and those before, aligned at the end where N != M. Combines with mask.
        scale: factor on q · k; 1/√D where left out.
        dropout: probability of dropping a weight, in [0, 1). For training.
        return_weights: also return the weights (before dropout).
        impl: "auto", "reference" or "sdpa".

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, weights (B, H, N, M)), the weights in q's dtype too.

    Raises:
        TypeError: q, k, v or mask is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit; an unknown engine; weights asked of "sdpa".
        RuntimeError: a forward-mode derivative asked of "sdpa".
    """
    check_tensors({"q": q, "k": k, "v": v}, {"mask": mask})
    q, k, v = as_autocast_does(q, k, v)
    check_qkv(q, k, v)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if mask is not None:
        if q.dtype != torch.float64:
            (mask,) = as_autocast_does(mask)
        check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q)
    engine = choose(impl, ENGINES, Inputs(q, k, v, mask, return_weights))
    n, m = q.shape[2], k.shape[2]
    if n == 1:  # a single query is the last one: it sees everything (`causal and n != 1` may be a SymBool)
        causal = False
    if causal and (mask is not None or n != m):  # what an engine calls causal is square and alone
        mask, causal = _both(mask, masks.causal(n, m, device=q.device)), False
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, weights = engine.run(q, k, v, mask, causal, scale, dropout)
    return (out, weights) if return_weights else out


def masked_softmax(
    scores: Float[Tensor, "... m"], mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None
) -> Float[Tensor, "... m"]:
    """Softmax over the last axis, among the allowed entries only; a row with none allowed is all 0, not NaN.

    Args:
        scores: (..., M), any floating dtype; exponentials and sums are in float32 or better.
        mask: broadcastable to scores. Boolean: True where allowed. Floating: added to the scores; -inf forbids.

    Returns:
        Weights (..., M) in the dtype of scores: non-negative, each row summing to 1 (or to 0 where nothing is allowed).

    Raises:
        TypeError: scores or mask is not a tensor.
        ValueError: scores are not floating point, or mask is neither boolean nor floating point.
    """
    check_tensors({"scores": scores}, {"mask": mask})
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            "mask must be boolean (True where allowed) or floating point (added to the scores), "
            f"got {mask.dtype}; convert it with mask.bool()"
        )
    wide = at_least_float32(scores)
    if mask is not None:
        wide = wide.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else wide + mask
    if wide.shape[-1] == 0:
        return wide.to(scores.dtype)
    highest = wide.detach().amax(-1, keepdim=True)
    exp = torch.exp(wide - highest.masked_fill(highest == -torch.inf, 0))
    total = exp.sum(-1, keepdim=True)
    return (exp / total.masked_fill(total == 0, 1)).to(scores.dtype)


# --8<-- [start:reference]
def _reference(q, k, v, mask, causal, scale, dropout):
    """The equation, line by line, in float32 or better."""
    wide = accumulation_dtype(q.dtype)
    share = q.shape[1] // k.shape[1] if k.shape[1] else 1  # query heads per key head
    k, v = (x.to(wide).repeat_interleave(share, dim=1) for x in (k, v))
    if causal:
        mask = masks.causal(q.shape[2], device=q.device)
    with autocast_off(q.device.type):  # it would multiply in half precision
        scores = scale * q.to(wide) @ rearrange(k, "b h m d -> b h d m")  # (B, H, N, M)
        weights = masked_softmax(scores, mask)
        out = F.dropout(weights, dropout) @ v  # (B, H, N, Dv)
    return out.to(q.dtype), weights.to(q.dtype)


# --8<-- [end:reference]


def _sdpa(q, k, v, mask, causal, scale, dropout):
    """torch's fused kernels: the same result, no weights."""
    if mask is not None and mask.is_floating_point() and (q.device.type != "cpu" or q.dtype == torch.float64):
        mask = mask.to(q.dtype)  # a float32 mask beside other queries is taken by torch's kernels for a CPU alone
    grouped = True if q.shape[1] != k.shape[1] else False  # with dynamic shapes `!=` alone gives a SymBool
    options = {"scale": scale, "enable_gqa": grouped}
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, **options), None
    # Two faults of cuDNN under torch 2.11, seen on an H100: its gradients are NaN where scale <= 0, and it gives a
    # forbidden key the score -65504, which wins where all the others lie below.
    if scale is not None and scale <= 0:
        q, options["scale"] = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, causal, **options), None
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, **options), None


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
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be 4-dimensional (B, heads, length, width), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with {name}.float()")
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"{name} must have q's dtype and device, {dtype} on {device}, got {x.dtype} on {x.device}")
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


def check_mask(mask: Tensor, shape: tuple[int, int, int, int], q: Tensor) -> None:
    """Refuse a mask that does not fit queries q and scores of this shape, (B, H, N, M).

    Raises:
        ValueError: a dtype, device or shape that does not fit.
    """
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(
            f"mask must be torch.bool (True where attending is allowed), or q's {q.dtype} or torch.float32 (added to "
            f"the scores), got {mask.dtype}; convert it with mask.bool()"
        )
    if mask.device != q.device:
        raise ValueError(f"mask must be on q's device {q.device}, got {mask.device}")
    fits = all(a in (1, b) for a, b in zip(mask.shape[-4:], shape[-mask.ndim :])) if mask.ndim in (2, 4) else False
    if not fits:
        raise ValueError(
            f"mask must be (N, M) = {shape[2:]} or broadcast to (B, H, N, M) = {shape}, got {tuple(mask.shape)}; "
            "a padding mask (B, M) becomes mask[:, None, None, :]"
        )


# --- engines, and what they refuse -----------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the choice of an engine depends on."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    return_weights: bool


def _forms_no_weights(given: Inputs) -> str | None:
    if given.return_weights:
        return "impl='sdpa' never forms the weights; with return_weights=True use impl='reference' or 'auto'"
    return None


def _no_forward_mode(given: Inputs) -> str | None:
    if has_tangent(*given[:4]):
        return "impl='sdpa' has no forward-mode derivative; use impl='reference' or 'auto'"
    return None


ENGINES = {
    "sdpa": Engine(
        _sdpa,
        "torch's fused scaled_dot_product_attention",
        limits=(
            Limit("without the weights", _forms_no_weights),
            Limit("no forward-mode derivative", _no_forward_mode, RuntimeError),
        ),
        auto=Preference("no transform of torch.func", lambda given: refuses_transforms(*given[:4]) is None),
    ),
    "reference": Engine(_reference, "the equation line by line, with weights in float32 or better"),
}
