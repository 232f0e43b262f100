"""Flash attention: softmax(q kᵀ · scale) v exactly, without ever holding the N x M scores.

Source: Dao et al. 2022 (2205.14135); Dao 2023 (2307.08691); splitting the keys in decoding: Dao et al. 2023
("Flash-Decoding"); forget gates: Lin et al. 2025, "Forgetting Transformer" (2503.02130), section 3. Symbols: B batch, H
query heads, G key/value heads (H a multiple of G), N queries, M keys, D head width.

Three engines (`ENGINES` is their table):

- "reference": the algorithm as the papers write it, tile by tile in plain torch, forward and backward. Any floating
  dtype.
- "sdpa": torch's scaled_dot_product_attention. For a window, and where causal and N != M, torch is handed one tile of
  queries at a time, with the keys in its reach: `nondual.ops.flash_attention.tiles`. Any floating dtype.
- "triton": our kernels, in float16, bfloat16 and float32, for heads up to 256 wide. On CUDA tensors; on CPU tensors
  only in Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported), slowly, and not in bfloat16.

All three take memory linear in N and M. (In a program exported by torch.export or to ONNX, "sdpa" is handed a whole
mask (N, M) instead, since a loop over tiles would fix the length.)

"auto" takes "triton" for CUDA tensors that it can hold, where triton is installed, and "sdpa" for all others; with
return_lse=True or forget gates it takes "reference" where it would take "sdpa", which does not return the one nor know
the other. For forward-mode derivatives and under the transforms of torch.func (grad, vjp, jacrev, vmap, and so
gradients for each sample), which these engines refuse, it forms the weights in plain torch, and then memory grows with
N · M.
"""

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nondual.ops import masks
from nondual.ops.attention import attention, check_qkv, masked_softmax
from nondual.ops.autocast import as_autocast_does, autocast_off
from nondual.ops.checks import check_shapes, check_tensors
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.flash_attention import reference
from nondual.ops.flash_attention.forget import Forget, between, sums_of
from nondual.ops.flash_attention.tiles import attention_by_tiles
from nondual.ops.impl import (
    KERNEL_DTYPES,
    Engine,
    Limit,
    Preference,
    choose,
    has_tangent,
    needs_triton,
    refuses_transforms,
    runs_kernels,
    takes_dtypes,
)

WIDEST = 256  # the widest head that the kernels hold on the chip

Impl = Literal["auto", "reference", "sdpa", "triton"]


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    log_forget: Tensor | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    log_forget: Tensor | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    log_forget: Tensor | None = None,
    return_lse: bool,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    log_forget: Float[Tensor, "b h m"] | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n dv"] | tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Each query's weighted mean of the values, as `nondual.ops.attention.attention` gives it, in memory linear in N.

        out[i] = Σ_j exp(s_ij - lse_i) v[j],   lse_i = log Σ_j exp(s_ij),   s_ij = scale · q[i] · k[j]

        causal, N=3, M=5     window=2, N=3, M=5
        1 1 1 0 0            0 1 1 0 0
        1 1 1 1 0            0 0 1 1 0
        1 1 1 1 1            0 0 0 1 1

    With log_forget a score is lowered by what was forgotten since the key: s_ij + Σ_{l = j+1 … i} log_forget_l, where i
    is the query's place among the keys. A gate of 0 (-inf) forgets all before it, without a NaN in output or gradient.
    The sums keep their digits however long the sequence is: `nondual.ops.flash_attention.forget`.
    The gradient of a gate is a sum over all later positions whose terms cancel: it is known to the last places of its
    terms, which is rounding alone where the gate lets almost nothing pass.

    A query with nothing to attend to gives 0 with lse = -inf, and passes back no gradient. NaN or inf in a key or value
    that is masked is not held back: it can reach other rows, as in torch; what lies in a tile never visited cannot.
    Under autocast q, k and v are cast as torch casts those of its own attention.

    Args:
        q: queries (B, H, N, D), any floating dtype that the engine knows, in any layout.
        k: keys (B, G, M, D), of the dtype and device of q. H must be a multiple of G.
        v: values (B, G, M, Dv); Dv may differ from D.
        causal: each query sees its own position and those before, aligned at the end where N != M (torch's is_causal
            aligns at the start).
        window: each query sees the last `window` keys, its own included: the mask `masks.sliding_window`. It looks back
            only: with a window, attention is causal whether `causal` is True or not.
        scale: factor on q · k; 1/√D where left out.
        log_forget: natural logarithms of the forget gates (B, H, M), one for each query head and position of a key, 0
            or less, of any floating dtype; summed in float64. Below -1e6 a gate counts as 0. Needs causal or a window.
        return_lse: also return the log-sum-exp of each row, which joins two results over different keys into one. It
            is differentiable too.
        impl: "auto", "reference", "sdpa" or "triton".

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, lse (B, H, N)). lse is natural, in float32 (float64 for float64).

    Raises:
        TypeError: q, k, v or log_forget is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit, or that the engine asked for does not hold; an unknown
            engine; a window below 1; lse or forget gates asked of "sdpa"; forget gates without causality.
        RuntimeError: "triton" asked for where triton is missing. A second derivative through any engine. A forward-mode
            derivative or a transform of torch.func asked of an engine by name: "auto" has them.
    """
    check_tensors({"q": q, "k": k, "v": v}, {"log_forget": log_forget})
    q, k, v = as_autocast_does(q, k, v)
    check_qkv(q, k, v)
    n, m = q.shape[2], k.shape[2]
    if v.shape[-1] == 0:
        raise ValueError("v must have a width of 1 or more, got 0")
    check_window(window)
    causal = causal or window is not None
    if log_forget is not None:
        check_gates(log_forget, (q.shape[0], q.shape[1], m), q, causal)
    if window is not None and not torch.compiler.is_exporting() and window >= m:  # it reaches past the first key
        window = None  # exported, one program serves lengths on either side
    if n == 1 and window is None and log_forget is None:  # the last query sees every key
        causal = False
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    given = Inputs(q, k, v, causal, window, scale, return_lse, log_forget)
    out, lse = choose(impl, ENGINES, given, otherwise=_WEIGHTS).run(given)
    return (out, lse) if return_lse else out


class Inputs(NamedTuple):
    """What passed the door, as the engines take it: q, k and v fit together."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, G, M, D)
    v: Tensor  # (B, G, M, Dv)
    causal: bool  # True wherever there is a window
    window: int | None  # shorter than M, unless a program is exported
    scale: float
    return_lse: bool
    log_forget: Tensor | None  # (B, H, M), only with causal


