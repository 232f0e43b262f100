"""Dynamic chunking: a layer that learns where to cut a sequence, and thinks about the pieces instead of the positions.

    p_t = (1 - cos(W_q x_t, W_k x_{t-1})) / 2,  p_1 = 1        a cut where x turns away from the position before it
    c   = x at the positions with p_t ≥ 1/2                    (B, M, E), M of the N positions
    z_j = P_j main(c)_j + (1 - P_j) z_{j-1}                    smoothed, so that an unsure cut changes little
    y_t = W_r x_t + ste(s_t) z_{j(t)}                          each position reads the piece that it lies in

with P_j the p of cut j, j(t) how many cuts there are up to t, and s_t how sure the choice at t was, max(p_t, 1 - p_t).
ste is the straight-through estimator: 1 in the forward pass, and s_t for the gradient. A piece is known by its first
position, so that no output depends on a later input.

Source: Hwang, Wang and Gu 2025 (2507.07955), section 2.2, equations 4 to 10, and the code released with it. Symbols: x
(B, N, E), M pieces, p probabilities of a cut.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.mixers import new_caches
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.ops.linear_recurrence import linear_recurrence
from nondual.token_ids import has_values


class Cuts(NamedTuple):
    """Where a sequence is cut.

    Attributes:
        p: the probability of a cut before each position (B, N), in float32 or better.
        cut: whether there is one (B, N).
    """

    p: Tensor
    cut: Tensor


def cut_probabilities(q: Float[Tensor, "b n d"], k: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """(1 - cos(q_t, k_{t-1})) / 2 for each position: 0 where the two point the same way, 1 where they are opposed.

    Args:
        q: (B, N, D).
        k: of the position before each (B, N, D).

    Returns:
        (B, N), in float32 or better. Where a vector is 0 it is 1/2.
    """
    q, k = at_least_float32(q), at_least_float32(k)
    return ((1 - F.cosine_similarity(q, k, dim=-1)) / 2).clamp(0, 1)


class Router(nn.Module):
    """Finds the cuts: where a position is unlike the one before it. The first position of a sequence is always one.

    It starts with W_q = W_k = 1, so with the likeness of x itself.

    Args:
        d_model: width E of x.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear

    def __init__(self, d_model: int):
        super().__init__()
        check_sizes(d_model=d_model)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        for projection in (self.q_proj, self.k_proj):
            nn.init.eye_(projection.weight)

    def forward(self, x: Float[Tensor, "b n e"], before: Float[Tensor, "b 1 e"] | None = None) -> Cuts:
        """x (B, N, E), and the position before it if there is one (B, 1, E) -> the cuts (B, N)."""
        earlier = x[:, :-1] if before is None else torch.cat([before, x[:, :-1]], 1)
        first = x.shape[1] - earlier.shape[1]  # 1 where a sequence begins here, else 0
        p = cut_probabilities(self.q_proj(x[:, first:]), self.k_proj(earlier))
        p = F.pad(p, (first, 0), value=1.0)
        return Cuts(p, p >= 0.5)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, before: Tensor | None = None) -> Cuts: ...


