"""Flash attention in plain torch: exact attention one tile at a time, slow, in any dtype, wherever torch runs.

Source: Dao 2023 (2307.08691), Algorithm 1 (forward) and Algorithm 2 (backward); the numbers in the code are theirs.
They refine Algorithms 1 and 4 of Dao et al. 2022 (2205.14135), whose outer loop is over the keys, so that
they rescale and write O once for each tile of keys; the recurrences, that paper's section 3.1, are the same.

Symbols: B batch, H query heads, G key/value heads, N queries, M keys, D head width; a tile of queries is Q_i, a tile of
keys K_j; S scores, P their softmax, m a row's highest score so far, l (the papers' ℓ) its sum of exponentials so far,
L = m + log l their log-sum-exp. Where we differ: M may differ from N, heads may be grouped, tiles that causality or a
window leaves empty are never visited, scores may decay by forget gates (`nondual.ops.flash_attention.forget`), and a
row with nothing to attend gives 0 with L = -inf.

N x M is never held: beyond input and output, memory is one tile of scores and a few rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import autocast_off, without_autocast
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.flash_attention.forget import Forget, between
from nondual.ops.impl import refuses_transforms


@dataclass
class Count:
    """What a run did: pass one in, and read it afterwards. Forward and backward add to the same numbers.

    Attributes:
        tiles: tiles of scores visited, for each batch and head.
        scores: scores computed, masked ones in a visited tile included.
        multiplications: those of the matrix products alone: D + Dv for a score forward, 3 D + 2 Dv backward.
        loaded: numbers read from the large memory: tiles of q, k, v and, backward, of the output and its gradient.
        stored: numbers written to it.
    """

    tiles: int = 0
    scores: int = 0
    multiplications: int = 0
    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Step:
    """What is on the chip after one tile of the forward pass.

    Attributes:
        queries: which rows the tile covers.
        keys: which columns it covers.
        scores: S, (B, H, queries, keys), -inf where masked.
        highest: m, (B, H, queries).
        total: l, (B, H, queries).
        accumulator: the output before its division by l, (B, H, queries, Dv).
    """

    queries: range
    keys: range
    scores: Tensor
    highest: Tensor
    total: Tensor
    accumulator: Tensor


def flash_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m dv"],
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float = 1.0,
    tile: tuple[int, int] = (128, 128),
    count: Count | None = None,
    trace: Callable[[Step], None] | None = None,
    forget: Forget | None = None,
) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h n"]]:
    """Attention and its log-sum-exp, tile by tile; `nondual.ops.flash_attention` has checked the inputs.

    Args:
        q: queries (B, H, N, D), any floating dtype; computed in float32 or better.
        k: keys (B, G, M, D).
        v: values (B, G, M, Dv).
        causal: each query sees its own position and those before, aligned at the end.
        window: each query sees the last `window` keys, its own included; implies causal.
        scale: factor on q · k.
        tile: how many queries and how many keys a tile has.
        count: what was computed, forward and backward, is added to it.
        trace: called after every tile of the forward pass with what is on the chip then.
        forget: forget gates, with causal.

    Returns:
        out (B, H, N, Dv) in q's dtype, and lse (B, H, N), natural, in float32 or better.

    Raises:
        RuntimeError: when differentiated twice, in forward mode, or under a transform of torch.func;
            `nondual.ops.attention.attention(impl="reference")` can be.
    """
    refused = refuses_transforms(q, k, v, *(forget or ()))
    if refused:
        raise RuntimeError(
            f"reference.flash_attention {refused}; use nondual.ops.attention.attention(impl='reference')"
        )
    causal = causal or window is not None
    if torch.compiler.is_compiling() and count is None and trace is None:
        if forget is not None:
            return _forgetting(q, k, v, *forget, window or 0, float(scale), *tile)[:2]
        return _forward(q, k, v, causal, window or 0, float(scale), *tile)[:2]
    visible = Visible(q.shape[2], k.shape[2], causal, window, q.device)
    return _FlashAttention.apply(q, k, v, *(forget or (None, None)), visible, scale, tile, count, trace)


@dataclass(frozen=True)
class Visible:
    """Which keys a query sees: 0 ≤ i + (M - N) - j, and < window. Asked for one tile at a time."""

    n: int
    m: int
    causal: bool
    window: int | None
    device: torch.device

    def span(self, queries: range) -> range:
        """From the first to the last key that any of these queries sees."""
        first, last = 0, self.m
        if self.causal:
            last = max(0, min(self.m, queries[-1] + self.m - self.n + 1))
        if self.window is not None:
            first = max(0, queries[0] + self.m - self.n - self.window + 1)
        return range(first, last)

    def positions(self, queries: range) -> Tensor:
        """Where these queries stand among the keys, (queries,); below 0 where N > M and they see none."""
        return torch.arange(queries.start, queries.stop, device=self.device) + self.m - self.n

    def mask(self, queries: range, keys: range) -> Tensor:
        """(queries, keys), True where allowed."""
        i = self.positions(queries)[:, None]
        j = torch.arange(keys.start, keys.stop, device=self.device)
        allowed = torch.ones(len(queries), len(keys), dtype=torch.bool, device=self.device)
        if self.causal:
            allowed &= j <= i
        if self.window is not None:
            allowed &= j > i - self.window
        return allowed


def tiles(of: range, size: int) -> Iterator[range]:
    """Tiles of `size`, aligned to its multiples and cut at the end, that cover a range."""
    for start in range(of.start // size * size, of.stop, size):
        yield range(start, min(start + size, of.stop))


def forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float, tile: tuple[int, int],
    count: Count | None = None, trace: Callable[[Step], None] | None = None, forget: Forget | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Algorithm 1: for each tile of queries, over all tiles of keys. Gives O, L, and what rounding took from L."""
    wide = accumulation_dtype(q.dtype)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    lse, rest = (torch.empty(q.shape[:3], dtype=wide, device=q.device) for _ in range(2))
    for queries in tiles(range(visible.n), tile[0]):  # 3: for each Q_i
        q_i = _load(q, queries, wide, count)  # 4
        o = q_i.new_zeros(*q_i.shape[:3], v.shape[-1])  # 5: O_i, l_i and m_i start at 0, 0 and -inf
        l = q_i.new_zeros(q_i.shape[:3])
        m = torch.full_like(l, -torch.inf)
        # --8<-- [start:forward]
        for keys in tiles(visible.span(queries), tile[1]):  # 6: for each K_j
            k_j, v_j = (_share(_load(x, keys, wide, count), q) for x in (k, v))  # 7
            allowed = visible.mask(queries, keys)
            s = _scores(q_i, k_j, scale, allowed, count)  # 8: S = Q_i K_jᵀ
            s = _decayed(s, forget, visible, queries, keys)  # by forget gates, if any
            m_new = torch.maximum(m, s.amax(-1))  # 9: m; P̃ = exp(S - m); l
            # A row without a visible key so far: exp(-inf - 0) = 0, not NaN.
            shift = m_new.masked_fill(m_new == -torch.inf, 0)
            p = torch.exp(s - shift[..., None])
            rescale = torch.exp(m - shift)  # the sums so far are relative to the old m
            l = rescale * l + p.sum(-1)
            o = rescale[..., None] * o + p @ v_j  # 10
            m = m_new
            _note(count, multiplications=s.numel() * v.shape[-1])
            if trace is not None:
                trace(Step(queries, keys, s, m, l, o))
        o = o / l.masked_fill(l == 0, 1)[..., None]  # 12: divide once, at the end
        # --8<-- [end:forward]
        _store(out, queries, o, count)  # 14
        top = m + torch.log(l)  # 13, 15: L = m + log l, -inf without a visible key
        _store(lse, queries, top, count)
        rounded = (m - top + torch.log(l)).masked_fill(l == 0, 0)  # what rounding L lost, up to a thousandth for
        _store(rest, queries, rounded, count)  # scores of 1e4; P in the backward pass needs it
    return out, lse, rest


def backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor,
    visible: Visible, scale: float, tile: tuple[int, int], count: Count | None = None, forget: Forget | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Algorithm 2: for each tile of keys, over all tiles of queries; P is computed again from L. Gives dQ, dK, dV.

    With gates dc besides, in float64: of each position, the sum of its row of dS less the sum of its column.
    """
    wide = lse.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))  # 3
    dc = torch.zeros_like(forget.sums) if forget is not None else None
    # 4: D = rowsum(dO ∘ O). L is an output too here, with dL/dS = P: its gradient is added to dS below as part of -D.
    delta = torch.linalg.vecdot(d_out.to(wide), out.to(wide)) - d_lse
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # a row without a visible key: P = exp(S - inf) = 0
    _note(count, loaded=out.numel() + d_out.numel(), stored=delta.numel())
    for keys in tiles(range(visible.m), tile[1]):  # 5: for each K_j
        k_j, v_j = (_share(_load(x, keys, wide, count), q) for x in (k, v))  # 6
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)  # 7
        for queries in tiles(range(visible.n), tile[0]):  # 8: for each Q_i
            seen = visible.span(queries)
            if seen.start >= keys.stop or seen.stop <= keys.start:
                continue
            q_i, do_i = (_load(x, queries, wide, count) for x in (q, d_out))  # 9
            l_i, rest_i, d_i = (_load(x, queries, wide, count)[..., None] for x in (lse, rest, delta))
            s = _scores(q_i, k_j, scale, visible.mask(queries, keys), count)  # 10: S = Q_i K_jᵀ, again
            s = _decayed(s, forget, visible, queries, keys)
            p = torch.exp(s - l_i - rest_i)  # 11: the softmax itself, no division
            dv_j += p.mT @ do_i  # 12
            dp = do_i @ v_j.mT  # 13
            ds = p * (dp - d_i)  # 14
            dq[:, :, queries.start : queries.stop] += scale * ds @ k_j  # 15
            dk_j += scale * ds.mT @ q_i  # 16
            if dc is not None:
                at = queries.start + visible.m - visible.n
                dc[..., max(0, at) : at + len(queries)] += ds.double().sum(-1)[..., max(0, -at) :]
                dc[..., keys.start : keys.stop] -= ds.double().sum(-2)
            _note(count, multiplications=s.numel() * 2 * (q.shape[-1] + v.shape[-1]))
            _note(count, loaded=q_i.numel(), stored=q_i.numel())  # dQ_i is read and written at every visit
        _store(dk, keys, _gather(dk_j, k), count)  # 18
        _store(dv, keys, _gather(dv_j, v), count)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dc


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, q, k, v, sums, first, *run):
        out, lse, rest = forward(q, k, v, *run, forget=_gates(sums, first))
        ctx.save_for_backward(q, k, v, sums, first, out, lse, rest)
        ctx.run = run[:-1]
        return out, lse

    @staticmethod
    def backward(ctx, d_out, d_lse):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = _FlashAttentionBackward.apply(d_out, d_lse, *ctx.saved_tensors, *ctx.run)
        return *grads, *(None for _ in range(6))


class _FlashAttentionBackward(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx, d_out, d_lse, q, k, v, sums, first, *given):
        return backward(d_out, d_lse, q, k, v, *given, forget=_gates(sums, first))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "flash_attention has no second derivative; nondual.ops.attention.attention(impl='reference') has one"
        )


# --- compiled ------------------------------------------------------------------------------------------------------
# torch.compile would unroll the loops and compile again for every length, so it is given each pass as one operator.


@torch.library.custom_op("nondual::flash_attention_reference", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, scale: float, tile_q: int, tile_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    visible = Visible(q.shape[2], k.shape[2], causal, window or None, q.device)
    with autocast_off(q.device.type):
        return forward(q, k, v, visible, scale, (tile_q, tile_kv))


@_forward.register_fake
def _(q, k, v, causal, window, scale, tile_q, tile_kv):
    wide = accumulation_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[-1]), *(q.new_empty(q.shape[:3], dtype=wide) for _ in range(2))


@torch.library.custom_op("nondual::flash_attention_reference_backward", mutates_args=())
def _backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: Tensor,
    causal: bool, window: int, scale: float, tile_q: int, tile_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    visible = Visible(q.shape[2], k.shape[2], causal, window or None, q.device)
    with autocast_off(q.device.type):
        return backward(d_out, d_lse, q, k, v, out, lse, rest, visible, scale, (tile_q, tile_kv))[:3]


@_backward.register_fake
def _(d_out, d_lse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.options = inputs[3:]


def _differentiate(ctx, d_out, d_lse, _):
    return *_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_FlashAttentionBackward.backward)


@torch.library.custom_op("nondual::forgetting_attention_reference", mutates_args=())
def _forgetting(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, first: Tensor, window: int, scale: float, tile_q: int, tile_kv: int
) -> tuple[Tensor, Tensor, Tensor]:
    visible = Visible(q.shape[2], k.shape[2], True, window or None, q.device)
    with autocast_off(q.device.type):
        return forward(q, k, v, visible, scale, (tile_q, tile_kv), forget=Forget(sums, first))


@_forgetting.register_fake
def _(q, k, v, sums, first, window, scale, tile_q, tile_kv):
    wide = accumulation_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[-1]), *(q.new_empty(q.shape[:3], dtype=wide) for _ in range(2))


@torch.library.custom_op("nondual::forgetting_attention_reference_backward", mutates_args=())
def _forgetting_backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, first: Tensor, out: Tensor,
    lse: Tensor, rest: Tensor, window: int, scale: float, tile_q: int, tile_kv: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    visible = Visible(q.shape[2], k.shape[2], True, window or None, q.device)
    gates = Forget(sums, first)
    with autocast_off(q.device.type):
        dq, dk, dv, dc = backward(
            d_out, d_lse, q, k, v, out, lse, rest, visible, scale, (tile_q, tile_kv), forget=gates
        )
    assert dc is not None  # there are gates
    return dq, dk, dv, dc


@_forgetting_backward.register_fake
def _(d_out, d_lse, q, k, v, sums, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, sums))


def _save_gates(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _differentiate_gates(ctx, d_out, d_lse, _):
    return *_forgetting_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.options), *(None for _ in range(5))


_forgetting.register_autograd(_differentiate_gates, setup_context=_save_gates)
_forgetting_backward.register_autograd(_FlashAttentionBackward.backward)

# --- helpers -------------------------------------------------------------------------------------------------------


def _scores(q_i: Tensor, k_j: Tensor, scale: float, allowed: Tensor, count: Count | None) -> Tensor:
    """S of one tile, -inf where not allowed."""
    s = (scale * q_i @ k_j.mT).masked_fill(~allowed, -torch.inf)
    _note(count, tiles=1, scores=s.numel(), multiplications=s.numel() * q_i.shape[-1])
    return s


def _gates(sums: Tensor | None, first: Tensor | None) -> Forget | None:
    """The gates, where both of their tensors are there."""
    return None if sums is None or first is None else Forget(sums, first)


def _decayed(s: Tensor, forget: Forget | None, visible: Visible, queries: range, keys: range) -> Tensor:
    """S of one tile less what the gates took from it."""
    if forget is None:
        return s
    places = torch.arange(keys.start, keys.stop, device=s.device)
    return s + between(forget, visible.positions(queries), places).to(s.dtype)


def _note(count: Count | None, **numbers: int) -> None:
    """Add to the count, where there is one."""
    if count is not None:
        for name, number in numbers.items():
            setattr(count, name, getattr(count, name) + number)


def _load(x: Tensor, rows: range, dtype: torch.dtype, count: Count | None) -> Tensor:
    """Some rows of x, in the dtype of the sums, as a kernel would hold them on the chip."""
    tile = x[:, :, rows.start : rows.stop]
    _note(count, loaded=tile.numel())
    return tile.to(dtype)


def _store(x: Tensor, rows: range, tile: Tensor, count: Count | None) -> None:
    """Write some rows of x."""
    x[:, :, rows.start : rows.stop] = tile
    _note(count, stored=tile.numel())


def _share(tile: Tensor, q: Tensor) -> Tensor:
    """A tile of keys or values for each query head: (B, G, ·, D) to (B, H, ·, D)."""
    return tile.repeat_interleave(q.shape[1] // tile.shape[1], dim=1) if tile.shape[1] != q.shape[1] else tile


def _gather(tile: Tensor, k: Tensor) -> Tensor:
    """The sum over the query heads that share a key head: (B, H, ·, D) to (B, G, ·, D)."""
    return tile.unflatten(1, (k.shape[1], -1)).sum(2) if tile.shape[1] != k.shape[1] else tile
