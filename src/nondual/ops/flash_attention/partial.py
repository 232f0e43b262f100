"""Attention of some queries to a part of their keys, and how the parts become the whole, forward and backward.

This is for keys that do not all lie on one device (`nondual.parallel.ring`), or do not come all at once.

    whole = nothing(q, v)
    for k_j, v_j in parts:
        add_(whole, engine.forward(q, k_j, v_j, causal, scale), engine.unit)

The softmax over all keys is the sum of those over the parts, each weighted by its share of the exponentials, exp of its
log-sum-exp less the whole's. And each part's gradient needs nothing of the others but the whole's output and
log-sum-exp, since its weights are exp(S - lse): flash attention's own backward pass, handed those of the whole.

Source: Dao 2023 (2307.08691), section 3.1 and Algorithm 2; over devices: Liu et al. 2023 (2310.01889), section 3.

Symbols: B batch, H query heads, G key/value heads, N queries, M keys of a part, D and Dv head widths. A log-sum-exp is
kept as two numbers, top + total: for a score of 1e4 their sum in float32 is off by up to a thousandth, and a weight
made from it would be too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.flash_attention import ENGINES, Impl, Inputs, reference
from nondual.ops.impl import choose

TILE = (128, 128)  # queries and keys in a tile of "reference"


class Partial(NamedTuple):
    """The result over some keys, all of it in float32 or wider. Rows that see none of them have 0 and a top of -inf.

    Attributes:
        out: the weighted mean of the values, (B, H, N, Dv).
        top: (B, H, N).
        total: (B, H, N); the log-sum-exp is unit · (top + total), with the unit of the engine.
    """

    out: Float[Tensor, "b h n dv"]
    top: Float[Tensor, "b h n"]
    total: Float[Tensor, "b h n"]

    def rows(self, which: slice) -> "Partial":
        """The result of some queries: views."""
        return Partial(*(x[:, :, which] for x in self))


class PartialEngine(NamedTuple):
    """How parts are computed. q, k and v are of one dtype and device, and fit together.

    Attributes:
        forward: q, k, v, causal (aligned at the end) and scale to the Partial of these keys.
        backward: d_out, q, k, v, the whole's Partial, causal and scale to what these keys add to dq, and their own dk
            and dv, in float32 or wider.
        unit: 1 where its logarithms are natural, log 2 where they are to the base 2.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], Partial]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Partial, bool, float], tuple[Tensor, Tensor, Tensor]]
    unit: float


def engine_of(impl: Impl, q: Tensor, k: Tensor, v: Tensor) -> PartialEngine:
    """The engine that `nondual.ops.flash_attention` takes for these tensors where the log-sum-exp is asked for.

    Raises:
        ValueError: an unknown engine, "sdpa", or one that cannot hold these tensors.
        RuntimeError: "triton" where triton is missing; an engine by name under a transform of torch.func.
    """
    given = Inputs(q, k, v, True, None, 1.0, True, None)
    chosen = choose(impl, ENGINES, given, otherwise=ENGINES["reference"])
    return _TRITON if chosen is ENGINES["triton"] else _REFERENCE


# --- joining -------------------------------------------------------------------------------------------------------


def nothing(q: Float[Tensor, "b h n d"], v: Float[Tensor, "b g m dv"]) -> Partial:
    """The result over no keys."""
    wide = accumulation_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=wide, device=q.device)
    top, total = (torch.full(q.shape[:3], start, dtype=wide, device=q.device) for start in (-torch.inf, 0.0))
    return Partial(out, top, total)


# --8<-- [start:add]
def add_(whole: Partial, part: Partial, unit: float) -> None:
    """Add a part over other keys to the whole, in place.

    Args:
        whole: of the keys so far.
        part: of as many rows.
        unit: that of the engine from which both are.
    """
    top = torch.maximum(whole.top, part.top)
    shift = top.masked_fill(top == -torch.inf, 0)  # a row without a key so far: exp(-inf - 0) = 0, not NaN
    before, new = (torch.exp(unit * (x.top - shift + x.total)) for x in (whole, part))
    both = (before + new).masked_fill(top == -torch.inf, 1)
    whole.out.mul_((before / both)[..., None]).addcmul_((new / both)[..., None], part.out)
    whole.top.copy_(top)
    whole.total.copy_(torch.log(both) / unit)


# --8<-- [end:add]


# --- the engines ---------------------------------------------------------------------------------------------------


def _visible(q: Tensor, k: Tensor, causal: bool) -> reference.Visible:
    return reference.Visible(q.shape[2], k.shape[2], causal, None, q.device)


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    q, k, v = (x.to(accumulation_dtype(x.dtype)) for x in (q, k, v))
    with autocast_off(q.device.type):  # it would multiply in half precision
        return Partial(*reference.forward(q, k, v, _visible(q, k, causal), scale, TILE))


def _reference_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Partial, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.to(accumulation_dtype(x.dtype)) for x in (q, k, v))
    zero = torch.zeros_like(whole.top)
    with autocast_off(q.device.type):
        return reference.backward(d_out, zero, q, k, v, *whole, _visible(q, k, causal), scale, TILE)[:3]


def _triton_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Partial:
    from nondual.ops.flash_attention.triton import launch_forward

    sign, scale = _positive(scale)
    return Partial(*launch_forward(q * sign if sign != 1 else q, k, v, causal, 0, scale, dtype=torch.float32))


def _triton_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Partial, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from nondual.ops.flash_attention.triton import launch_backward

    sign, scale = _positive(scale)
    out, top, total = whole.out, whole.top.contiguous(), whole.total.contiguous()
    zero = torch.zeros_like(top)
    q = q * sign if sign != 1 else q
    dq, dk, dv, _ = launch_backward(d_out, zero, q, k, v, out, top, total, causal, 0, scale, dtype=torch.float32)
    return dq * sign if sign != 1 else dq, dk, dv


def _positive(scale: float) -> tuple[int, float]:
    """What q is multiplied by, and the scale then: the kernels take a row's highest score before they scale it."""
    return (1, scale) if scale > 0 else (-1, -scale) if scale < 0 else (0, 1.0)


_REFERENCE = PartialEngine(_reference_forward, _reference_backward, 1.0)
_TRITON = PartialEngine(_triton_forward, _triton_backward, math.log(2))
