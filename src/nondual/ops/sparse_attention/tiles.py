"""Block-sparse attention one row of tiles at a time, each over the keys in its list: on a CPU, or any other device.

For each row of tiles the keys and values in its list are laid side by side, or taken as they lie where the list has no
gap, and the row's queries attend to them in one call. Nothing else is read, so time and memory grow with the kept
tiles, forward and backward. The backward pass forms a row's weights again from its log-sum-exp, as Dao 2023
(2307.08691), Algorithm 2, does for each tile, and adds up what each row gives to the keys in its list.

On a CPU a row is a call of torch's own fused kernel, which is given the mask of this row alone; elsewhere its weights
are formed. Sums are kept in float32 or better.

Symbols as in `nondual.ops.sparse_attention`; SHARE = H / G. The query heads that share a key/value head are one call:
q_i holds their rows one head after another, (B, G, SHARE · rows, D).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from nondual.ops.autocast import autocast_off
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.sparse_attention.block_mask import BlockMask

MOST_QUERIES = 256  # that rows of tiles with one list are joined to


class Row(NamedTuple):
    """Neighbouring rows of tiles with one list of keys.

    Attributes:
        batch: which sequences it is of: all, or one.
        groups: which key/value heads: all, or one.
        queries: its rows of q.
        keys: its keys: a slice where they lie side by side, else their positions (int64).
        mask: what is added to the scores (queries, keys): 0 where attending is allowed, -inf elsewhere. None where all
            is allowed.
        empty: (queries,) bool, True for a query that may attend to nothing; None where the mask is None.
    """

    batch: slice
    groups: slice
    queries: slice
    keys: slice | Tensor
    mask: Tensor | None
    empty: Tensor | None


# --8<-- [start:walk]
def walk(
    q: Tensor, k: Tensor, row_start: Tensor, columns: Tensor, row_kinds: Tensor, tile_masks: Tensor, wide: torch.dtype
) -> Iterator[Row]:
    """The rows of tiles that keep at least one, joined where neighbours have the same list."""
    (bm, gm, _), (block_q, block_kv), n, m = row_start.shape, tile_masks.shape[1:], q.shape[2], k.shape[2]
    nothing = tile_masks.new_ones(1, block_q, block_kv)
    allowed = torch.cat([tile_masks, nothing])  # the kind -1 of a whole tile is the last
    listed, kinds = columns.tolist(), row_kinds.tolist()
    for i, starts in enumerate(row_start.flatten(0, 1).tolist()):
        batch = slice(None) if bm == 1 else slice(i // gm, i // gm + 1)
        groups = slice(None) if gm == 1 else slice(i % gm, i % gm + 1)
        for first, last in joined(starts, listed, max(1, MOST_QUERIES // block_q)):
            tiles = listed[starts[first] : starts[first + 1]]
            if not tiles:
                continue
            keys = _positions(tiles, block_kv, m, q.device)
            queries = slice(first * block_q, min(n, last * block_q))
            mask = empty = None
            if any(kind >= 0 for kind in kinds[starts[first] : starts[last]]):
                of = row_kinds[starts[first] : starts[last]].view(last - first, len(tiles)).long()
                seen = allowed[of].transpose(1, 2).reshape((last - first) * block_q, len(tiles) * block_kv)
                width = m - tiles[0] * block_kv if isinstance(keys, slice) else len(keys)
                seen = seen[: queries.stop - queries.start, :width]
                mask = torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill_(~seen, -torch.inf)
                empty = ~seen.any(-1)
            yield Row(batch, groups, queries, keys, mask, empty)


# --8<-- [end:walk]


def joined(starts: list[int], listed: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of tiles that have the same list, at most so many at a time: the first, and the one after."""
    rows, first = len(starts) - 1, 0
    while first < rows:
        last, own = first + 1, listed[starts[first] : starts[first + 1]]
        while last < rows and last - first < most and listed[starts[last] : starts[last + 1]] == own:
            last += 1
        yield first, last
        first = last


def _positions(tiles: list[int], block_kv: int, m: int, device: torch.device) -> slice | Tensor:
    if tiles[-1] - tiles[0] == len(tiles) - 1:
        return slice(tiles[0] * block_kv, min(m, (tiles[-1] + 1) * block_kv))
    starts = torch.tensor(tiles, device=device)[:, None] * block_kv
    keys = (starts + torch.arange(block_kv, device=device)).flatten()
    return keys[: m - tiles[-1] * block_kv - block_kv] if (tiles[-1] + 1) * block_kv > m else keys


