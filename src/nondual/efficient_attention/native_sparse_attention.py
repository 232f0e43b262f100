"""Native sparse attention: each query attends to summaries of all blocks, to a few blocks that it chooses, and nearby.

    compressed    every block of keys and values behind the query, each block made into one key and one value
    selected      the tokens of the blocks whose compressed keys the query scored highest
    window        the last tokens

Three gates, made from the input, weigh the three results. Source: Yuan et al. 2025 (2502.11089), sections 3.2 and 3.3.
`SelectedBlocks` is the second branch alone, over mean keys: Lu et al. 2025 (2502.13189), section 2.2.

Where we differ from the first paper: blocks of compression and of selection are the same and do not overlap, so that
its equation 9 is not needed; a gate is one linear map and a sigmoid.

The choice of blocks has no gradient: which blocks are chosen changes in jumps. The compressed keys learn through their
own branch, whose weights are what the blocks are chosen by.

Symbols: x (B, N, E), H query heads of width D on G key/value heads, M positions read so far, C = ⌊M / block⌋ whole
blocks among them, T = ⌈M / block⌉ blocks with the last, unfinished one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.kv_cache import KVCache
from nondual.mixers import as_before_if_raised
from nondual.ops.attention import attention
from nondual.ops.checks import check_tensors
from nondual.ops.flash_attention import flash_attention
from nondual.ops.sparse_attention import BlockMask, Impl, sparse_attention
from nondual.relative_positions import RelativePositions

BRANCHES = ("compressed", "selected", "window")


# --8<-- [start:choose]
def choose_blocks(
    scores: Float[Tensor, "b g n c"], m: int, block: int, count: int, *, first: int = 1, local: int = 2
) -> Bool[Tensor, "b g n t"]:
    """Which blocks each query attends to: the first ones, the last ones, and those with the highest scores.

    No block after the query's own is chosen. Of equal scores the one of the earlier block wins.

    Args:
        scores: (B, G, N, C) of the N last of m queries with the whole blocks; one for all query heads of a key/value
            head, which share their blocks.
        m: M, how many positions there are.
        block: positions in a block.
        count: how many blocks a query attends to, `first` and `local` included; fewer where there are no more.
        first: how many blocks at the start are always chosen.
        local: how many blocks are always chosen that end with the query's own.

    Returns:
        (B, G, N, T), True for the blocks that are chosen.

    Raises:
        ValueError: scores of another number of blocks, or a count that is less than first + local.
    """
    if scores.ndim != 4 or scores.shape[-1] != m // block:
        raise ValueError(f"scores must be (B, G, N, {m // block}) for blocks of {block}, got {tuple(scores.shape)}")
    if first < 0 or local < 1 or count < first + local:
        raise ValueError(f"count must be first + local or more, local 1 or more, got {count}, {first} and {local}")
    n, total = scores.shape[2], -(-m // block)
    index = torch.arange(total, device=scores.device)  # (T,)
    own = torch.arange(m - n, m, device=scores.device)[:, None] // block  # (N, 1)
    seen = index <= own  # (N, T)
    always = (index < first) | (index > own - local)
    ranked = F.pad(scores.detach(), (0, total - scores.shape[-1]))  # an unfinished block has no score
    ranked = ranked.masked_fill(always, torch.inf).masked_fill(~seen, -torch.inf)
    best = ranked.sort(stable=True, dim=-1, descending=True).indices[..., :count]  # stable: the earlier of equal ones
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True) & seen


# --8<-- [end:choose]


def attend_to_blocks(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    chosen: Bool[Tensor, "b g n t"],
    block: int,
    *,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "b h n dv"]:
    """Each query over the tokens of its chosen blocks, up to its own position.

    Args:
        q: queries (B, H, N, D), the last N of M positions.
        k: keys (B, G, M, D).
        v: values (B, G, M, Dv).
        chosen: (B, G, N, T), from `choose_blocks`.
        block: positions in a block.
        scale: factor on q · k; 1/√D where left out.
        impl: the engine of `nondual.ops.sparse_attention`. A tile is one query high, so that "tiles" makes a call for
            each query and key/value head; "reference" takes less time on short sequences, and memory of N · M.
    """
    if not len(chosen):  # an empty batch has no lists of tiles
        chosen = chosen.new_zeros(1, *chosen.shape[1:])
    mask = BlockMask.from_blocks(chosen, (1, block), n=q.shape[2], m=k.shape[2], causal=True)
    return sparse_attention(q, k, v, mask, scale=scale, impl=impl)


@dataclass(frozen=True)
class SelectedBlocks:
    """What `MultiHeadAttention(op=...)` calls: a query's own block, and those whose mean key it scores highest.

        MultiHeadAttention(512, 8, causal=True, op=SelectedBlocks(block=64, count=8))

    It has no parameters, so that a trained module can be given it. Source: Lu et al. 2025 (2502.13189), section 2.2;
    where we differ, the query heads of one key/value head choose together, by the sum of their scores. The choice has
    no gradient.

    Attributes:
        block: positions in a block.
        count: how many blocks a query attends to, its own included.
        first: how many blocks at the start are always chosen; in the paper none.
        scale: factor on q · k; 1/√D where None.
        impl: the engine, as in `attend_to_blocks`.
    """

    block: int = 64
    count: int = 8
    first: int = 0
    scale: float | None = None
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        if self.block < 1 or self.first < 0 or self.count < self.first + 1:
            raise ValueError(
                f"block must be 1 or more and count more than first, got {self.block}, {self.count} and {self.first}"
            )

    def __call__(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Float[Tensor, "b h n dv"]:
        """Attention over the chosen blocks.

        Args:
            q: queries (B, H, N, D), the last N of M positions.
            k: keys (B, G, M, D), H a multiple of G.
            v: values (B, G, M, Dv).
            mask: None.
            causal: True: blocks are chosen among those behind the query.
            dropout: 0.
            return_weights: False.

        Raises:
            ValueError: a mask, a dropout or the weights are asked for, or attention that is not causal.
        """
        if mask is not None or dropout or return_weights or not causal:
            raise ValueError(
                "mask must be None, causal True, dropout 0 and return_weights False for SelectedBlocks, which chooses "
                "blocks behind the query and forms no weights; for those use op=nondual.ops.attention.attention"
            )
        m, whole = k.shape[2], k.shape[2] // self.block
        means = k[:, :, : whole * self.block].unflatten(2, (whole, self.block)).mean(3)  # (B, G, C, D)
        queries = q.unflatten(1, (k.shape[1], -1)).sum(2)  # (B, G, N, D): the sum of the heads' scores
        chosen = choose_blocks(queries @ means.mT, m, self.block, self.count, first=self.first, local=1)
        return attend_to_blocks(q, k, v, chosen, self.block, scale=self.scale, impl=self.impl)


class BlockMLP(nn.Module):
    """A block of keys, or of values, made into one by a network that knows the place of each in the block.

    Args:
        block: how many a block has.
        d_head: D.
    """

    position: nn.Parameter
    linear1: nn.Linear
    linear2: nn.Linear

    def __init__(self, block: int, d_head: int):
        super().__init__()
        self.position = nn.Parameter(0.02 * torch.randn(block, d_head))
        self.linear1 = nn.Linear(block * d_head, 2 * d_head)
        self.linear2 = nn.Linear(2 * d_head, d_head)

    def forward(self, x: Float[Tensor, "*c block d"]) -> Float[Tensor, "*c d"]:
        """(…, block, D) -> (…, D)."""
        return self.linear2(F.gelu(self.linear1((x + self.position).flatten(-2))))


class BlockMean(nn.Module):
    """A block of keys, or of values, made into their mean; it has no parameters.

    Args:
        block: not used.
        d_head: not used.
    """

    def __init__(self, block: int = 1, d_head: int = 1):
        super().__init__()

    def forward(self, x: Float[Tensor, "*c block d"]) -> Float[Tensor, "*c d"]:
        """(…, block, D) -> (…, D)."""
        return x.mean(-2)


@dataclass(eq=False)
class NativeSparseCache:
    """What native sparse attention has read. It grows: the selected branch keeps every key, the compressed a block's.

    Made by `NativeSparseAttention.new_cache`.

    Attributes:
        compressed: keys and values of the whole blocks, C of them.
        selected: keys and values of all M positions.
        unfinished: keys and values of the compressed branch in the block that is not whole yet, (B, G, < block, D).
        window: keys and values of the last positions, (B, G, < window, D).
    """

    compressed: KVCache
    selected: KVCache
    unfinished: tuple[Tensor, Tensor]
    window: tuple[Tensor, Tensor]

    @property
    def length(self) -> int:
        """M, how many positions were read."""
        return self.selected.length

    def select(self, rows: Int[Tensor, " r"]) -> "NativeSparseCache":
        """A cache of its own for these rows of the batch, in this order; a row may be taken more than once."""
        (uk, uv), (wk, wv) = self.unfinished, self.window
        kept = self.compressed.select(rows), self.selected.select(rows)
        return NativeSparseCache(*kept, (uk[rows], uv[rows]), (wk[rows], wv[rows]))


class NativeSparseAttention(nn.Module):
    """Compressed, selected and window attention, weighed by gates: a causal mixer x (B, N, E) -> (B, N, E).

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(NativeSparseAttention(64, 4, block=16, selected=4), 64))

    Each branch has keys and values of its own, so that none learns for another (section 3.3.3). The queries are shared.
    Time and memory of the compressed branch grow with N · M / block, since its weights are formed to choose by.

    Args:
        d_model: width E.
        n_heads: H.
        n_kv_heads: G, a divisor of H; H where left out.
        d_head: D; E / H where left out.
        block: positions in a block, of compression and of selection.
        selected: how many blocks a query attends to: the first, its own, the one before, and those of highest scores.
        window: how many positions the third branch sees, the query's own included.
        compress: makes a module (…, block, D) -> (…, D), given block and D: `BlockMLP` or `BlockMean`; one is made for
            keys and one for values.
        positions: turns queries and keys of the selected and the window branch, such as `Rotary(d_head)`. The
            compressed branch compares them unturned: `BlockMLP` knows a token's place in its block, and nothing the
            place of the block.
        bias: whether the projections have one.
        impl: the engine of the selected branch, as in `attend_to_blocks`.

    Raises:
        ValueError: head counts that do not divide, a block or window below 1, fewer than 3 selected blocks, or
            positions that do not turn heads of this width, or that add a bias.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    block: int
    selected: int
    window: int
    positions: RelativePositions | None
    impl: Impl
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    gate_proj: nn.Linear
    compress_k: nn.Module
    compress_v: nn.Module
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        block: int = 64,
        selected: int = 16,
        window: int = 512,
        compress: Callable[[int, int], nn.Module] = BlockMLP,
        positions: RelativePositions | None = None,
        bias: bool = False,
        impl: Impl = "auto",
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, both 1 or more, got {n_heads} and {n_kv_heads}"
            )
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; or give d_head")
        if block < 1 or window < 1:
            raise ValueError(f"block and window must be 1 or more, got {block} and {window}")
        if selected < 3:
            raise ValueError(
                f"selected must be 3 or more, for the first block, the query's own and the one before, got {selected}"
            )
        d_head = d_model // n_heads if d_head is None else d_head
        if positions is not None:
            _check_positions(positions, n_heads, d_head)
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.block, self.selected, self.window = block, selected, window
        self.positions, self.impl = positions, impl
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_model, len(BRANCHES) * n_kv_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_model, len(BRANCHES) * n_kv_heads * d_head, bias=bias)
        self.gate_proj = nn.Linear(d_model, len(BRANCHES) * n_heads)
        self.compress_k, self.compress_v = compress(block, d_head), compress(block, d_head)
        self.out_proj = nn.Linear(n_heads * d_head, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "b n e"], *, cache: NativeSparseCache | None = None) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); no output depends on a later input.

        Args:
            x: (B, N, E).
            cache: what is remembered of the positions before x; it is brought up to date, unless this call raises. It
                is for inference: no gradient goes through it.

        Raises:
            TypeError: x is not a Tensor, or cache is not a NativeSparseCache.
            ValueError: x of another rank or width, or a cache that is full or was made for another batch or module.
            RuntimeError: a cache while gradients are recorded.
        """
        self._check(x, cache)
        start = 0 if cache is None else cache.length
        # --8<-- [start:branches]
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.n_heads)
        parts = {"r": len(BRANCHES), "g": self.n_kv_heads}
        k_cmp, k_slc, k_win = rearrange(self.k_proj(x), "b n (r g d) -> r b g n d", **parts)
        v_cmp, v_slc, v_win = rearrange(self.v_proj(x), "b n (r g d) -> r b g n d", **parts)
        gates = rearrange(self.gate_proj(x).sigmoid(), "b n (r h) -> r b h n 1", r=len(BRANCHES))
        turned = q
        if self.positions is not None:
            turned, k_slc, k_win = (self.positions.turn(each, start) for each in (q, k_slc, k_win))
        with as_before_if_raised(cache):
            if cache is not None:
                k_slc, v_slc = cache.selected.append(k_slc, v_slc)
                k_win, v_win = self._last(cache, k_win, v_win)
            blocks_k, blocks_v = self._compressed(cache, k_cmp, v_cmp)  # (B, G, C, D)
            m = start + x.shape[1]
            out, weights = attention(
                q, blocks_k, blocks_v, mask=self._behind(x.shape[1], m, x.device), return_weights=True
            )
            scores = weights.detach().unflatten(1, (self.n_kv_heads, -1)).sum(2)  # (B, G, N, C)
            chosen = choose_blocks(scores, m, self.block, self.selected)
            results = (
                out,
                attend_to_blocks(turned, k_slc, v_slc, chosen, self.block, impl=self.impl),
                flash_attention(turned, k_win, v_win, window=self.window),
            )
            y = sum(gate * result for gate, result in zip(gates, results))
            # --8<-- [end:branches]
            return self.out_proj(rearrange(y, "b h n d -> b n (h d)"))

    def _behind(self, n: int, m: int, device: torch.device) -> Bool[Tensor, "n c"]:
        """True where a block lies wholly behind a query, the query's own position included."""
        last = torch.arange(m // self.block, device=device) * self.block + self.block - 1
        return last <= torch.arange(m - n, m, device=device)[:, None]

    def _compressed(self, cache: NativeSparseCache | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """One key and one value for each whole block so far, (B, G, C, D)."""
        if cache is not None:
            k, v = (torch.cat([before, now], 2) for before, now in zip(cache.unfinished, (k, v)))
        whole = k.shape[2] // self.block
        end = whole * self.block
        made = [
            compress(each[:, :, :end].unflatten(2, (whole, self.block)))
            for compress, each in ((self.compress_k, k), (self.compress_v, v))
        ]
        if cache is None:
            return made[0], made[1]
        cache.unfinished = k[:, :, end:].clone(), v[:, :, end:].clone()
        return cache.compressed.append(*made)

    def _last(self, cache: NativeSparseCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that a window over the new positions can see; what the next call needs is kept."""
        k, v = (torch.cat([before, now], 2) for before, now in zip(cache.window, (k, v)))
        first = max(0, k.shape[2] - self.window + 1)
        cache.window = k[:, :, first:].clone(), v[:, :, first:].clone()
        return k, v

    def new_cache(self, batch: int, max_len: int | None = None) -> NativeSparseCache:
        """An empty cache, in the dtype and on the device of the key projection.

        Args:
            batch: B.
            max_len: how many positions it can hold.

        Raises:
            ValueError: max_len was left out, or is below 1.
        """
        if max_len is None or max_len < 1:
            raise ValueError(f"max_len must be given, 1 or more: every key is kept to be selected, got {max_len}")
        like = self.k_proj.weight
        made = {"dtype": like.dtype, "device": like.device}
        empty = torch.zeros(batch, self.n_kv_heads, 0, self.d_head, **made)
        return NativeSparseCache(
            KVCache(batch, self.n_kv_heads, max_len // self.block, self.d_head, **made),
            KVCache(batch, self.n_kv_heads, max_len, self.d_head, **made),
            (empty, empty),
            (empty, empty),
        )

    def _check(self, x: Tensor, cache: object) -> None:
        check_tensors({"x": x})
        width = self.q_proj.in_features
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(f"x must be (B, N, {width}), got {tuple(x.shape)}")
        if cache is None:
            return
        if not isinstance(cache, NativeSparseCache):
            kind = type(cache).__name__
            raise TypeError(f"cache must be a NativeSparseCache, from this module's new_cache, got {kind}")
        keys = cache.selected.keys
        expected, most = (len(x), self.n_kv_heads, self.d_head), keys.shape[2] // self.block
        if (*keys.shape[:2], keys.shape[3]) != expected or cache.compressed.keys.shape[2] != most:
            raise ValueError(
                f"cache must be this module's own, for a batch of {len(x)}, got keys of {tuple(keys.shape)} and "
                f"{cache.compressed.keys.shape[2]} blocks; make one with new_cache({len(x)}, max_len)"
            )

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, *, cache: NativeSparseCache | None = None) -> Tensor: ...


def _check_positions(positions: Any, n_heads: int, d_head: int) -> None:
    if not isinstance(positions, RelativePositions) or type(positions).bias is not RelativePositions.bias:
        raise ValueError(
            f"positions must turn queries and keys, as Rotary(d_head) does, got {type(positions).__name__}: a bias "
            "cannot reach blocks of which no weights are formed"
        )
    if why := positions.refuses(n_heads, d_head):
        raise ValueError(why)