def check_window(window: object) -> None:
    """Refuse what is neither None nor a number of keys."""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be an integer of 1 or more (the query's own key counts) or None, got {window!r}")


def check_gates(log_forget: Tensor, shape: tuple[int, int, int], q: Tensor, causal: bool) -> None:
    """Refuse forget gates that do not fit queries q.

    Raises:
        ValueError: no causality, or a dtype, device or shape that does not fit.
    """
    if not causal:
        raise ValueError("causal must be True, or a window given, with log_forget: gates fade what came before a query")
    if not log_forget.is_floating_point():
        raise ValueError(f"log_forget must be floating point, got {log_forget.dtype}")
    if log_forget.device != q.device:
        raise ValueError(f"log_forget must be on q's device {q.device}, got {log_forget.device}")
    check_shapes({"log_forget": (log_forget, shape, "(B, H, M), with q's heads and k's length,")})


# --- engines: each gives (out, lse); lse is None where the engine does not return it ---------------------------------


def _reference(given: Inputs) -> tuple[Tensor, Tensor | None]:
    q, k, v, causal, window, scale, *_ = given
    return reference.flash_attention(q, k, v, causal=causal, window=window, scale=scale, forget=_forget(given))


def _forget(given: Inputs) -> Forget | None:
    return None if given.log_forget is None else sums_of(given.log_forget)


def _kernels():
    from nondual.ops.flash_attention import triton

    return triton


def _triton(given: Inputs) -> tuple[Tensor, Tensor | None]:
    q, k, v, causal, window, scale, return_lse, _ = given
    return _kernels().flash_attention(
        q, k, v, causal=causal, window=window, scale=scale, return_lse=return_lse, forget=_forget(given)
    )


def _sdpa(given: Inputs) -> tuple[Tensor, Tensor | None]:
    """torch's fused kernels, which do not return the log-sum-exp."""
    q, k, v, causal, window, scale, *_ = given
    n, m = q.shape[2], k.shape[2]
    if _in_one_call(given):
        width = v.shape[-1]
        if q.device.type == "cpu":
            q, k, v = _as_the_fused_kernel_wants(q, k, v)
        out = attention(q, k, v, causal=causal, scale=scale, impl="sdpa")
        return out if out.shape[-1] == width else out[..., :width], None
    if torch.compiler.is_exporting():
        mask = masks.sliding_window(n, m, window=window, device=q.device) if window else None
        return attention(q, k, v, mask=mask, causal=window is None, scale=scale, impl="sdpa"), None
    if n == 1 and window is not None:  # decoding: the last keys, and no mask
        return attention(q, k[:, :, m - window :], v[:, :, m - window :], scale=scale, impl="sdpa"), None
    return attention_by_tiles(q, k, v, window or 0, float(scale)), None


def _in_one_call(given: Inputs) -> bool:
    """Whether torch's kernels know this case by themselves: no mask is needed."""
    return given.window is None and (not given.causal or given.q.shape[2] == given.k.shape[2])


def _as_the_fused_kernel_wants(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v of one width, rows without gaps. Handed anything else on a CPU, torch forms the weights, (N, M).

    Zeros are added to the narrower: to q and k they change no score; those of v are cut from the output.
    """
    width = max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _weights(given: Inputs) -> tuple[Tensor, Tensor | None]:
    """The weights formed in plain torch, which every transform of torch can follow."""
    q, k, v, causal, window, scale, *_ = given
    n, m, wide = q.shape[2], k.shape[2], accumulation_dtype(q.dtype)
    share = q.shape[1] // k.shape[1] if k.shape[1] else 1  # query heads to each key head
    k, v = (x.to(wide).repeat_interleave(share, dim=1) for x in (k, v))
    allowed = masks.sliding_window(n, m, window=window or m, device=q.device) if causal and m else None
    with autocast_off(q.device.type):  # it would multiply in half precision
        scores = scale * q.to(wide) @ k.mT  # (B, H, N, M)
        if (forget := _forget(given)) is not None:
            places = torch.arange(m, device=q.device)
            scores = scores + between(forget, torch.arange(m - n, m, device=q.device), places).to(wide)
        out = (masked_softmax(scores, allowed) @ v).to(q.dtype)
    if allowed is None:
        return out, scores.logsumexp(-1)
    empty = ~allowed.any(-1)  # rows without a key: their lse is a constant, though that of -inf has derivatives of NaN
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty[:, None], 0)
    return out, scores.logsumexp(-1).masked_fill(empty, -torch.inf)


# --- what they refuse ------------------------------------------------------------------------------------------------


def _keeps_lse(given: Inputs) -> str | None:
    if given.return_lse:
        return "impl='sdpa' keeps its log-sum-exp; with return_lse=True use 'reference', 'triton' or 'auto'"
    return None


def _knows_no_gates(given: Inputs) -> str | None:
    if given.log_forget is not None:
        return "impl='sdpa' has no forget gates; with log_forget use 'reference', 'triton' or 'auto'"
    return None


def _too_wide(given: Inputs) -> str | None:
    for name, x in (("q", given.q), ("v", given.v)):
        if x.shape[-1] > WIDEST:
            width = x.shape[-1]
            return f"{name} must be at most {WIDEST} wide for impl='triton', got {width}; impl='reference' takes any"
    return None


def _transformed(given: Inputs) -> str | None:
    return refuses_transforms(given.q, given.k, given.v, given.log_forget)


def _refuses_transforms(impl: str):
    """The limit of an engine that is an operator of ours."""

    def refuses(given: Inputs) -> str | None:
        if why := _transformed(given):
            return f"impl={impl!r} of flash_attention {why}; use impl='auto', which forms the weights"
        return None

    return Limit("no forward-mode derivative, no transform of torch.func", refuses, RuntimeError)


def _refuses_transforms_of_tiles(given: Inputs) -> str | None:
    """torch's own operator has rules for all but forward mode; ours, which walks the tiles, has none."""
    if _in_one_call(given) and not has_tangent(given.q, given.k, given.v):
        return None
    return _refuses_transforms("sdpa").refuses(given)


ENGINES = {
    "triton": Engine(
        _triton,
        "our kernels",
        limits=(
            takes_dtypes("triton", "q", "reference", *KERNEL_DTYPES),
            Limit(f"heads up to {WIDEST} wide", _too_wide),
            needs_triton(_kernels),
            runs_kernels("q", _kernels),
            _refuses_transforms("triton"),
        ),
        auto=Preference("on a GPU", lambda given: given.q.device.type == "cuda"),
    ),
    "sdpa": Engine(
        _sdpa,
        "torch's scaled_dot_product_attention, one tile of queries at a time where it would need a mask",
        limits=(
            Limit("without the log-sum-exp", _keeps_lse),
            Limit("without forget gates", _knows_no_gates),
            Limit(
                "no forward-mode derivative; with a window, or causal with N ≠ M, no transform of torch.func",
                _refuses_transforms_of_tiles,
                RuntimeError,
            ),
        ),
        auto=Preference("no transform of torch.func", lambda given: _transformed(given) is None),
    ),
    "reference": Engine(
        _reference, "the papers' algorithm, tile by tile in plain torch", limits=(_refuses_transforms("reference"),)
    ),
}
_WEIGHTS = Engine(_weights, "the weights formed in plain torch, in memory that grows with N · M")
"""What "auto" takes under the transforms of torch.func and for forward-mode derivatives."""
