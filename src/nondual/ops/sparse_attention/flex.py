"""A mask of ours as one of torch's FlexAttention, and the other way round.

Source: Dong et al. 2024 (2412.05496); torch.nn.attention.flex_attention. FlexAttention keeps two tables of tiles, the
whole ones and the partly allowed ones, in memory that grows with Tq · Tk, and a function, mask_mod, that is asked about
each pair in a partly allowed tile. Symbols as in `nondual.ops.sparse_attention.block_mask`.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


def to_flex(mask: Any, heads: int | None) -> "FlexBlockMask":
    """A `nondual.ops.sparse_attention.BlockMask` as one of FlexAttention, whose mask_mod looks up the tile masks."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    kinds = mask.kinds()
    if mask.groups > 1:
        if heads is None or heads % mask.groups:
            raise ValueError(
                f"heads must be given, a multiple of the mask's {mask.groups} key/value heads, got {heads}: "
                "FlexAttention lists tiles by query head"
            )
        kinds = kinds.repeat_interleave(heads // mask.groups, dim=1)
    block_q, block_kv = mask.block_q, mask.block_kv
    ends = torch.tensor([False, True], device=mask.device).view(2, 1, 1).expand(2, block_q, block_kv)
    tiles = torch.cat([mask.tile_masks, ends])  # the kind -2 of an empty tile is the last but one, -1 is the last
    batch, lists = kinds.shape[:2]

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kind = kinds[b if batch > 1 else 0, h if lists > 1 else 0, query // block_q, key // block_kv].long()
        return tiles[kind, query % block_q, key % block_kv]

    return FlexBlockMask.from_kv_blocks(
        *_table(kinds >= 0),
        *_table(kinds == -1),
        BLOCK_SIZE=(block_q, block_kv),
        mask_mod=mask_mod,
        seq_lengths=(mask.n, mask.m),
    )


def _table(kept: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row keeps, (·, ·, Tq), and which, first in each row of (·, ·, Tq, Tk): int32 both."""
    columns = kept.int().argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), columns.int().contiguous()


class Listed(NamedTuple):
    """The kept tiles of a mask of FlexAttention, ordered by row."""

    lead: tuple[int, int]  # Bm, Gm
    lengths: tuple[int, int]  # N, M
    block: tuple[int, int]
    of: Tensor  # (K,) int64, counts the pairs (b, g)
    rows: Tensor  # (K,) int64
    columns: Tensor  # (K,) int64
    partial: Tensor  # (K,) bool, where a tile is not whole
    tiles: Tensor  # bool (P, block_q, block_kv), the masks of those


def listed(flex: "FlexBlockMask", groups: int | None) -> Listed:
    """What `BlockMask.from_flex` is made of."""
    (n, m), (block_q, block_kv) = flex.seq_lengths, flex.BLOCK_SIZE
    partial = _dense(flex.kv_num_blocks, flex.kv_indices, m, block_kv)
    whole = torch.zeros_like(partial)
    if flex.full_kv_num_blocks is not None and flex.full_kv_indices is not None:
        whole = _dense(flex.full_kv_num_blocks, flex.full_kv_indices, m, block_kv)
    b, h, i, j = (partial | whole).nonzero().unbind(1)
    cut = partial[b, h, i, j]
    arange = torch.arange(max(block_q, block_kv), device=i.device)
    queries = (i[cut, None] * block_q + arange[:block_q]).clamp(max=n - 1)  # what lies beyond is cut by the engines
    keys = (j[cut, None] * block_kv + arange[:block_kv]).clamp(max=m - 1)
    ask = torch.vmap(torch.vmap(torch.vmap(flex.mask_mod, (None, None, None, 0)), (None, None, 0, None)))
    tiles = torch.zeros(len(queries), block_q, block_kv, dtype=torch.bool, device=i.device)
    for at in range(0, len(queries), 256):
        some = slice(at, at + 256)
        tiles[some] = ask(b[cut][some], h[cut][some], queries[some], keys[some])
    batch, heads = partial.shape[:2]
    if groups is not None and heads not in (1, groups):
        share, _ = divmod(heads, groups)
        first = (h % share) == 0
        if heads % groups or not _agree(partial, whole, tiles, (b, h, i, j), cut, share):
            raise ValueError(
                f"groups must divide the {heads} query heads into groups that keep the same tiles, got groups={groups}"
            )
        tiles, cut = tiles[first[cut]], cut[first]
        b, h, i, j = (x[first] for x in (b, h, i, j))
        h, heads = h // share, groups
    return Listed((batch, heads), (n, m), (block_q, block_kv), b * heads + h, i, j, cut, tiles)


def _dense(counts: Tensor, indices: Tensor, m: int, block_kv: int) -> Tensor:
    """The table (B, H, Tq, Tk) of kept tiles from FlexAttention's numbers and indices."""
    columns = -(-m // block_kv)
    used = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    kept = torch.zeros(
        *counts.shape, columns + 1, dtype=torch.bool, device=counts.device
    )  # the last takes what is unused
    return kept.scatter(-1, indices.long().where(used, columns), True)[..., :columns]


def _agree(partial: Tensor, whole: Tensor, tiles: Tensor, at: tuple[Tensor, ...], cut: Tensor, share: int) -> bool:
    """Whether the query heads of each group keep the same tiles with the same masks."""
    for table in (partial, whole):
        grouped = table.unflatten(1, (-1, share))
        if not bool((grouped == grouped[:, :, :1]).all()):
            return False
    number = torch.zeros(partial.shape, dtype=torch.int64, device=partial.device)
    b, h, i, j = (x[cut] for x in at)
    number[b, h, i, j] = torch.arange(len(b), device=b.device)
    return bool((tiles == tiles[number[b, h - h % share, i, j]]).all())
