"""Block-sparse attention: softmax(q kᵀ · scale) v over the tiles that a mask keeps; the others are never computed.

Source: Child et al. 2019 (1904.10509), sections 4 and 5.5; Dao et al. 2022 (2205.14135), section 3.3. Symbols: B batch,
H query heads, G key/value heads (H a multiple of G), N queries, M keys, D head width; the mask's own are in
`nondual.ops.sparse_attention.block_mask`. Patterns, such as windows and strides, are in
`nondual.efficient_attention.sparse_attention`.

Three engines (`ENGINES` is their table):

- "reference": the definition. All scores are computed, and those outside of the mask are dropped. Any floating dtype,
  every transform of torch, second derivatives; memory grows with N · M.
- "tiles": one row of tiles at a time over the keys in its list. Time and memory grow with the kept tiles, forward and
  backward. Any floating dtype, any device. On a CPU that is a loop in C, compiled at its first use; without a C
  compiler, or with NONDUAL_CPU_SPARSE=torch in the environment, and elsewhere, each row is a call of torch's own.
- "triton": our kernels, in float16, bfloat16 and float32, for heads up to 256 wide and tiles whose sides are
  multiples of 16. On CUDA tensors; on CPU tensors
  only in Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported), slowly, and not in bfloat16.

"auto" takes "triton" for CUDA tensors that it can hold, where triton is installed, and "tiles" for all others. For
forward-mode derivatives and under the transforms of torch.func (grad, vjp, jacrev, vmap, and so gradients for each
sample) it takes "reference".
"""

import math
from typing import Any, Literal, NamedTuple, overload

from jaxtyping import Float
from torch import Tensor

from nondual.ops.attention import check_qkv
from nondual.ops.autocast import as_autocast_does
from nondual.ops.checks import check_tensors
from nondual.ops.impl import (
    KERNEL_DTYPES,
    Engine,
    Limit,
    Preference,
    choose,
    needs_triton,
    refuses_transforms,
    runs_kernels,
    takes_dtypes,
)
from nondual.ops.sparse_attention import reference, tiles
from nondual.ops.sparse_attention.block_mask import BlockMask as BlockMask

WIDEST = 256  # the widest head that the kernels hold on the chip