def _taken(x: Tensor, row: Row, wide: torch.dtype) -> Tensor:
    """The keys or values of a row, (B or 1, G or 1, keys, ·)."""
    x = x[row.batch, row.groups]
    return (x[:, :, row.keys] if isinstance(row.keys, slice) else x.index_select(2, row.keys)).to(wide)


def _added(x: Tensor, row: Row, part: Tensor) -> None:
    """Add to the keys or values of a row."""
    x = x[row.batch, row.groups]
    if isinstance(row.keys, slice):
        x[:, :, row.keys] += part
    else:
        x.index_add_(2, row.keys, part)


def _folded(x: Tensor, row: Row, groups: int, wide: torch.dtype) -> Tensor:
    """A row's part of q, or of what has its heads: the heads of a group one after another, (·, ·, SHARE · rows, D)."""
    x = x[:, :, row.queries].unflatten(1, (groups, -1))[row.batch, row.groups]  # (·, ·, SHARE, rows, D)
    return x.to(wide).flatten(2, 3)


def _store(x: Tensor, row: Row, groups: int, part: Tensor) -> None:
    """Write a row's part of what has the heads of q."""
    place = x[:, :, row.queries].unflatten(1, (groups, -1))[row.batch, row.groups]
    place.copy_(part.unflatten(2, place.shape[2:4]))


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
    wide, width, groups = accumulation_dtype(q.dtype), v.shape[-1], k.shape[1]
    out, lse = _outputs(q, v)
    out.zero_()
    lse.fill_(-torch.inf)
    q, k, v = _equally_wide(q, k, v)
    with autocast_off(q.device.type):
        for row in walk(q, k, row_start, columns, row_kinds, tile_masks, wide) if q.numel() else ():
            q_i, k_i, v_i = _folded(q, row, groups, wide), _taken(k, row, wide), _taken(v, row, wide)
            out_i, lse_i = _attend(q_i, k_i, v_i, _for_heads(row.mask, q_i), scale)
            if row.empty is not None:
                lse_i = lse_i.unflatten(2, (-1, len(row.empty))).masked_fill(row.empty, -torch.inf).flatten(2)
            _store(out, row, groups, out_i[..., :width])
            _store(lse[..., None], row, groups, lse_i[..., None])
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row_start: Tensor,
    columns: Tensor, row_kinds: Tensor, tile_masks: Tensor, scale: float, with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, in the shapes and dtypes of q, k and v; d_lse counts only with_lse."""
    wide, groups, d, dv_ = accumulation_dtype(q.dtype), k.shape[1], q.shape[-1], v.shape[-1]
    dq = torch.zeros_like(q)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    lse = lse.masked_fill(lse == -torch.inf, 0)  # where all is masked: P = exp(-inf - 0) = 0
    if with_lse:
        # dS = P (dP - delta + d_lse), where delta is the sum of dO ∘ O over a row. A further column that is 0 in V, -1
        # in O and d_lse in dO changes delta alone.
        v, out = F.pad(v, (0, 1)), F.pad(out, (0, 1), value=-1)
        d_out = torch.cat([d_out.to(wide), d_lse[..., None].to(wide)], -1)
    q, k, v = _equally_wide(q, k, v)
    d_out, out = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (d_out, out))
    with autocast_off(q.device.type):
        for row in walk(q, k, row_start, columns, row_kinds, tile_masks, wide) if q.numel() else ():
            q_i, do_i, out_i = (_folded(x, row, groups, wide) for x in (q, d_out, out))
            lse_i = _folded(lse[..., None], row, groups, wide)[..., 0]
            k_i, v_i = _taken(k, row, wide), _taken(v, row, wide)
            dq_i, dk_i, dv_i = _adjoint(do_i, q_i, k_i, v_i, out_i, lse_i, _for_heads(row.mask, q_i), scale)
            _store(dq, row, groups, dq_i[..., :d])
            _added(dk, row, dk_i[..., :d])
            _added(dv, row, dv_i[..., :dv_])
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


def _for_heads(mask: Tensor | None, q_i: Tensor) -> Tensor | None:
    """The mask of the queries of one head, repeated for the heads of a group."""
    share = 1 if mask is None else q_i.shape[2] // mask.shape[0]
    return mask if mask is None or share == 1 else mask.repeat(share, 1)


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
