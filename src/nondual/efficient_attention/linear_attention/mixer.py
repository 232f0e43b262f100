"""What the mixers of linear attention share: projections, a short convolution, the operation, a norm and a gate.

    q, k, v (, z) = x W_in      q, k, v = silu(conv(q, k, v))      out = norm(attention(q, k, v)) · silu(z)  W_out

Source: the block of DeltaNet and of GLA as released with Yang et al. 2023 (2312.06635) and 2024 (2406.06484, figure 1).
Symbols: x (B, N, E), H heads of width D (queries and keys) and Dv (values), K the convolution's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nondual.efficient_attention.feature_maps import identity
from nondual.efficient_attention.mamba2 import GroupRMSNorm
from nondual.efficient_attention.mamba_parts import convolve, past_rows, step_engine
from nondual.mixers import check_reset
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.ops.linear_attention import Impl, linear_attention


@dataclass(eq=False)
class LinearAttentionCache:
    """All that a mixer of linear attention remembers: as much after one position as after a million.

    Made by a mixer's `new_cache`, and brought up to date by its `forward`, which puts new tensors in the place of the
    old ones.

    Attributes:
        conv: the last K - 1 inputs of the convolution (B, K-1, channels); K - 1 is 0 where there is none.
        state: the state (B, H, F, Dv), F being the width of the features, with one more column where the mixer
            normalises; float32, or float64.
        length: how many positions have been read.
    """

    conv: Tensor
    state: Tensor
    length: int = 0

    def reset(self) -> None:
        """Zero window and zero state."""
        self.conv, self.state, self.length = torch.zeros_like(self.conv), torch.zeros_like(self.state), 0

    def select(self, rows: Int[Tensor, " r"]) -> "LinearAttentionCache":
        """A cache of its own for these rows of the batch, in this order; a row may be taken more than once."""
        return LinearAttentionCache(self.conv[rows], self.state[rows], self.length)


class LinearMixer(nn.Module):
    """A mixer over `nondual.ops.linear_attention`; a class that extends it says what q and k become, and how the state
    decays (`features` and `gates`). By itself it is linear attention without feature map, normaliser or decay.

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        d_head: width D of queries and keys; d_model / n_heads where left out.
        d_value: width Dv of values; D where left out.
        d_conv: width K of the short convolution over queries, keys and values, each channel by itself, which a SiLU
            follows; 0 for none.
        norm: whether each head's output is divided by its root mean square.
        gate: whether the output is multiplied by silu(x W_z).
        feature_map: φ, applied to queries and keys.
        normalise: divide by the sum of the weights.
        scale: factor on q · k.
        eps: added to the mean square in the norm.
        chunk: steps of a chunk, as in `nondual.ops.linear_attention`; the engine's own where left out.
        impl: the engine, as in `nondual.ops.linear_attention`.
        scan: what stands in place of `nondual.ops.linear_attention`, with the same arguments, such as one where a
            sequence lies on several devices (`nondual.parallel.shard_time`).
        rows_before: what gives the convolution the inputs before the first, called as
            `nondual.parallel.rows_before`; a cache, or zeros, where left out.

    Raises:
        ValueError: a size below 1, or heads that do not divide d_model.
    """

    d_model: int
    n_heads: int
    d_head: int
    d_value: int
    d_conv: int
    feature_map: Callable[[Tensor], Tensor]
    normalise: bool
    scale: float
    chunk: int | None
    impl: Impl
    scan: Callable[..., tuple[Tensor, Tensor]] | None
    rows_before: Callable[..., tuple[Tensor, Tensor]] | None
    d_mixed: int
    d_gate: int
    in_proj: nn.Linear
    conv1d: nn.Conv1d | None
    norm: GroupRMSNorm | None
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        norm: bool = True,
        gate: bool = False,
        feature_map: Callable[[Tensor], Tensor] = identity,
        normalise: bool = False,
        scale: float = 1.0,
        eps: float = 1e-5,
        chunk: int | None = None,
        impl: Impl = "auto",
        scan: Callable[..., tuple[Tensor, Tensor]] | None = None,
        rows_before: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads)
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; or give d_head")
        d_head = d_model // n_heads if d_head is None else d_head
        d_value = d_head if d_value is None else d_value
        check_sizes(d_head=d_head, d_value=d_value)
        if d_conv < 0:
            raise ValueError(f"d_conv must be 0 or more, got {d_conv}")
        self.d_model, self.n_heads, self.d_head, self.d_value, self.d_conv = d_model, n_heads, d_head, d_value, d_conv
        self.feature_map, self.normalise, self.scale, self.chunk, self.impl = feature_map, normalise, scale, chunk, impl
        self.scan, self.rows_before = scan, rows_before
        self.d_mixed = n_heads * (2 * d_head + d_value)  # q, k and v go through the convolution together
        self.d_gate = n_heads * d_value if gate else 0
        self.in_proj = nn.Linear(d_model, self.d_mixed + self.d_gate, bias=False)
        self.conv1d = nn.Conv1d(self.d_mixed, self.d_mixed, d_conv, groups=self.d_mixed, bias=False) if d_conv else None
        self.norm = GroupRMSNorm(n_heads * d_value, n_heads, eps=eps) if norm else None
        self.out_proj = nn.Linear(n_heads * d_value, d_model, bias=False)

    def features(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], start: int
    ) -> tuple[Float[Tensor, "b h n f"], Float[Tensor, "b h n f"]]:
        """What the operation gets for q and k, at the places start to start + N - 1."""
        return self.feature_map(q), self.feature_map(k)

    def gates(self, x: Float[Tensor, "b n e"]) -> dict[str, Tensor]:
        """The operation's log_decay and beta, those of them that there are."""
        return {}

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        *,
        cache: LinearAttentionCache | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); no output depends on a later input.

        Args:
            x: (B, N, E); N may be 0.
            cache: what is remembered of the positions before x; it is brought up to date, unless this call raises.
            reset: True at the first position of each of several sequences packed along N: there all that came before is
                forgotten, what the cache held as well.

        Raises:
            ValueError: x of another rank, width or kind, a cache made for another batch or module.
            TypeError: x is not a Tensor, or cache is not a LinearAttentionCache.
        """
        self._check(x, cache, reset)
        # --8<-- [start:block]
        mixed, z = self.in_proj(x).split([self.d_mixed, self.d_gate], dim=-1)
        history = None if cache is None else cache.conv
        if self.conv1d is not None:
            past, mixed = past_rows(self, mixed, None if cache is None else cache.conv.to(mixed.dtype), reset)
            mixed, history = convolve(self.conv1d, mixed, past, reset, self.d_conv)
            mixed = F.silu(mixed)
        widths = [self.n_heads * width for width in (self.d_head, self.d_head, self.d_value)]
        q, k, v = (rearrange(u, "b n (h d) -> b h n d", h=self.n_heads) for u in mixed.split(widths, dim=-1))
        q, k = self.features(q, k, 0 if cache is None else cache.length)
        gates = self.gates(x)
        out, state = (self.scan or linear_attention)(
            q,
            k,
            v.to(q.dtype),  # a feature map may widen q and k
            log_decay=gates.get("log_decay"),
            beta=gates.get("beta"),
            normalise=self.normalise,
            scale=self.scale,
            state=None if cache is None else cache.state,
            reset=reset,
            chunk=self.chunk,
            impl=step_engine(self.impl, x),
        )
        out = rearrange(out, "b h n d -> b n (h d)").to(mixed.dtype)
        out = out if self.norm is None else self.norm(out)
        out = self.out_proj(out * F.silu(z) if self.d_gate else out)
        # --8<-- [end:block]
        if cache is not None:  # last of all: nothing that raises has changed it
            assert history is not None
            cache.conv, cache.state, cache.length = history, state, cache.length + x.shape[1]
        return out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(
            self, x: Tensor, *, cache: LinearAttentionCache | None = None, reset: Tensor | None = None
        ) -> Tensor: ...

    def step(self, x: Float[Tensor, "b e"], cache: LinearAttentionCache) -> Float[Tensor, "b e"]:
        """One position: x (B, E) -> (B, E), in time and memory that do not depend on how many came before.

        Raises:
            ValueError: x of another rank, width or kind, a cache made for another batch or module.
            TypeError: as `forward`.
        """
        check_tensors({"x": x})
        if x.ndim != 2:
            raise ValueError(f"x must be (B, E), one position of each sequence, got {tuple(x.shape)}")
        return self(x[:, None], cache=cache)[:, 0]

    def new_cache(self, batch: int, max_len: int | None = None) -> LinearAttentionCache:
        """An empty cache for a batch of B sequences, of any length: max_len is not needed."""
        like = next(p for p in self.parameters() if p.is_floating_point())
        conv, state = self._cache_shapes(batch)
        return LinearAttentionCache(like.new_zeros(conv), at_least_float32(like.new_zeros(state)))

    @property
    def d_features(self) -> int:
        """F, the width of what the operation gets for q and k."""
        return self.feature_map(torch.zeros(1, self.d_head)).shape[-1] if self._maps else self.d_head

    @property
    def _maps(self) -> bool:
        return self.feature_map is not identity

    def _cache_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        conv = (batch, max(self.d_conv - 1, 0), self.d_mixed)
        return conv, (batch, self.n_heads, self.d_features, self.d_value + self.normalise)

    def _check(self, x: Any, cache: Any, reset: Any) -> None:
        check_tensors({"x": x})
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, N, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if reset is not None:
            check_reset(reset, x)
        if cache is None:
            return
        if not isinstance(cache, LinearAttentionCache):
            raise TypeError(
                f"cache must be a LinearAttentionCache, from this module's new_cache, got {type(cache).__name__}"
            )
        for name, own, shape in zip(("conv", "state"), (cache.conv, cache.state), self._cache_shapes(x.shape[0])):
            if tuple(own.shape) != shape:
                raise ValueError(
                    f"cache.{name} must be {shape} for x {tuple(x.shape)} in this module, got {tuple(own.shape)}; "
                    f"make one with new_cache({x.shape[0]})"
                )
            if own.device != x.device:
                raise ValueError(f"cache.{name} must be on the device of x, {x.device}, got {own.device}")
