"""Block-sparse attention one row of tiles at a time, each over the keys in its list: on a CPU, or any other device.

On a CPU a loop in C computes each kept tile from keys and values where they lie (tiles.c, called by compiled.py). This
file has the operators and the way in plain torch, which serves on other devices and where there is no C compiler.

In torch, the keys and values in the list of a row of tiles are laid side by side, or taken as they lie where the list
has no gap, and the row's queries attend to them in one call: on a CPU of torch's own fused kernel, which is given the
mask of this row alone; elsewhere the row's weights are formed. The backward pass forms them again from the row's
log-sum-exp, as Dao 2023 (2307.08691), Algorithm 2, does for each tile, and adds up what each row gives to the keys in
its list.

Either way nothing else is read, time and memory grow with the kept tiles, and sums are kept in float32 or better.

Symbols as in `nondual.ops.sparse_attention`; SHARE = H / G. The query heads that share a key/value head are one call:
q_i holds their rows one head after another, (B, G, SHARE · rows, D).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from nondual.ops.autocast import autocast_off
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.sparse_attention import compiled
from nondual.ops.sparse_attention.block_mask import BlockMask

MOST_QUERIES = 256  # that rows of tiles with one list are joined to
MOST_GATHERED = 2**17  # numbers of the keys that are laid side by side at once: they should stay in a core's cache


class Row(NamedTuple):
    """Neighbouring rows of tiles with one list of keys.

    Attributes:
        at: which sequences and which key/value heads it is of: all, or one; then all query heads that share them, and
            its queries.
        listed: its columns of tiles.
        columns: the same as a tensor.
        mask: what is added to the scores (SHARE · queries, keys): 0 where attending is allowed, -inf elsewhere. None
            where all is allowed.
        empty: (queries,) bool, True for a query that may attend to nothing; None where each may attend to something.
    """

    at: tuple[slice, slice, slice, slice]
    listed: list[int]
    columns: Tensor
    mask: Tensor | None
    empty: Tensor | None


def walk(
    q: Tensor, k: Tensor, row_start: Tensor, columns: Tensor, row_kinds: Tensor, tile_masks: Tensor, wide: torch.dtype
) -> Iterator[Row]:
    """The rows of tiles that keep at least one, joined where neighbours have the same list."""
    every, listed, kinds = slice(None), columns.tolist(), row_kinds.tolist()
    (bm, gm, _), (block_q, block_kv), n, m = row_start.shape, tile_masks.shape[1:], q.shape[2], k.shape[2]
    made, mask, empty = None, None, None
    added = _added_to_scores(tile_masks, wide)
    for i, starts in enumerate(row_start.flatten(0, 1).tolist()):
        batch = every if bm == 1 else slice(i // gm, i // gm + 1)
        group = every if gm == 1 else slice(i % gm, i % gm + 1)
        for first, last in joined(starts, listed, max(1, MOST_QUERIES // block_q)):
            tiles = listed[starts[first] : starts[first + 1]]
            if not tiles:
                continue
            rows = slice(first * block_q, min(n, last * block_q))
            high, last_wide = rows.stop - rows.start, min(block_kv, m - tiles[-1] * block_kv)
            these = (kinds[starts[first] : starts[last]], len(tiles), high, last_wide)
            if these != made:  # the rows of a window have the same mask one after another
                of = row_kinds[starts[first] : starts[last]].view(last - first, len(tiles))
                mask, empty = _mask_of(added, of, high, last_wide)
                mask = mask if mask is None else mask.repeat(q.shape[1] // k.shape[1], 1)
                made = these
            of_keys = columns[starts[first] : starts[first + 1]]
            for at in parts(batch, group, k.shape[:2], len(tiles) * block_kv * k.shape[3], tiles):
                yield Row((*at, every, rows), tiles, of_keys, mask, empty)


def joined(starts: list[int], listed: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of tiles that have the same list, at most so many at a time: the first, and the one after."""
    rows, first = len(starts) - 1, 0
    while first < rows:
        last, own = first + 1, listed[starts[first] : starts[first + 1]]
        while last < rows and last - first < most and listed[starts[last] : starts[last + 1]] == own:
            last += 1
        yield first, last
        first = last