def downsample(x: Float[Tensor, "b n ..."], cut: Bool[Tensor, "b n"]) -> Float[Tensor, "b m ..."]:
    """x at the cuts, in order. Rows with fewer cuts than others are filled up at their end with other positions.

    Args:
        x: (B, N, …).
        cut: (B, N).

    Returns:
        (B, M, …), M the most cuts of a row; N where values cannot be looked at, as while compiling.
    """
    order = (~cut).long().argsort(dim=1, stable=True)  # the cuts first
    most = int(cut.sum(1).max()) if cut.numel() and has_values(cut) else cut.shape[1]
    index = order[:, :most].reshape(len(cut), most, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def upsample(z: Float[Tensor, "b m e"], cut: Bool[Tensor, "b n"], before: Float[Tensor, "b e"]) -> Tensor:
    """What each position reads: the piece that the last cut up to it began; `before` where there is none yet.

    Args:
        z: a vector for each piece (B, M, E).
        cut: (B, N).
        before: of the piece that goes on (B, E).

    Returns:
        (B, N, E).
    """
    index = cut.cumsum(1)[..., None].expand(-1, -1, z.shape[-1])
    return torch.cat([before[:, None].to(z.dtype), z], 1).gather(1, index)


def smooth(
    z: Float[Tensor, "b m e"], p: Float[Tensor, "b m"], state: Float[Tensor, "b e"] | None = None
) -> tuple[Float[Tensor, "b m e"], Float[Tensor, "b e"]]:
    """p_j z_j + (1 - p_j) times what was there before: the surer a cut, the more of its piece is new.

    Args:
        z: (B, M, E).
        p: (B, M).
        state: what was there before the first piece (B, E); zero where left out.

    Returns:
        (B, M, E) in the dtype of z, and the last of them (B, E), in float32 or better.
    """
    wide = at_least_float32(z)
    share = p[..., None].to(wide.dtype)
    smoothed, last = linear_recurrence(1 - share, share * wide, state)
    return smoothed.to(z.dtype), last


def ratio_loss(cuts: Cuts, pieces_of: float, valid: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, ""]:
    """Smallest, 1, where one position in `pieces_of` is a cut, and the probabilities say so.

        n / (n - 1) ((n - 1) F G + (1 - F)(1 - G))        F the share of cuts, G the mean probability

    F has no gradient; G leads it: where there are more cuts than one in n, the gradient lowers the probabilities.

    Args:
        cuts: from a router.
        pieces_of: n, how many positions a piece is to have on average; above 1.
        valid: (B, N), False for positions that do not count, such as padding.

    Raises:
        ValueError: pieces_of that is not above 1.
    """
    if not pieces_of > 1:
        raise ValueError(f"pieces_of must be above 1, got {pieces_of}")
    p, cut = (cuts.p, cuts.cut) if valid is None else (cuts.p[valid], cuts.cut[valid])
    share, mean = cut.to(p.dtype).mean(), p.mean()
    return pieces_of / (pieces_of - 1) * ((pieces_of - 1) * share * mean + (1 - share) * (1 - mean))


@dataclass(eq=False)
class ChunkingCache:
    """All that a chunking layer remembers of one sequence; see `DynamicChunking.new_cache`.

    Attributes:
        main: the caches of the network inside.
        before: the last position (1, 1, E), or None before the first.
        smoothed: what the piece that goes on gives to its positions (1, E), or None.
    """

    main: Any
    before: Tensor | None = None
    smoothed: Tensor | None = None


class DynamicChunking(nn.Module):
    """A mixer that cuts its sequence into pieces, lets a network see the pieces, and gives each position its own back.

    x is normalised first, as the encoder of the published model ends with a norm. Where the network is wider than x,
    the pieces are made wider by a learned vector, and its output is cut to E again.

    Where we differ from the released code: the query is of the position itself and the key of the one before it, as in
    the paper's equation 4; in the code it is the other way round. p = 1/2 is a cut, as in the paper.

    Args:
        main: any module c -> c over (B, M, F) in which no piece sees a later one. For generating with a cache it has
            `new_cache(batch, max_len)` and takes `cache=`.
        d_model: width E of x.
        d_main: width F of the network, E or more; E where left out.
        router: x, and the position before it, to `Cuts`; a `Router` where left out.
        eps: added to the mean square in the norm.

    Raises:
        ValueError: a size below 1, or d_main below d_model.
    """

    d_model: int
    main: nn.Module
    router: nn.Module
    norm: nn.RMSNorm
    residual: nn.Linear
    wider: nn.Parameter | None

    def __init__(
        self,
        main: nn.Module,
        d_model: int,
        *,
        d_main: int | None = None,
        router: nn.Module | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        d_main = d_model if d_main is None else d_main
        check_sizes(d_model=d_model)
        if d_main < d_model:
            raise ValueError(f"d_main must be d_model, {d_model}, or more, got {d_main}")
        self.d_model, self.main = d_model, main
        self.router = Router(d_model) if router is None else router
        self.norm = nn.RMSNorm(d_model, eps=eps)
        self.residual = nn.Linear(d_model, d_model, bias=False)
        nn.init.zeros_(self.residual.weight)
        self.wider = nn.Parameter(torch.zeros(d_main - d_model)) if d_main > d_model else None

    def forward(self, x: Float[Tensor, "b n e"], *, cache: ChunkingCache | None = None) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); no output depends on a later input.

        Args:
            x: (B, N, E); N may be 0.
            cache: what came before, for one sequence; it is brought up to date, unless this call raises.

        Raises:
            ValueError: x of another rank, width or kind; a cache with more than one sequence.
            TypeError: x is not a Tensor, or cache is not a ChunkingCache.
        """
        self._check(x, cache)
        if x.shape[1] == 0:
            return x.clone()
        # --8<-- [start:forward]
        x = self.norm(x)
        cuts = self.router(x, None if cache is None else cache.before)
        pieces = downsample(x, cuts.cut)  # (B, M, E)
        if self.wider is not None:
            pieces = torch.cat([pieces, self.wider.expand(*pieces.shape[:2], -1)], -1)
        main_cache = None if cache is None else _copied(cache.main)
        thought = self._think(pieces, main_cache)[..., : self.d_model]
        state = None if cache is None else cache.smoothed
        z, last = smooth(thought, downsample(cuts.p, cuts.cut), state)
        before = x.new_zeros(x.shape[0], self.d_model) if state is None else state
        sure = torch.where(cuts.cut, cuts.p, 1 - cuts.p)[..., None].to(x.dtype)
        straight_through = sure + (1 - sure).detach()  # 1, with the gradient of sure
        y = self.residual(x) + straight_through * upsample(z, cuts.cut, before)
        # --8<-- [end:forward]
        if cache is not None:  # last of all: nothing that raises has changed it
            cache.main, cache.before, cache.smoothed = main_cache, x[:, -1:], last
        return y

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, *, cache: ChunkingCache | None = None) -> Tensor: ...

    def _think(self, pieces: Tensor, cache: Any) -> Tensor:
        if pieces.shape[1] == 0:
            return pieces
        return self.main(pieces) if cache is None else self.main(pieces, cache=cache)

    def new_cache(self, batch: int, max_len: int | None = None) -> ChunkingCache:
        """An empty cache for one sequence.

        Args:
            batch: 1. Sequences of one batch are cut at different positions, and so cannot share a cache.
            max_len: how many positions will be read at most, if the network inside needs to know.

        Raises:
            ValueError: batch other than 1; a network inside that makes no cache.
        """
        if batch != 1:
            raise ValueError(
                f"batch must be 1 with a cache, since each row has its own cuts, got {batch}: use no cache"
            )
        (main,) = new_caches([self.main], batch, max_len, "use no cache")
        return ChunkingCache(main)

    def _check(self, x: Any, cache: Any) -> None:
        check_tensors({"x": x})
        if x.ndim != 3 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise ValueError(f"x must be floating point (B, N, {self.d_model}), got {x.dtype} {tuple(x.shape)}")
        if cache is None:
            return
        if not isinstance(cache, ChunkingCache):
            raise TypeError(f"cache must be a ChunkingCache, from this module's new_cache, got {type(cache).__name__}")
        if x.shape[0] != 1:
            raise ValueError(f"x must be one sequence (1, N, E) with a cache, got {x.shape[0]}")
        if not has_values(x):
            raise ValueError("cache must be left out while compiling: the number of pieces depends on values")


def _copied(cache: Any) -> Any:
    """A cache, or a list of them, that can be brought up to date while the first and the caches in it stay."""
    if isinstance(cache, list):
        return [_copied(each) for each in cache]
    if isinstance(cache, Tensor) or not hasattr(cache, "__dict__"):
        return cache
    made = copy.copy(cache)
    vars(made).update({name: _copied(each) for name, each in vars(cache).items()})
    return made


class ChunkingLayer(nn.Module):
    """A `DynamicChunking` as a layer of a model; it has its own path for x, and no other residual path around it.

    Args:
        mixer: what cuts and thinks.
    """

    mixer: DynamicChunking

    def __init__(self, mixer: DynamicChunking):
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Float[Tensor, "b n e"], **mixing: Any) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); what is given besides x goes to the mixer."""
        return self.mixer(x, **mixing)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, **mixing: Any) -> Tensor: ...
