"""Block-sparse attention's loop in C, called: layouts, memory for results, `struct tiles` of tiles.c.

The loop is compiled at its first use, for the processor at hand, and kept in the cache folder, as the selective scan's
is. It computes in float32, or float64 where q is that; halves are computed from copies in float32.
"""

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.selective_scan.cpu import build

BAND = 64  # queries that lie side by side in the loop's tables, and bits of a word of its masks
KEYS = 64  # keys whose scores it holds at once
LINE = 64  # bytes of its widest vector
EACH_THREAD = 2**23  # multiply-adds that are worth a thread of their own

LOOP = build.Loop(
    "sparse_attention",
    Path(__file__).with_name("tiles.c"),
    {"BAND": BAND, "KEYS": KEYS},
    "NONDUAL_CPU_SPARSE",
    "block-sparse attention's loop could not be compiled, and runs in plain torch, some two to three times slower",
)

SIZES = ("batch heads groups n m width width_v given given_v block_q block_kv bm gm rows mask_row threads").split()
LISTS = "row_start columns kinds masks".split()
TENSORS = "q k v out lse dout dlse dq dk dv".split()


class Lists(NamedTuple):
    """The lists of a BlockMask by rows.

    Attributes:
        row_start: (Bm, Gm, Tq + 1) int32.
        columns: (K,) int32.
        row_kinds: (K,) int32.
        tile_masks: (U, block_q, block_kv) bool.
    """

    row_start: Tensor
    columns: Tensor
    row_kinds: Tensor
    tile_masks: Tensor


class Placed(ctypes.Structure):
    """`struct tensor` of tiles.c."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "bhn")]


class Tiles(ctypes.Structure):
    """`struct tiles` of tiles.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in LISTS),
        *((name, Placed) for name in TENSORS),
    ]


def library(q: Tensor) -> ctypes.CDLL | None:
    """The loop for q. None where plain torch must serve: on another device than a CPU, or on one whose numbers start
    with the highest byte; without a C compiler; and where the environment says NONDUAL_CPU_SPARSE=torch."""
    if q.device.type != "cpu" or sys.byteorder != "little":  # the bits of a word of the masks go by bytes
        return None
    return build.library(accumulation_dtype(q.dtype), LOOP)


def forward(
    loop: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write out (B, H, N, Dv) and lse (B, H, N); nothing is empty.

    Raises:
        MemoryError: no memory for what a thread works in.
    """
    wide = lse.dtype
    into = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    q, k, v = (_rows(x, wide) for x in (q, k, v))
    _call(loop.forward, lists, scale, given_v=out.shape[-1], q=q, k=k, v=v, out=into, lse=lse[..., None])
    if into is not out:
        out.copy_(into)


def backward(
    loop: ctypes.CDLL, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lists: Lists, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, in the shapes and dtypes of q, k and v; nothing is empty.

    Raises:
        MemoryError: no memory for what a thread works in.
    """
    wide, given = lse.dtype, (q, k, v)
    q, k, v, d_out = (_rows(x, wide) for x in (q, k, v, d_out))
    out = out.to(wide)
    dq = given[0].new_empty(given[0].shape, dtype=wide)
    dk, dv = (x.new_zeros(x.shape) for x in (k, v))
    _call(
        loop.backward, lists, scale, given=dq.shape[-1], given_v=out.shape[-1], q=q, k=k, v=v,
        out=out if out.stride(-1) == 1 else out.contiguous(), lse=lse[..., None], dout=d_out,
        dlse=None if d_lse is None else d_lse.to(wide)[..., None], dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    grads = (dx[..., : x.shape[-1]].to(x.dtype).contiguous() for dx, x in zip((dq, dk, dv), given))
    return tuple(grads)  # pyright: ignore[reportReturnType]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, the numbers of a row side by side, as many as fill whole vectors: zeros are added."""
    more = -x.shape[-1] % (LINE // dtype.itemsize)
    x = F.pad(x.to(dtype), (0, more)) if more else x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(run, lists: Lists, scale: float, *, q: Tensor, k: Tensor, v: Tensor, given=0, given_v=0, **others) -> None:
    """Fill `struct tiles` and run one of the two passes. Tensors go in by address and strides; None stays null."""
    (batch, heads, n, width), (groups, m), (bm, gm, rows) = q.shape, k.shape[1:3], lists.row_start.shape
    masks, (_, block_q, block_kv) = _turned(lists.tile_masks), lists.tile_masks.shape
    held = [*(x.contiguous() for x in lists[:3]), masks]
    work = lists.columns.numel() // (bm * gm) * block_q * block_kv * batch * heads * (width + v.shape[-1])
    threads = min(torch.get_num_threads(), 1 + work // EACH_THREAD)
    sizes = (
        batch, heads, groups, n, m, width, v.shape[-1], given, given_v, block_q, block_kv, bm, gm, rows - 1,
        masks.shape[2], threads,
    )  # fmt: skip
    tiles = Tiles(scale=scale)
    for name, size in zip(SIZES, sizes, strict=True):
        setattr(tiles, name, size)
    for name, x in zip(LISTS, held, strict=True):
        setattr(tiles, name, x.data_ptr())
    for name, x in {"q": q, "k": k, "v": v, **others}.items():
        if x is not None:
            setattr(tiles, name, Placed(x.data_ptr(), *x.stride()[:3]))
    if run(ctypes.byref(tiles)):
        raise MemoryError("block-sparse attention found no memory to work in")


def _turned(tile_masks: Tensor) -> Tensor:
    """Tile masks (U, block_q, block_kv) as (U, block_kv, words) int64, a bit for each query and 0 beyond the last."""
    u, block_q, block_kv = tile_masks.shape
    words = torch.zeros(u, block_kv, -(-block_q // BAND), dtype=torch.int64)
    if u:
        packed = np.packbits(tile_masks.mT.numpy(), axis=2, bitorder="little")
        words.view(torch.uint8)[..., : packed.shape[2]] = torch.from_numpy(packed)
    return words