Impl = Literal["auto", "reference", "tiles", "triton"]


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n dv"] | tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Each query's weighted mean of the values that the mask lets it see, at a cost that follows the kept tiles.

        out[i] = Σ_j exp(s_ij - lse_i) v[j],   lse_i = log Σ_j exp(s_ij),   s_ij = scale · q[i] · k[j],   j allowed to i

    A query with nothing to attend to gives 0 with lse = -inf, and passes back no gradient. NaN or inf in a key or value
    of a tile that is not kept never reaches the output (with "reference" it can); in a kept tile it can reach other
    rows, masked or not, as in torch. Under autocast q, k and v are cast as torch casts those of its own attention.

    Args:
        q: queries (B, H, N, D), any floating dtype that the engine knows, in any layout.
        k: keys (B, G, M, D), of the dtype and device of q. H must be a multiple of G.
        v: values (B, G, M, Dv); Dv may differ from D.
        block_mask: for N queries and M keys, its Bm 1 or B and its Gm 1 or G, on the device of q.
        scale: factor on q · k; 1/√D where left out.
        return_lse: also return the log-sum-exp of each row. It is differentiable too.
        impl: "auto", "reference", "tiles" or "triton".

    Returns:
        out (B, H, N, Dv) in q's dtype, or (out, lse (B, H, N)). lse is natural, in float32 (float64 for float64).

    Raises:
        TypeError: q, k or v is not a tensor, or block_mask is not a BlockMask.
        ValueError: shapes, dtypes or devices that do not fit, or that the engine asked for does not hold; an unknown
            engine.
        RuntimeError: "triton" asked for where triton is missing. A second derivative through "tiles" or "triton". A
            forward-mode derivative or a transform of torch.func asked of them by name: "auto" has them.
    """
    check_tensors({"q": q, "k": k, "v": v})
    if not isinstance(block_mask, BlockMask):
        kind = type(block_mask).__name__
        raise TypeError(f"block_mask must be a BlockMask, got {kind}; BlockMask.from_mask makes one of a boolean mask")
    q, k, v = as_autocast_does(q, k, v)
    check_qkv(q, k, v)
    _check_mask(block_mask, q, k)
    if v.shape[-1] == 0:
        raise ValueError("v must have a width of 1 or more, got 0")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    given = Inputs(q, k, v, block_mask, float(scale), return_lse)
    out, lse = choose(impl, ENGINES, given).run(given)
    return (out, lse) if return_lse else out


class Inputs(NamedTuple):
    """What passed the door, as the engines take it: q, k, v and the mask fit together."""

    q: Tensor  # (B, H, N, D)
    k: Tensor  # (B, G, M, D)
    v: Tensor  # (B, G, M, Dv)
    block_mask: BlockMask  # for (N, M), Bm 1 or B, Gm 1 or G
    scale: float
    return_lse: bool


def _check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    b, n, (g, m) = q.shape[0], q.shape[2], k.shape[1:3]
    if (mask.n, mask.m) != (n, m):
        raise ValueError(f"block_mask must be for N={n} queries and M={m} keys, got one for {mask.n} and {mask.m}")
    if mask.batch not in (1, b) or mask.groups not in (1, g):
        raise ValueError(
            f"block_mask must have a batch of 1 or B={b} and 1 or G={g} key/value heads, got {mask.batch} and "
            f"{mask.groups}; all query heads of a key/value head share its tiles"
        )
    if mask.device != q.device:
        raise ValueError(
            f"block_mask must be on q's device {q.device}, got {mask.device}; move it with block_mask.to(q.device)"
        )


# --- engines: each gives (out, lse); lse is None where it was not asked for ------------------------------------------


def _reference(given: Inputs) -> tuple[Tensor, Tensor | None]:
    q, k, v, block_mask, scale, _ = given
    return reference.sparse_attention(q, k, v, block_mask, scale)


def _tiles(given: Inputs) -> tuple[Tensor, Tensor | None]:
    return tiles.sparse_attention(*given)


def _kernels() -> Any:
    from nondual.ops.sparse_attention import triton

    return triton


def _triton(given: Inputs) -> tuple[Tensor, Tensor | None]:
    q, k, v, block_mask, scale, return_lse = given
    return _kernels().sparse_attention(q, k, v, block_mask, scale=scale, return_lse=return_lse)


# --- what they refuse ------------------------------------------------------------------------------------------------


def _too_wide(given: Inputs) -> str | None:
    for name, x in (("q", given.q), ("v", given.v)):
        if x.shape[-1] > WIDEST:
            width = x.shape[-1]
            return f"{name} must be at most {WIDEST} wide for impl='triton', got {width}; impl='tiles' takes any"
    return None


def _odd_tiles(given: Inputs) -> str | None:
    tile = (given.block_mask.block_q, given.block_mask.block_kv)
    if any(size % 16 for size in tile):
        return (
            f"block_mask must have tiles of multiples of 16 for impl='triton', got {tile[0]} x {tile[1]}; "
            "impl='tiles' takes any"
        )
    return None


def _refuses_transforms(impl: str) -> Limit:
    """The limit of an engine that is an operator of ours."""

    def refuses(given: Inputs) -> str | None:
        if why := refuses_transforms(given.q, given.k, given.v):
            return f"impl={impl!r} of sparse_attention {why}; use impl='auto', which forms the weights"
        return None

    return Limit("no forward-mode derivative, no transform of torch.func", refuses, RuntimeError)


ENGINES = {
    "triton": Engine(
        _triton,
        "our kernels",
        limits=(
            takes_dtypes("triton", "q", "tiles", *KERNEL_DTYPES),
            Limit(f"heads up to {WIDEST} wide", _too_wide),
            Limit("tiles of multiples of 16", _odd_tiles),
            needs_triton(_kernels),
            runs_kernels("q", _kernels),
            _refuses_transforms("triton"),
        ),
        auto=Preference("on a GPU", lambda given: given.q.device.type == "cuda"),
    ),
    "tiles": Engine(
        _tiles,
        "one row of tiles at a time over the keys in its list: on a CPU in C, without a compiler in plain torch",
        limits=(_refuses_transforms("tiles"),),
    ),
    "reference": Engine(_reference, "the definition: all scores, of which those outside of the mask are dropped"),
}
