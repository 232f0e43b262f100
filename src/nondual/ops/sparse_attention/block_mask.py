"""Which tiles of the scores are computed: a mask kept as lists of tiles, of which the empty ones are left out.

Source: block-sparse attention, Child et al. 2019 (1904.10509), section 5.5; Dao et al. 2022 (2205.14135), section 3.3.
Symbols: B batch, H query heads, G key/value heads, N queries, M keys; a tile is block_q queries by block_kv keys, there
are Tq = ⌈N / block_q⌉ rows and Tk = ⌈M / block_kv⌉ columns of tiles, K tiles are kept, and U masks of one tile occur.

    the mask, tiles of 2 x 2     its tiles          by rows           by columns
    1 0 0 0 0 0                  a . .              0: 0 (a)          0: 0 (a), 1 (w)
    1 1 0 0 0 0                  w a .              1: 0 (w), 1 (a)   1: 1 (a), 2 (w)
    1 1 1 0 0 0                  . w a              2: 1 (w), 2 (a)   2: 2 (a)
    1 1 1 1 0 0
    0 0 1 1 1 0                  w is whole; a is the tile mask [[1, 0], [1, 1]], kept once
    0 0 1 1 1 1

A tile is empty, whole, or partly allowed. Empty tiles are in no list, and nothing of them is read. For a partly allowed
tile the list names one of the U tile masks: a window has two or three however long the sequence is. So memory grows
with K, and never with N · M.

The queries are the last N of the M positions: query i stands at position i + M - N among the keys.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from nondual.ops.checks import check_tensors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

WHOLE = -1  # the kind of a tile in which every query may attend to every key

Predicate = Callable[[Tensor, Tensor], Tensor]
"""Which keys a query may attend to: positions of queries (n, 1) and of keys (m,), to bool (n, m)."""


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """The kept tiles of a mask (Bm, Gm, N, M), listed by row and by column.

    Made by `from_mask`, `from_predicate` or `from_blocks`. The two lists hold the same tiles. Bm is 1 or B, and Gm is
    1 or G: all query heads that share a key/value head share its tiles.

    Attributes:
        n: N, the queries.
        m: M, the keys.
        block_q: queries in a tile; the last row of tiles may be cut by N.
        block_kv: keys in a tile; the last column of tiles may be cut by M.
        row_start: (Bm, Gm, Tq + 1) int32. The tiles of row i are the entries row_start[b, g, i] to
            row_start[b, g, i + 1] of `columns` and `row_kinds`, which hold the lists of all b and g one after another.
        columns: (K,) int32, the column of each kept tile, rising within a row.
        row_kinds: (K,) int32, -1 (`WHOLE`) where the tile is whole, else which of `tile_masks` applies.
        col_start: (Bm, Gm, Tk + 1) int32, as row_start, for the list by columns.
        rows: (K,) int32, the row of each kept tile, rising within a column.
        col_kinds: (K,) int32, as row_kinds, in the order of `rows`.
        tile_masks: (U, block_q, block_kv) bool, True where attending is allowed. What lies beyond N or M says nothing:
            an engine cuts every tile at N and M, whole ones too.
    """

    n: int
    m: int
    block_q: int
    block_kv: int
    row_start: Int[Tensor, "bm gm tq+1"]
    columns: Int[Tensor, " kept"]
    row_kinds: Int[Tensor, " kept"]
    col_start: Int[Tensor, "bm gm tk+1"]
    rows: Int[Tensor, " kept"]
    col_kinds: Int[Tensor, " kept"]
    tile_masks: Bool[Tensor, "u bq bk"]

    def __post_init__(self) -> None:
        check_tensors({name: getattr(self, name) for name in TENSORS})
        _check_sizes(self.n, self.m, (self.block_q, self.block_kv))
        if self.row_start.ndim != 3:
            raise ValueError(f"row_start must be (Bm, Gm, Tq + 1), got {tuple(self.row_start.shape)}")
        (bm, gm, _), kept = self.row_start.shape, self.columns.shape[:1]
        tq, tk = self.tiles
        expected = {
            "row_start": (bm, gm, tq + 1),
            "columns": (*kept,),
            "row_kinds": (*kept,),
            "col_start": (bm, gm, tk + 1),
            "rows": (*kept,),
            "col_kinds": (*kept,),
            "tile_masks": (*self.tile_masks.shape[:1], self.block_q, self.block_kv),
        }
        for name, shape in expected.items():
            x, dtype = getattr(self, name), torch.bool if name == "tile_masks" else torch.int32
            if tuple(x.shape) != shape or x.dtype != dtype or x.device != self.device:
                raise ValueError(
                    f"{name} must be {shape}, {dtype} on {self.device}, got {tuple(x.shape)}, {x.dtype} on {x.device}; "
                    "BlockMask.from_mask makes all lists"
                )
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_lists(self)

    # --- made from ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "... n m"], block: int | tuple[int, int] = 64) -> "BlockMask":
        """The tiles of a mask that is held whole.

        Args:
            mask: (N, M) or (Bm, Gm, N, M), True where attending is allowed.
            block: the side of a tile, or (block_q, block_kv).

        Raises:
            TypeError: mask is not a tensor.
            ValueError: a mask of another rank or dtype, or a block below 1.
        """
        check_tensors({"mask": mask})
        if mask.dtype != torch.bool or mask.ndim not in (2, 4):
            raise ValueError(
                f"mask must be torch.bool (N, M) or (Bm, Gm, N, M), True where attending is allowed, got {mask.dtype} "
                f"{tuple(mask.shape)}"
            )
        mask = mask if mask.ndim == 4 else mask[None, None]
        bm, gm, n, m = mask.shape
        block_q, block_kv = _check_sizes(n, m, _pair(block))
        every = torch.arange(_cdiv(m, block_kv), device=mask.device)
        strips = (
            (every, mask[b, g, i : i + block_q]) for b in range(bm) for g in range(gm) for i in range(0, n, block_q)
        )
        return _from_strips(strips, (bm, gm), n, m, _pair(block), mask.device)

    @classmethod
    def from_predicate(
        cls,
        n: int,
        m: int | None,
        predicate: Predicate,
        block: int | tuple[int, int] = 64,
        *,
        spans: Callable[[int, int], Iterable[tuple[int, int]]] | None = None,
        device: torch.device | str | None = None,
    ) -> "BlockMask":
        """The tiles of a mask that is a function of positions, and never held whole.

        The function is asked about one row of tiles at a time, so that memory is block_q · M beside the lists. It is
        asked about every pair once: time grows with N · M, by some 5 ns a pair on one core, so that 16,384 positions
        take a second or two. With spans only the tiles that these touch are asked about.

        Args:
            n: N.
            m: M; N where left out.
            predicate: given the positions of queries (r, 1) and of keys (M,), both int64, where attending is allowed:
                bool (r, M), or what broadcasts to it. Queries stand at the last N of the M positions.
            block: the side of a tile, or (block_q, block_kv).
            spans: given the positions of the first and the last query of a row of tiles, ranges of keys, each a first
                one and the one after its last, outside of which no query between them may attend to anything.
            device: where the lists are kept.

        Raises:
            ValueError: a negative length, a block below 1, or a predicate that gives no booleans.
        """
        m = n if m is None else m
        block_q, block_kv = _check_sizes(n, m, _pair(block))
        device, tk = torch.device(device or "cpu"), _cdiv(m, block_kv)
        within = torch.arange(block_kv, device=device)

        def strips() -> Iterable[tuple[Tensor, Tensor]]:
            for start in range(m - n, m, block_q):
                stop = min(m, start + block_q)
                asked = {
                    column
                    for first, last in (((0, m),) if spans is None else spans(start, stop - 1))
                    for column in range(max(0, first) // block_kv, min(tk, _cdiv(last, block_kv)))
                }
                columns = torch.tensor(sorted(asked), dtype=torch.int64, device=device)
                keys = (columns[:, None] * block_kv + within).flatten()
                keys = keys[: len(keys) - block_kv * tk + m] if tk - 1 in asked else keys
                allowed = predicate(torch.arange(start, stop, device=device)[:, None], keys)
                if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
                    got = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
                    raise ValueError(f"predicate must give a boolean tensor, got {got}")
                yield columns, allowed.expand(stop - start, len(keys))

        return _from_strips(strips(), (1, 1), n, m, _pair(block), device)

    @classmethod
    def from_blocks(
        cls,
        kept: Bool[Tensor, "bm gm tq tk"],
        block: int | tuple[int, int] = 64,
        *,
        n: int | None = None,
        m: int | None = None,
        causal: bool = False,
    ) -> "BlockMask":
        """Whole tiles, as learned selection chooses them.

        Args:
            kept: (B, G, Tq, Tk) or (Tq, Tk), True for the tiles to be computed. B and G may be 1.
            block: the side of a tile, or (block_q, block_kv).
            n: N, where the last row of tiles is cut; Tq · block_q where left out.
            m: M, where the last column of tiles is cut; Tk · block_kv where left out.
            causal: no query sees a later key, aligned at the end: kept tiles beyond the diagonal are dropped, and those
                on it get their tile mask.

        Raises:
            TypeError: kept is not a tensor.
            ValueError: kept of another rank or dtype, or lengths that do not have these numbers of tiles.
        """
        check_tensors({"kept": kept})
        if kept.dtype != torch.bool or kept.ndim not in (2, 4):
            raise ValueError(
                f"kept must be torch.bool (B, G, Tq, Tk) or (Tq, Tk), got {kept.dtype} {tuple(kept.shape)}"
            )
        kept = kept if kept.ndim == 4 else kept[None, None]
        block_q, block_kv = _pair(block)
        tq, tk = kept.shape[2:]
        n, m = tq * block_q if n is None else n, tk * block_kv if m is None else m
        _check_sizes(n, m, (block_q, block_kv))
        if (_cdiv(n, block_q), _cdiv(m, block_kv)) != (tq, tk):
            tiles = (_cdiv(n, block_q), _cdiv(m, block_kv))
            raise ValueError(
                f"kept must have a row and a column for each tile, {tiles} for N={n}, M={m} and tiles of "
                f"{block_q} x {block_kv}, got {(tq, tk)}"
            )
        b, g, i, j = kept.nonzero().unbind(1)
        kinds, masks = torch.full_like(i, WHOLE), kept.new_empty(0, block_q, block_kv)
        if causal:
            ahead = i * block_q + (m - n) - j * block_kv  # key c is allowed to query r where c - r <= ahead
            seen = ahead > -block_q
            b, g, i, j, ahead = (x[seen] for x in (b, g, i, j, ahead))
            cut = ahead < block_kv - 1
            steps, which = ahead[cut].unique(return_inverse=True)
            kinds = torch.full_like(i, WHOLE)
            kinds[cut] = which
            r, c = (torch.arange(size, device=kept.device) for size in (block_q, block_kv))
            masks = c - r[:, None] <= steps[:, None, None]
        return _assemble(kept.shape[:2], n, m, (block_q, block_kv), b * kept.shape[1] + g, i, j, kinds, masks)

    @classmethod
    def from_flex(cls, flex: "FlexBlockMask", groups: int | None = None) -> "BlockMask":
        """The tiles of a mask of torch's FlexAttention; its positions count from 0 for queries and keys alike.

        Args:
            flex: made by `torch.nn.attention.flex_attention.create_block_mask`.
            groups: G, where flex has a list for each of the H query heads and G is smaller.

        Raises:
            ValueError: query heads of one key/value head that keep other tiles, which a BlockMask cannot say.
        """
        from nondual.ops.sparse_attention.flex import listed

        lead, lengths, block, of, i, j, partial, tiles = listed(flex, groups)
        distinct = _Distinct(block, of.device)
        kinds = torch.full_like(i, WHOLE)
        kinds[partial] = distinct.kinds(tiles)
        return _assemble(lead, *lengths, block, of, i, j, kinds, distinct.stacked())

    # --- read ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.row_start.device

    @property
    def batch(self) -> int:
        """Bm, 1 or B."""
        return self.row_start.shape[0]

    @property
    def groups(self) -> int:
        """Gm, 1 or G."""
        return self.row_start.shape[1]

    @property
    def tiles(self) -> tuple[int, int]:
        """(Tq, Tk)."""
        return _cdiv(self.n, self.block_q), _cdiv(self.m, self.block_kv)

    @property
    def kept_tiles(self) -> int:
        """K, over all Bm and Gm."""
        return self.columns.shape[0]

    @property
    def density(self) -> float:
        """The share of the N · M scores that is computed: all those in kept tiles, which N and M cut."""
        if not self.n or not self.m or not self.batch or not self.groups:
            return 0.0
        _, _, i, j = self._entries()
        high = (self.n - i * self.block_q).clamp(max=self.block_q)
        wide = (self.m - j * self.block_kv).clamp(max=self.block_kv)
        return float((high * wide).sum()) / (self.batch * self.groups * self.n * self.m)

    @property
    def allowed_pairs(self) -> int:
        """How many pairs of a query and a key the mask allows, over all Bm and Gm."""
        _, _, i, j = self._entries()
        high = (self.n - i * self.block_q).clamp(max=self.block_q)
        wide = (self.m - j * self.block_kv).clamp(max=self.block_kv)
        within = self.tile_masks.long().cumsum(1).cumsum(2)  # in the first rows and columns of each tile mask
        whole = self.row_kinds == WHOLE
        partly = within[self.row_kinds[~whole].long(), high[~whole] - 1, wide[~whole] - 1]
        return int((high * wide)[whole].sum() + partly.sum())

    def kinds(self) -> Int[Tensor, "bm gm tq tk"]:
        """The kind of every tile, int32: -2 empty, -1 whole, else which tile mask. Memory grows with Tq · Tk."""
        table = torch.full((self.batch, self.groups, *self.tiles), -2, dtype=torch.int32, device=self.device)
        table[self._entries()] = self.row_kinds
        return table

    def mask(self) -> Bool[Tensor, "bm gm n m"]:
        """The mask whole, (Bm, Gm, N, M): for comparison, since its memory grows with N · M."""
        (tq, tk), kinds = self.tiles, self.kinds()
        shape = (1, self.block_q, self.block_kv)
        empty, whole = (torch.full(shape, value, dtype=torch.bool, device=self.device) for value in (False, True))
        tiles = torch.cat([empty, whole, self.tile_masks])[kinds.long() + 2]  # (Bm, Gm, Tq, Tk, block_q, block_kv)
        dense = tiles.transpose(3, 4).reshape(self.batch, self.groups, tq * self.block_q, tk * self.block_kv)
        return dense[:, :, : self.n, : self.m]

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same with its lists on another device."""
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def to_flex(self, heads: int | None = None) -> "FlexBlockMask":
        """The same mask for `torch.nn.attention.flex_attention.flex_attention`.

        Args:
            heads: H, the query heads; needed where Gm is above 1, since FlexAttention lists tiles by query head.

        Raises:
            ValueError: heads left out or no multiple of Gm, where Gm is above 1.
        """
        from nondual.ops.sparse_attention.flex import to_flex

        return to_flex(self, heads)

    def _entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, g, row and column of each kept tile, (K,) int64 each, in the order of `columns`."""
        tq = self.tiles[0]
        counts = self.row_start.diff(dim=-1).flatten().long()
        of = torch.arange(counts.numel(), device=self.device).repeat_interleave(counts, output_size=self.kept_tiles)
        lead = of // max(tq, 1)
        return lead // max(self.groups, 1), lead % max(self.groups, 1), of % max(tq, 1), self.columns.long()


TENSORS = ("row_start", "columns", "row_kinds", "col_start", "rows", "col_kinds", "tile_masks")

# --- helpers ---------------------------------------------------------------------------------------------------------


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pair(block: int | tuple[int, int]) -> tuple[int, int]:
    return block if isinstance(block, tuple) else (block, block)


def _check_sizes(n: int, m: int, block: Any) -> tuple[int, int]:
    if n < 0 or m < 0:
        raise ValueError(f"n and m must be 0 or more, got n={n}, m={m}")
    if len(block) != 2 or not all(isinstance(size, int) and size >= 1 for size in block):
        raise ValueError(f"block must be an integer of 1 or more, or two of them (block_q, block_kv), got {block}")
    return block


def _check_lists(mask: BlockMask) -> None:
    """Refuse lists that point out of range, do not rise, or hold other tiles by column than by row."""
    tables = []
    for start, listed, kinds, most in (
        (mask.row_start, mask.columns, mask.row_kinds, mask.tiles[1]),
        (mask.col_start, mask.rows, mask.col_kinds, mask.tiles[0]),
    ):
        flat = F.pad(start[..., :-1].flatten(), (0, 1), value=len(listed)).long()
        ends = F.pad(start[..., 0].flatten()[1:], (0, 1), value=len(listed))  # where the next list begins
        steps = flat.diff()
        if not torch.equal(start[..., -1].flatten(), ends) or int(flat[0]) != 0 or bool((steps < 0).any()):
            raise ValueError("row_start and col_start must rise from 0 to the number of kept tiles")
        if len(listed) and not (0 <= int(listed.min()) and int(listed.max()) < most):
            raise ValueError(f"columns and rows must lie in their {most} tiles, got {listed.min()} to {listed.max()}")
        if len(kinds) and not (int(kinds.min()) >= WHOLE and int(kinds.max()) < len(mask.tile_masks)):
            raise ValueError(
                f"kinds must be -1 (whole) or one of {len(mask.tile_masks)} tile masks, got {kinds.unique()}"
            )
        of = torch.arange(len(steps)).repeat_interleave(steps)
        if bool(((of.diff() == 0) & (listed.diff() <= 0)).any()):
            raise ValueError("columns must rise within each row of tiles, and rows within each column")
        tables.append((of, listed.long(), kinds))
    (of_row, columns, row_kinds), (of_col, rows, col_kinds) = tables
    tq, tk = max(mask.tiles[0], 1), max(mask.tiles[1], 1)
    by_row = (of_row // tq * tk + columns) * tq + of_row % tq  # one number for a tile, in the order of the columns
    by_col = of_col * tq + rows
    order = by_row.argsort()
    if not (torch.equal(by_row[order], by_col) and torch.equal(row_kinds[order], col_kinds)):
        raise ValueError("the lists by row and by column must hold the same tiles; BlockMask.from_mask makes both")


class _Distinct:
    """The tile masks met so far, each kept once."""

    def __init__(self, block: tuple[int, int], device: torch.device):
        self.block, self.device = block, device
        self.found: dict[bytes, int] = {}
        self.masks: list[Tensor] = []

    def kinds(self, tiles: Tensor) -> Tensor:
        """Which of the masks each of these tiles (P, block_q, block_kv) is, (P,) int64; new ones are added."""
        which = []
        for tile, bits in zip(tiles, np.packbits(tiles.flatten(1).cpu().numpy(), axis=1)):
            name = bits.tobytes()
            if name not in self.found:
                self.found[name] = len(self.masks)
                self.masks.append(tile.clone())
            which.append(self.found[name])
        return torch.tensor(which, dtype=torch.int64, device=self.device)

    def stacked(self) -> Tensor:
        """(U, block_q, block_kv)."""
        empty = torch.empty(0, *self.block, dtype=torch.bool, device=self.device)
        return torch.stack(self.masks) if self.masks else empty


def _from_strips(
    strips: Iterable[tuple[Tensor, Tensor]], lead: tuple[int, int], n: int, m: int, block: tuple[int, int],
    device: torch.device,
) -> BlockMask:  # fmt: skip
    """A BlockMask from the rows of tiles of all (Bm, Gm), one after another.

    Each is the columns of tiles that it holds (T,), and bool (rows, keys) of at most block_q rows and of the keys in
    these columns; nothing is allowed in the others.
    """
    (block_q, block_kv), tq, tk = block, _cdiv(n, block[0]), _cdiv(m, block[1])
    width = torch.arange(tk, device=device).mul(-block_kv).add(m).clamp(max=block_kv)  # keys in each column of tiles
    distinct = _Distinct(block, device)
    entries: list[tuple[Tensor, Tensor, Tensor]] = []
    for at, (asked, strip) in enumerate(strips):
        rows = strip.shape[0]
        strip = F.pad(strip, (0, -strip.shape[1] % block_kv, 0, block_q - rows))
        tiles = strip.view(block_q, -1, block_kv).transpose(0, 1)
        count = tiles.sum((1, 2))
        held = count.nonzero()[:, 0]
        columns, kinds = asked[held], torch.full_like(held, WHOLE)
        partial = count[held] < rows * width[columns]
        kinds[partial] = distinct.kinds(tiles[held[partial]])
        entries.append((torch.full_like(columns, at), columns, kinds))
    empty = torch.empty(0, dtype=torch.int64, device=device)
    at, columns, kinds = (torch.cat(x) for x in zip(*entries)) if entries else (empty, empty, empty)
    return _assemble(lead, n, m, block, at // max(tq, 1), at % max(tq, 1), columns, kinds, distinct.stacked())


def _assemble(
    lead: Iterable[int], n: int, m: int, block: tuple[int, int], of: Tensor, i: Tensor, j: Tensor, kinds: Tensor,
    masks: Tensor,
) -> BlockMask:  # fmt: skip
    """A BlockMask from its tiles, ordered by row: `of` (K,) counts the pairs (b, g), i and j are row and column."""
    (bm, gm), tq, tk = lead, _cdiv(n, block[0]), _cdiv(m, block[1])
    order = (of * tk + j).argsort(stable=True)
    lists = (i[order], kinds[order])
    starts = []
    for line, lines in ((i, tq), (j, tk)):
        counts = torch.bincount(of * lines + line, minlength=bm * gm * lines)[: bm * gm * lines]
        ends = F.pad(counts.cumsum(0), (1, 0))
        first = torch.arange(bm * gm, device=of.device)[:, None] * lines
        starts.append(ends[first + torch.arange(lines + 1, device=of.device)].view(bm, gm, lines + 1).int())
    return BlockMask(n, m, *block, starts[0], j.int(), kinds.int(), starts[1], lists[0].int(), lists[1].int(), masks)
