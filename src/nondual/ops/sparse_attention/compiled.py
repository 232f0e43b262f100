"""Block-sparse attention's loop in C, called: layouts, memory for results, `struct tiles` of tiles.c.

The loop is compiled at its first use, for the processor at hand, and kept in the cache folder, as the selective scan's
is. It computes in float32, or float64 where q is that, and reads rows of whole vectors, 64 bytes. Halves and other
widths are copied, a few heads at a time.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nondual.ops import c_loop
from nondual.ops.dtypes import accumulation_dtype

BAND = 64  # queries that lie side by side in the loop's tables, and bits of a word of its masks
KEYS = 64  # keys whose scores it holds at once
LINE = 64  # bytes of its widest vector
EACH_THREAD = 2**23  # multiply-adds that are worth a thread of their own

LOOP = c_loop.Loop(
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
    return c_loop.library(accumulation_dtype(q.dtype), LOOP)


def forward(
    loop: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, lists: Lists, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write out (B, H, N, Dv) and lse (B, H, N); nothing is empty.

    Raises:
        MemoryError: no memory for what a thread works in.
    """
    wide = lse.dtype
    for heads, groups, listed in _parts((q, k, v), lists, wide):
        into = out[heads] if out.dtype == wide else torch.empty_like(out[heads], dtype=wide)
        of_q, of_k, of_v = (_rows(x, wide) for x in (q[heads], k[groups], v[groups]))
        lse_of = lse[heads][..., None]
        _call(loop.forward, listed, scale, given_v=out.shape[-1], q=of_q, k=of_k, v=of_v, out=into, lse=lse_of)
        if out.dtype != wide:
            out[heads].copy_(into)


def backward(
    loop: ctypes.CDLL, d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lists: Lists, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, in the shapes and dtypes of q, k and v; nothing is empty.

    Raises:
        MemoryError: no memory for what a thread works in.
    """
    wide, grads = lse.dtype, [x.new_empty(x.shape) for x in (q, k, v)]
    for heads, groups, listed in _parts((q, k, v), lists, wide):
        of_q, of_k, of_v, d_out_of = (_rows(x, wide) for x in (q[heads], k[groups], v[groups], d_out[heads]))
        dq, dk, dv = (x[at] for x, at in zip(grads, (heads, groups, groups)))
        into = [x if x.dtype == wide and x.shape == of.shape else of.new_empty(of.shape)
                for x, of in ((dq, of_q), (dk, of_k), (dv, of_v))]  # fmt: skip
        for x in into[1:]:
            x.zero_()
        out_of = out[heads].to(wide)
        _call(
            loop.backward, listed, scale, given=q.shape[-1], given_v=out.shape[-1], q=of_q, k=of_k, v=of_v,
            out=out_of if out_of.stride(-1) == 1 else out_of.contiguous(), lse=lse[heads][..., None], dout=d_out_of,
            dlse=None if d_lse is None else d_lse[heads].to(wide)[..., None], dq=into[0], dk=into[1], dv=into[2],
        )  # fmt: skip
        for x, found in zip((dq, dk, dv), into):
            if found is not x:
                x.copy_(found[..., : x.shape[-1]])
    return grads[0], grads[1], grads[2]


Place = tuple[slice, slice]


def _parts(given: tuple[Tensor, ...], lists: Lists, dtype: torch.dtype) -> Iterator[tuple[Place, Place, Lists]]:
    """Which sequences and query heads, and which key/value heads, one call is given, and their lists: all at once, or
    where copies must be made, one key/value head for each thread, so that the copies are few."""
    (batch, heads), groups = given[0].shape[:2], given[1].shape[1]
    if all(x.dtype == dtype and x.stride(-1) == 1 and not _missing(x, dtype) for x in given):
        yield (slice(batch), slice(heads)), (slice(batch), slice(groups)), lists
        return
    share, some, (bm, gm, _) = heads // groups, torch.get_num_threads(), lists.row_start.shape
    for b in range(batch):
        for g in range(0, groups, some):
            at, until = slice(b, b + 1), min(g + some, groups)
            of_b, of_g = at if bm > 1 else slice(1), slice(g, until) if gm > 1 else slice(1)
            listed = lists._replace(row_start=lists.row_start[of_b, of_g])
            yield (at, slice(g * share, until * share)), (at, slice(g, until)), listed


def _missing(x: Tensor, dtype: torch.dtype) -> int:
    """How many numbers a row lacks to fill whole vectors."""
    return -x.shape[-1] % (LINE // dtype.itemsize)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, the numbers of a row side by side, as many as fill whole vectors: zeros are added."""
    more = _missing(x, dtype)
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