def parts(
    batch: slice, group: slice, lead: Sequence[int], size: int, tiles: list[int]
) -> Iterator[tuple[slice, slice]]:
    """The sequences and key/value heads that share a row, at once where its keys lie side by side, else so few at a
    time that the keys laid side by side, `size` numbers for each head, are not more than the cache holds."""
    if tiles[-1] - tiles[0] == len(tiles) - 1:
        yield batch, group
        return
    some = max(1, MOST_GATHERED // size)
    for b in range(*batch.indices(lead[0])):
        for g in range(*(group.indices(lead[1])[:2]), some):
            yield slice(b, b + 1), slice(g, min(g + some, group.indices(lead[1])[1]))


def _added_to_scores(tile_masks: Tensor, wide: torch.dtype) -> Tensor:
    """What each kind of tile adds to its scores, (U + 1, block_q, block_kv): a whole tile, the kind -1, is the last."""
    added = torch.zeros(len(tile_masks) + 1, *tile_masks.shape[1:], dtype=wide, device=tile_masks.device)
    added[:-1].masked_fill_(~tile_masks, -torch.inf)
    return added


def _mask_of(added: Tensor, kinds: Tensor, high: int, last_wide: int) -> tuple[Tensor | None, Tensor | None]:
    """What is added to the scores of rows of tiles whose kinds are (rows of tiles, columns), and which of their queries
    may attend to nothing: of `high` queries, the last tile cut to `last_wide` keys."""
    if not bool((kinds >= 0).any()):
        return None, None
    block_kv = added.shape[2]
    mask = added[kinds.long()].transpose(1, 2).reshape(-1, kinds.shape[1] * block_kv)
    if high < mask.shape[0] or last_wide < block_kv:
        mask = mask[:high, : mask.shape[1] - block_kv + last_wide].contiguous()
    if bool((kinds == -1).any(1).all()):  # a whole tile in each row
        return mask, None
    empty = (mask == -torch.inf).all(-1)
    return mask, empty if bool(empty.any()) else None


# --- what a row takes, and where it puts what comes out --------------------------------------------------------------


def _by_group(x: Tensor, groups: int) -> Tensor:
    """What has the heads of q, (B, H, N, ·) as (B, G, SHARE, N, ·)."""
    return x.unflatten(1, (groups, -1))


def _folded(x: Tensor, row: Row, wide: torch.dtype) -> Tensor:
    """A row's part of (B, G, SHARE, N, ·): the heads of a group one after another, (·, ·, SHARE · rows, ·)."""
    return x[row.at].to(wide).flatten(2, 3)


def _store(x: Tensor, row: Row, part: Tensor) -> None:
    """Write a row's part of (B, G, SHARE, N, ·)."""
    place = x[row.at]
    place.copy_(part[..., : place.shape[-1]].view(place.shape))


class Keys:
    """Keys or values (B, G, M, ·), taken and added to by the tiles in a row's list."""

    x: Tensor
    block_kv: int
    held: int
    tiles: Tensor | None
    buffer: Tensor

    def __init__(self, x: Tensor, block_kv: int):
        self.x, self.block_kv, held = x, block_kv, x.shape[2] // block_kv  # those that M does not cut
        self.held, self.tiles = held, x[:, :, : held * block_kv].unflatten(2, (held, block_kv)) if held else None
        self.buffer = x.new_empty(0)  # new memory for each row would cost more than the copy

    def _side_by_side(self, row: Row) -> Tensor | None:
        """A view of a row's keys, where they lie so."""
        first, last = row.listed[0], row.listed[-1]
        if last - first != len(row.listed) - 1:
            return None
        return self.x[*row.at[:2], first * self.block_kv : (last + 1) * self.block_kv]

    def take(self, row: Row, wide: torch.dtype) -> Tensor:
        """The keys of a row, (·, ·, keys, ·)."""
        if (found := self._side_by_side(row)) is not None:
            return found.to(wide)
        assert self.tiles is not None  # a list with a gap has a tile that M does not cut
        cut = row.listed[-1] >= self.held
        columns = row.columns[:-1] if cut else row.columns
        tiles = self.tiles[row.at[:2]]
        shape = (*tiles.shape[:2], len(columns), *tiles.shape[3:])
        if self.buffer.numel() < math.prod(shape):
            self.buffer = self.x.new_empty(math.prod(shape))
        found = torch.index_select(tiles, 2, columns, out=self.buffer[: math.prod(shape)].view(shape)).flatten(2, 3)
        return (
            torch.cat([found, self.x[*row.at[:2], self.held * self.block_kv :]], 2).to(wide) if cut else found.to(wide)
        )

    def add(self, row: Row, part: Tensor) -> None:
        """Add to the keys of a row."""
        part = part[..., : self.x.shape[-1]]
        if (found := self._side_by_side(row)) is not None:
            found += part
            return
        assert self.tiles is not None
        count = len(row.listed) - (row.listed[-1] >= self.held)
        tiles = part[:, :, : count * self.block_kv].unflatten(2, (count, self.block_kv))
        self.tiles[row.at[:2]].index_add_(2, row.columns[:count], tiles)
        if count < len(row.listed):
            self.x[*row.at[:2], self.held * self.block_kv :] += part[:, :, count * self.block_kv :]


# --- one row ---------------------------------------------------------------------------------------------------------


def _fused(q: Tensor) -> bool:
    """Whether torch has one kernel for a row that gives its log-sum-exp: on a CPU."""
    return q.device.type == "cpu"


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse of some queries over some keys, all (·, ·, ·, ·) in one dtype; where all is forbidden, 0 and 0."""
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    s = scale * q @ k.mT
    if mask is not None:
        s = s + mask
    lse = s.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    return torch.exp(s - lse[..., None]) @ v, lse


def _adjoint(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of one row."""
    if _fused(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    s = scale * q @ k.mT
    if mask is not None:
        s = s + mask
    p = torch.exp(s - lse[..., None])
    ds = p * (d_out @ v.mT - torch.linalg.vecdot(d_out, out)[..., None])
    return scale * ds @ k, scale * ds.mT @ q, p.mT @ d_out


# --- all rows --------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, v: Tensor, row_start: Tensor, columns: Tensor, row_kinds: Tensor, tile_masks: Tensor,
    scale: float, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, N, Dv) in q's dtype and lse (B, H, N) in float32 or better; the lists are those of a BlockMask.

    with_lse is for the backward pass: whether lse has a gradient.
    """
    wide, groups, block_kv = accumulation_dtype(q.dtype), k.shape[1], tile_masks.shape[2]
    out, lse = _outputs(q, v)
    lists = compiled.Lists(row_start, columns, row_kinds, tile_masks)
    if q.numel() and k.numel() and (loop := compiled.library(q)):
        compiled.forward(loop, q, k, v, lists, scale, out, lse)
        return out, lse
    out.zero_()
    lse.fill_(-torch.inf)
    if not (q.numel() and k.numel()):
        return out, lse
    out_of, lse_of = _by_group(out, groups), _by_group(lse[..., None], groups)
    q, k, v = _equally_wide(q, k, v)
    q, keys, values = _by_group(q, groups), Keys(k, block_kv), Keys(v, block_kv)
    with autocast_off(q.device.type):
        # --8<-- [start:rows]
        for row in walk(out, k, row_start, columns, row_kinds, tile_masks, wide):
            q_i = _folded(q, row, wide)  # (B, G, SHARE · rows, D)
            k_i, v_i = keys.take(row, wide), values.take(row, wide)  # those in its list
            out_i, lse_i = _attend(q_i, k_i, v_i, row.mask, scale)
            _store(out_of, row, out_i)
            _store(lse_of, row, lse_i[..., None])
            if row.empty is not None:  # queries that may attend to nothing
                lse_of[row.at].masked_fill_(row.empty[:, None], -torch.inf)
        # --8<-- [end:rows]
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row_start: Tensor,
    columns: Tensor, row_kinds: Tensor, tile_masks: Tensor, scale: float, with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, in the shapes and dtypes of q, k and v; d_lse counts only with_lse."""
    lists = compiled.Lists(row_start, columns, row_kinds, tile_masks)
    if q.numel() and k.numel() and (loop := compiled.library(q)):
        return compiled.backward(loop, d_out, d_lse if with_lse else None, q, k, v, out, lse, lists, scale)
    wide, groups, block_kv = accumulation_dtype(q.dtype), k.shape[1], tile_masks.shape[2]
    dq = torch.zeros_like(q)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    if not (q.numel() and k.numel()):
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    lse = lse.masked_fill(lse == -torch.inf, 0)  # where all is masked: P = exp(-inf - 0) = 0
    if with_lse:
        # dS = P (dP - delta + d_lse), where delta is the sum of dO ∘ O over a row. A further column that is 0 in V, -1
        # in O and d_lse in dO changes delta alone.
        v, out = F.pad(v, (0, 1)), F.pad(out, (0, 1), value=-1)
        d_out = torch.cat([d_out.to(wide), d_lse[..., None].to(wide)], -1)
    q, k, v = _equally_wide(q, k, v)
    d_out, out = (F.pad(x, (0, more)) if (more := v.shape[-1] - x.shape[-1]) else x for x in (d_out, out))
    rows_of = [_by_group(x, groups) for x in (d_out, q, out, lse[..., None])]
    dq_of, keys, values, d_keys, d_values = _by_group(dq, groups), *(Keys(x, block_kv) for x in (k, v, dk, dv))
    with autocast_off(q.device.type):
        for row in walk(dq, k, row_start, columns, row_kinds, tile_masks, wide):
            do_i, q_i, out_i, lse_i = (_folded(x, row, wide) for x in rows_of)
            k_i, v_i = keys.take(row, wide), values.take(row, wide)
            dq_i, dk_i, dv_i = _adjoint(do_i, q_i, k_i, v_i, out_i, lse_i[..., 0], row.mask, scale)
            _store(dq_of, row, dq_i)
            d_keys.add(row, dk_i)
            d_values.add(row, dv_i)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """An empty (B, H, N, Dv), laid out in memory as (B, N, H, Dv) so that a module joins the heads without a copy, and
    an empty (B, H, N)."""
    b, h, n, _ = q.shape
    out = q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(b, h, n, dtype=accumulation_dtype(q.dtype))


def _equally_wide(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v of one width, rows without gaps, as torch's fused kernel wants them: zeros are added to the narrower,
    which change no score, and those of v are cut from the output."""
    width = max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


# --- as operators of torch -------------------------------------------------------------------------------------------
# Operators, so that torch.compile does not unroll the loops and compile again for every length.

attention_by_rows: CustomOpDef = torch.library.custom_op("nondual::sparse_attention_tiles", forward, mutates_args=())
_backward = torch.library.custom_op("nondual::sparse_attention_tiles_backward", backward, mutates_args=())


@attention_by_rows.register_fake
def _(q, k, v, row_start, columns, row_kinds, tile_masks, scale, with_lse):
    return _outputs(q, v)


@_backward.register_fake
def _(d_out, d_lse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.options = inputs[7:]


def _differentiate(ctx, d_out, d_lse):
    return *_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.options), *(None for _ in range(6))


def _refuse(ctx, *_):
    raise RuntimeError("sparse_attention(impl='tiles') has no second derivative; impl='reference' has one")


attention_by_rows.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) in q's dtype and lse (B, H, N), from checked inputs; lse has a gradient only with_lse."""
    mask = block_mask
    return attention_by_rows(q, k, v, mask.row_start, mask.columns, mask.row_kinds, mask.tile_masks, scale, with_lse)
