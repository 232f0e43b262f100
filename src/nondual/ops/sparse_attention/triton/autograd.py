"""Block-sparse attention's kernels as operators of torch, with their backward pass, and the function that calls them.

Each pass is a `custom_op` and not a `triton_op`, as in `nondual.ops.flash_attention.triton.autograd`.
"""

import math
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nondual.ops.flash_attention.triton.launch import empty_as, empty_outputs
from nondual.ops.sparse_attention.triton.launch import Mask, launch_backward, launch_forward, whole_first


@torch.library.custom_op("nondual::sparse_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: list[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(q, k, v, Mask.of(mask), scale)


@_forward.register_fake
def _(q, k, v, mask, scale):
    return empty_outputs(q, v)


@torch.library.custom_op("nondual::sparse_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, top: Tensor, total: Tensor,
    mask: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_backward(d_out, d_total, q, k, v, out, top, total, Mask.of(mask), scale)


@_backward.register_fake
def _(d_out, d_total, q, k, v, out, top, total, mask, scale):
    return tuple(empty_as(x, *x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, *mask)


def _differentiate(ctx, d_out, d_top, d_total):
    """Only the sum of top and total is used, so both have the same gradient: one of them is enough."""
    tensors, mask = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    return *_backward(d_out, d_total, *tensors, mask, ctx.scale), [None] * len(mask), None


def _refuse(ctx, *_):
    raise RuntimeError("sparse_attention(impl='triton') has no second derivative; impl='reference' has one")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


class BlockMask(Protocol):
    """What is read of a `nondual.ops.sparse_attention.BlockMask`, where it is described."""

    n: int
    m: int
    block_q: int
    block_kv: int
    row_start: Tensor
    columns: Tensor
    row_kinds: Tensor
    col_start: Tensor
    rows: Tensor
    col_kinds: Tensor
    tile_masks: Tensor


def lists_of(mask: BlockMask) -> Mask:
    """The lists of a mask in the order in which the kernels pass them."""
    row, column = mask.n // mask.block_q, mask.m // mask.block_kv  # the last, where it is cut
    return Mask(
        whole_first(mask.row_start, mask.columns, mask.row_kinds, column if mask.m % mask.block_kv else -1),
        whole_first(mask.col_start, mask.rows, mask.col_kinds, row if mask.n % mask.block_q else -1),
        mask.tile_masks.contiguous(),
    )


_KEPT: "WeakKeyDictionary[BlockMask, list[Tensor]]" = WeakKeyDictionary()


def _tensors_of(mask: BlockMask) -> list[Tensor]:
    """The tensors of `lists_of`, made once for each mask; in a compiled program, which keeps nothing, at each call."""
    if torch.compiler.is_compiling():
        return lists_of(mask).tensors()
    if mask not in _KEPT:
        _KEPT[mask] = lists_of(mask).tensors()
    return _KEPT[mask]


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, *, scale: float = 1.0, return_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Attention over the listed tiles and its log-sum-exp; `nondual.ops.sparse_attention` has checked the inputs.

    Args:
        q: queries (B, H, N, D), float16, bfloat16 or float32, in any layout; D at most 256.
        k: keys (B, G, M, D).
        v: values (B, G, M, Dv), Dv at most 256.
        block_mask: for N queries and M keys, its tiles multiples of 16 in both directions. Its lists are not read
            again: a mask is not changed in place.
        scale: factor on q · k.
        return_lse: return the log-sum-exp; otherwise None in its place.

    Returns:
        out (B, H, N, Dv) in q's dtype, and lse (B, H, N), natural, in float32, or None.

    Raises:
        RuntimeError: when differentiated twice.
    """
    if scale <= 0:  # the kernels take a row's maximum before they multiply by scale, which is right if scale > 0
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    out, top, total = _forward(q, k, v, _tensors_of(block_mask), float(scale))
    return out, (top + total) * math.log(2) if return_lse else None
