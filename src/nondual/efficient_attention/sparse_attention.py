"""Sparse attention: patterns that say which positions are compared, and how far what is compared can travel.

Source: strided and fixed patterns, Child et al. 2019 (1904.10509), section 4.2 and 4.3; sliding window, dilation and
global tokens, Beltagy et al. 2020 (2004.05150), section 3.1; random blocks, Zaheer et al. 2020 (2007.14062), section 2;
sinks, Xiao et al. 2023 (2309.17453), section 3. Symbols: B batch, H query heads, G key/value heads, N queries, M keys;
q and k are positions of a query and a key, counted from the first key, where the queries are the last N of M.

A pattern is a function of positions with a name. Patterns combine with `|` (either allows) and `&` (both allow):

    local(256) | sinks(4)                                        StreamingLLM's window with sinks
    local(256) | global_tokens(8) | random_blocks(2, seed=0)     BigBird's three parts

All look back only, unless made with causal=False. The operation over the tiles that a pattern keeps is
`nondual.ops.sparse_attention`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.attention import attention
from nondual.ops.sparse_attention import BlockMask, Impl, sparse_attention

# --- patterns --------------------------------------------------------------------------------------------------------


Allowed = Callable[[Tensor, Tensor, int], Tensor]
"""Positions of queries (n, 1) and of keys (m,), and M, to where attending is allowed: bool (n, m)."""

Spans = Callable[[int, int, int], list[tuple[int, int]]]
"""The positions of a first and a last query, and M, to ranges of keys outside of which these queries see nothing."""


@dataclass(frozen=True)
class Pattern:
    """Which keys each query may attend to, as a function of positions.

    Attributes:
        name: as it was made, such as "local(256) | sinks(4)".
        allowed: where attending is allowed.
        spans: where to look for allowed keys, so that a BlockMask need not ask about every pair.
        causal: whether no query sees a later key.
    """

    name: str
    allowed: Allowed
    spans: Spans = lambda first, last, m: [(0, m)]
    causal: bool = True

    def __or__(self, other: "Pattern") -> "Pattern":
        """What either allows."""
        one, two = self, other

        def allowed(q: Tensor, k: Tensor, m: int) -> Tensor:
            return one.allowed(q, k, m) | two.allowed(q, k, m)

        def spans(first: int, last: int, m: int) -> list[tuple[int, int]]:
            return one.spans(first, last, m) + two.spans(first, last, m)

        return Pattern(f"{self.name} | {other.name}", allowed, spans, self.causal and other.causal)

    def __and__(self, other: "Pattern") -> "Pattern":
        """What both allow."""
        one, two = self, other

        def allowed(q: Tensor, k: Tensor, m: int) -> Tensor:
            return one.allowed(q, k, m) & two.allowed(q, k, m)

        def spans(first: int, last: int, m: int) -> list[tuple[int, int]]:
            found = (one.spans(first, last, m), two.spans(first, last, m))
            return min(found, key=lambda ranges: sum(stop - start for start, stop in ranges))

        names = (f"({part.name})" if " | " in part.name else part.name for part in (self, other))
        return Pattern(" & ".join(names), allowed, spans, self.causal or other.causal)

    def mask(self, n: int, m: int | None = None, *, device: torch.device | str | None = None) -> Bool[Tensor, "n m"]:
        """The mask whole, (N, M), True where attending is allowed.

        Args:
            n: N.
            m: M; N where left out. The queries are the last N of the M positions.
            device: where it is made.
        """
        m = n if m is None else m
        queries, keys = torch.arange(m - n, m, device=device)[:, None], torch.arange(m, device=device)
        return self.allowed(queries, keys, m).expand(n, m)

    def block_mask(
        self,
        n: int,
        m: int | None = None,
        block: int | tuple[int, int] = 64,
        *,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """The tiles that this pattern keeps, without holding N x M; made once for each length and kept.

        Args:
            n: N.
            m: M; N where left out.
            block: the side of a tile, or (block_q, block_kv).
            device: where the lists are kept.
        """
        return _block_mask(self, n, n if m is None else m, block, torch.device(device or "cpu"))


@functools.lru_cache(maxsize=32)
def _made_once(pattern: Pattern, n: int, m: int, block: int | tuple[int, int], device: torch.device) -> BlockMask:
    return BlockMask.from_predicate(
        n,
        m,
        lambda q, k: pattern.allowed(q, k, m),
        block,
        spans=lambda first, last: pattern.spans(first, last, m),
        device=device,
    )


_block_mask = cast("Callable[..., BlockMask]", torch.compiler.disable(_made_once))
"""The compiler calls it as it is: it would unroll the loop over rows of tiles."""


def _pattern(name: str, allowed: Allowed, spans: Spans, causal: bool) -> Pattern:
    """A pattern that looks back only, unless it is not causal: its spans are for one that does."""
    if not causal:
        return Pattern(name.replace(")", ", causal=False)"), allowed, causal=False)
    return Pattern(name, lambda q, k, m: allowed(q, k, m) & (k <= q), spans)


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be an integer of 1 or more, got {size!r}")


def local(window: int, *, dilation: int = 1, causal: bool = True) -> Pattern:
    """The last `window` keys, the query's own included; with a dilation d only every d-th.

        local(3)         local(2, dilation=2)
        1 0 0 0 0        1 0 0 0 0
        1 1 0 0 0        0 1 0 0 0
        1 1 1 0 0        1 0 1 0 0
        0 1 1 1 0        0 1 0 1 0
        0 0 1 1 1        0 0 1 0 1

    With causal=False as many after the query too.

    Source: Beltagy et al. 2020 (2004.05150), section 3.1, sliding window and dilated sliding window.
    """
    _at_least_one(window=window, dilation=dilation)

    def allowed(q: Tensor, k: Tensor, _: int) -> Tensor:
        apart = (q - k).abs()
        near = apart < window * dilation
        return near if dilation == 1 else near & (apart % dilation == 0)

    name = f"local({window})" if dilation == 1 else f"local({window}, dilation={dilation})"
    return _pattern(name, allowed, lambda first, last, _: [(first - (window - 1) * dilation, last + 1)], causal)


def strided(stride: int, *, causal: bool = True) -> Pattern:
    """The last `stride` keys, and before them every stride-th.

        strided(3)
        1 0 0 0 0 0 0
        1 1 0 0 0 0 0
        1 1 1 0 0 0 0
        1 1 1 1 0 0 0
        0 1 1 1 1 0 0
        0 0 1 1 1 1 0
        1 0 0 1 1 1 1

    Source: Child et al. 2019 (1904.10509), section 4.2, both parts in one head (section 4.3's merged head).
    """
    _at_least_one(stride=stride)

    # --8<-- [start:strided]
    def allowed(q: Tensor, k: Tensor, _: int) -> Tensor:
        apart = (q - k).abs()
        return (apart < stride) | (apart % stride == 0)

    # --8<-- [end:strided]

    def spans(first: int, last: int, _: int) -> list[tuple[int, int]]:
        if last - first >= stride - 1:
            return [(0, last + 1)]
        return [(first - stride, last + 1), *((first - far, last - far + 1) for far in range(stride, last + 1, stride))]

    return _pattern(f"strided({stride})", allowed, spans, causal)


def fixed(stride: int, summary: int = 1, *, causal: bool = True) -> Pattern:
    """Within blocks of `stride` positions, and the last `summary` positions of every block.

        fixed(3)
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 1 1 0 0
        0 0 1 1 1 0
        0 0 1 1 1 1

    Source: Child et al. 2019 (1904.10509), section 4.2, both parts in one head.
    """
    _at_least_one(stride=stride, summary=summary)
    if summary > stride:
        raise ValueError(f"summary must be at most the stride {stride}, got {summary}")

    def allowed(q: Tensor, k: Tensor, _: int) -> Tensor:
        return (q // stride == k // stride) | (k % stride >= stride - summary)

    def spans(first: int, last: int, _: int) -> list[tuple[int, int]]:
        ends = range(stride, last + 2, stride)
        return [(first // stride * stride, last + 1), *((end - summary, end) for end in ends)]

    return _pattern(f"fixed({stride}, {summary})", allowed, spans, causal)


def blocks(size: int, *, causal: bool = True) -> Pattern:
    """Within blocks of `size` positions, and nothing between them.

        blocks(2)
        1 0 0 0
        1 1 0 0
        0 0 1 0
        0 0 1 1

    Source: Qiu et al. 2019 (1911.02972), section 3; the first part of Child et al.'s fixed pattern.
    """
    _at_least_one(size=size)

    def spans(first: int, last: int, _: int) -> list[tuple[int, int]]:
        return [(first // size * size, last + 1)]

    return _pattern(f"blocks({size})", lambda q, k, _: q // size == k // size, spans, causal)


def global_tokens(which: int | Sequence[int], *, causal: bool = True) -> Pattern:
    """Some positions that see all and are seen by all: the first `which`, or those listed.

        global_tokens(1)     global_tokens([2])     global_tokens([2], causal=False)
        1 0 0 0              0 0 0 0                0 0 1 0
        1 0 0 0              0 0 0 0                0 0 1 0
        1 0 0 0              1 1 1 0                1 1 1 1
        1 0 0 0              0 0 1 0                0 0 1 0

    Source: Beltagy et al. 2020 (2004.05150), section 3.1, global attention.
    """
    if isinstance(which, int):
        _at_least_one(which=which)
    positions = tuple(range(which) if isinstance(which, int) else which)

    def allowed(q: Tensor, k: Tensor, _: int) -> Tensor:
        chosen = torch.tensor(positions, device=k.device)
        return torch.isin(k, chosen) | torch.isin(q, chosen)

    def spans(first: int, last: int, m: int) -> list[tuple[int, int]]:
        if any(first <= position <= last for position in positions):
            return [(0, m)]
        return [(position, position + 1) for position in positions]

    name = f"global_tokens({which if isinstance(which, int) else list(positions)})"
    return _pattern(name, allowed, spans, causal)


def sinks(count: int) -> Pattern:
    """The first `count` keys, which every query sees.

        sinks(1)
        1 0 0 0
        1 0 0 0
        1 0 0 0

    Source: Xiao et al. 2023 (2309.17453), section 3.
    """
    _at_least_one(count=count)
    return _pattern(
        f"sinks({count})", lambda q, k, _: (k < count).expand(q.shape[0], -1), lambda first, last, _: [(0, count)], True
    )


def random_blocks(count: int, seed: int = 0, *, size: int = 64, causal: bool = True) -> Pattern:
    """For each block of `size` queries, `count` blocks of keys drawn by chance, its own and those before it.

    The draws depend on the seed and on the block's number alone, so that they stay as they are while a sequence grows.
    They are with replacement: a block of queries may have fewer than `count`. With causal=False they are drawn from all
    M keys.

    Source: Zaheer et al. 2020 (2007.14062), section 2, random attention in blocks; there without replacement.
    """
    _at_least_one(count=count, size=size)

    def allowed(q: Tensor, k: Tensor, m: int) -> Tensor:
        row, column = q // size, k // size
        choices = row + 1 if causal else -(-m // size)
        drawn = [_scrambled(row.clamp(min=0), draw, seed) % choices == column for draw in range(count)]
        return functools.reduce(torch.logical_or, drawn)

    def spans(first: int, last: int, _: int) -> list[tuple[int, int]]:
        rows = range(max(0, first) // size, last // size + 1)
        drawn = [_scrambled(row, draw, seed) % (row + 1) for row in rows for draw in range(count)]
        return [(column * size, (column + 1) * size) for column in drawn]

    return _pattern(f"random_blocks({count}, seed={seed}, size={size})", allowed, spans, causal)


def _scrambled(row: Any, draw: int, seed: int) -> Any:
    """A number below 2**32 that looks like chance, from a number of a block (or a tensor), the draw and the seed."""
    x = (row * 0x9E3779B1 + (draw + 1) * 0x85EBCA6B + (seed + 1) * 0xC2B2AE35) & 0xFFFFFFFF
    for _ in range(2):
        x = ((x >> 16 ^ x) * 0x045D9F3B) & 0xFFFFFFFF
    return x >> 16 ^ x


def causal() -> Pattern:
    """Every key up to the query's own: nothing is left out."""
    return Pattern("causal", lambda q, k, _: k <= q, lambda first, last, _: [(0, last + 1)])


# --- the op of a module ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseAttention:
    """What `MultiHeadAttention(op=...)` calls, over the tiles that a pattern keeps; it has no parameters.

        MultiHeadAttention(512, 8, op=SparseAttention(local(256) | sinks(4)))

    Attributes:
        pattern: which keys a query sees. The tiles are computed whole, and what the pattern forbids in them is dropped.
        block: the side of a tile, or (block_q, block_kv).
        scale: factor on q · k; 1/√D where None.
        impl: "auto", "reference", "tiles" or "triton", as in `nondual.ops.sparse_attention`.
    """

    pattern: Pattern
    block: int | tuple[int, int] = 64
    scale: float | None = None
    impl: Impl = "auto"

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
        """Attention as `nondual.ops.attention.attention` gives it under the mask `pattern.mask(N, M)`.

        A single query, as in decoding with a cache, is given the keys that it sees, and nothing else is read.

        Args:
            q: queries (B, H, N, D), the last N of the M positions.
            k: keys (B, G, M, D), H a multiple of G.
            v: values (B, G, M, Dv).
            mask: None; the pattern says which keys are seen.
            causal: no query sees a later key, whether the pattern looks back only or not.
            dropout: 0.
            return_weights: False.

        Returns:
            out (B, H, N, Dv).

        Raises:
            TypeError: q, k or v is not a tensor.
            ValueError: a mask, a dropout or the weights are asked for; or q, k and v do not fit.
            RuntimeError: as in `nondual.ops.sparse_attention.sparse_attention`.
        """
        if mask is not None:
            raise ValueError(
                "mask must be None for sparse attention, whose pattern says which keys are seen, "
                f"got a mask {tuple(mask.shape)}{_ELSE}"
            )
        if dropout:
            raise ValueError(
                f"dropout must be 0 for sparse attention, which keeps no weights to drop, got {dropout}{_ELSE}"
            )
        if return_weights:
            raise ValueError(f"return_weights must be False for sparse attention, which never forms them{_ELSE}")
        pattern = self.pattern & _CAUSAL if causal and not self.pattern.causal else self.pattern
        n, m = q.shape[2], k.shape[2]
        if torch.compiler.is_exporting():  # a list of tiles would fix the length
            return attention(q, k, v, mask=pattern.mask(n, m, device=q.device), scale=self.scale)
        if n == 1 and self.impl == "auto" and not torch.compiler.is_compiling():
            seen = pattern.mask(1, m, device=q.device)[0].nonzero()[:, 0]
            return attention(q, k[:, :, seen], v[:, :, seen], scale=self.scale)
        block_mask = pattern.block_mask(n, m, self.block, device=q.device)
        return sparse_attention(q, k, v, block_mask, scale=self.scale, impl=self.impl)


_CAUSAL = causal()
_ELSE = "; for that use op=nondual.ops.attention.attention with mask=pattern.mask(n)"

# --- what is counted -------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """How many scores one head of one sequence has.

    Attributes:
        allowed: those that the pattern allows.
        computed: those in kept tiles, so that `allowed` are among them.
        all: N · M.
        flops: of the two products over the computed scores, forward: 2 (D + Dv) for each.
    """

    allowed: int
    computed: int
    all: int
    flops: int


def work(block_mask: BlockMask, d: int, dv: int | None = None) -> Work:
    """The scores and the FLOPs of one head, on the mean of the mask's Bm and Gm.

    Args:
        block_mask: which tiles are computed.
        d: D.
        dv: Dv; D where left out.
    """
    lists = max(1, block_mask.batch * block_mask.groups)
    pairs = block_mask.n * block_mask.m
    computed = round(block_mask.density * pairs)
    return Work(block_mask.allowed_pairs // lists, computed, pairs, 2 * computed * (d + (d if dv is None else dv)))


def reach(mask: Bool[Tensor, "n n"] | BlockMask, layers: int) -> Bool[Tensor, "n n"]:
    """Which positions can have influenced which after so many layers: row i is True at all j that i depends on.

    A position depends on itself, through the path around attention, and on what its keys depended on a layer before.
    That is a power of the boolean matrix mask | I.

    Args:
        mask: (N, N), True where attending is allowed; or a BlockMask with one list.
        layers: L, 0 or more.

    Raises:
        ValueError: a mask that is not square, or a number of layers below 0.
    """
    step = _step(mask)
    if layers < 0:
        raise ValueError(f"layers must be 0 or more, got {layers}")
    # --8<-- [start:reach]
    result = torch.eye(len(step), device=step.device)
    while layers:  # by squaring: step is the power of mask | I of two, four, ... layers
        if layers % 2:
            result = (result @ step > 0).float()
        step, layers = (step @ step > 0).float(), layers // 2
    # --8<-- [end:reach]
    return result > 0


def layers_to_reach_all(mask: Bool[Tensor, "n n"] | BlockMask) -> int | None:
    """After how many layers every position depends on every other; of those before it, if no key lies ahead.

    Args:
        mask: as in `reach`.

    Returns:
        The least number of layers, or None where no number is enough.
    """
    step = _step(mask)
    wanted = torch.ones_like(step) if bool(step.triu(1).any()) else torch.ones_like(step).tril()
    reached, layers = torch.eye(len(step), device=step.device), 0
    while not torch.equal(reached, wanted):
        further = (reached @ step > 0).float()
        if torch.equal(further, reached):
            return None
        reached, layers = further, layers + 1
    return layers


def _step(mask: Tensor | BlockMask) -> Tensor:
    """What a position depends on through one layer: float (N, N) of 0 and 1."""
    allowed = mask.mask() if isinstance(mask, BlockMask) else mask
    if allowed.ndim == 4 and allowed.shape[:2] == (1, 1):
        allowed = allowed[0, 0]
    if allowed.ndim != 2 or allowed.shape[0] != allowed.shape[1]:
        raise ValueError(f"mask must be square (N, N), or a BlockMask with one list, got {tuple(allowed.shape)}")
    return (allowed | torch.eye(len(allowed), dtype=torch.bool, device=allowed.device)).float()
