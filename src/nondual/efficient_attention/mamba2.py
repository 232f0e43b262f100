"""Mamba-2: the block of Mamba with heads, one decay rate for each, so that its scan is also a masked attention.

Source: Dao and Gu 2024 (2405.21060), section 7 and figure 6; the scan is `nondual.ops.ssd`. Symbols: x (B, N, E),
D = expand · E inner channels in H heads of width P, S states, G groups of heads that share B and C; K the convolution's
width.

Where we differ from the paper: its T is our N, its N our S. Parameters are named and laid out as in the released code
and in Hugging Face's: their state_dicts load.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.efficient_attention.mamba_parts import (
    MambaCache,
    check_input,
    convolve,
    empty_cache,
    one_step,
    past_rows,
    step_bias,
    step_engine,
)
from nondual.ops.checks import check_sizes
from nondual.ops.dtypes import at_least_float32
from nondual.ops.ssd import ssd


class GroupRMSNorm(nn.Module):
    """Each group of channels divided by the root of its mean square, then every channel times its weight.

    Source: Zhang and Sennrich 2019 (1910.07467); by groups: Dao and Gu 2024, section 8.1, so that groups may lie
    on different devices.

    Args:
        channels: how many channels there are.
        n_groups: how many groups they are in.
        eps: added to the mean square.
    """

    n_groups: int
    eps: float
    weight: nn.Parameter

    def __init__(self, channels: int, n_groups: int = 1, *, eps: float = 1e-5):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """x (..., D) -> (..., D)."""
        groups = x.unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """A gated block: one projection of x gives all, a convolution mixes neighbours, the scan the rest, a norm ends it.

        z, xBC, Δ = x W_in      x, B, C = silu(conv(xBC))      Δ = softplus(Δ + bias)
        y = scan(x, Δ, A, B, C) + D x                          out = norm(y · silu(z)) W_out

    It mixes positions causally, in time linear in N, and drops into `TransformerLayer` as any mixer does.

    in_proj, conv1d, norm and out_proj may be replaced or wrapped (LoRA, quantised layers), and may have forward hooks
    and parametrizations. conv1d is called as a module only where it has hooks or is not a plain nn.Conv1d, as in
    `Mamba`.

    Args:
        d_model: width E of x and of the output.
        d_state: states S.
        d_conv: width K of the convolution.
        expand: inner channels D as a multiple of E.
        d_head: width P of a head; D is a multiple of it.
        n_groups: groups G that share B and C, a divisor of the heads.
        dt_min: the shortest step length at the start.
        dt_max: the longest.
        dt_limit: bounds that every step length is kept within.
        bias: whether in_proj and out_proj have one.
        conv_bias: whether the convolution has one.
        eps: added to the mean square in the norm.
        chunk: steps of a chunk, as in `nondual.ops.ssd`; the engine's own where left out.
        impl: the engine, as in `nondual.ops.ssd`.
        scan: what stands in place of `nondual.ops.ssd`, with the same arguments, such as one where a sequence
            lies on several devices (`nondual.parallel.shard_time`).
        rows_before: what gives the convolution the inputs before the first, called as
            `nondual.parallel.rows_before`; a cache, or zeros, where left out.

    Raises:
        ValueError: a size below 1, widths or groups that do not divide, step lengths or their limits out of order.
    """

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    n_heads: int
    d_head: int
    n_groups: int
    dt_limit: tuple[float, ...]
    chunk: int | None
    impl: Literal["auto", "reference", "chunked", "triton"]
    scan: Callable[..., tuple[Tensor, Tensor]] | None
    rows_before: Callable[..., tuple[Tensor, Tensor]] | None
    d_mixed: int
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    dt_bias: nn.Parameter
    A_log: nn.Parameter
    D: nn.Parameter
    norm: GroupRMSNorm
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        d_head: int = 64,
        n_groups: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        eps: float = 1e-5,
        chunk: int | None = None,
        impl: Literal["auto", "reference", "chunked", "triton"] = "auto",
        scan: Callable[..., tuple[Tensor, Tensor]] | None = None,
        rows_before: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        d_inner = int(expand * d_model)
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, d_inner=d_inner, d_head=d_head, n_groups=n_groups)
        if d_inner % d_head:
            raise ValueError(f"expand * d_model must be a multiple of d_head, got {d_inner} and {d_head}")
        n_heads = d_inner // d_head
        if n_heads % n_groups:
            raise ValueError(f"n_groups must divide the heads, {d_inner} / {d_head} = {n_heads}, got {n_groups}")
        if not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"dt_limit must be two bounds in order, 0 or more, got {dt_limit}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, d_inner, d_state, d_conv
        self.n_heads, self.d_head, self.n_groups = n_heads, d_head, n_groups
        self.dt_limit, self.chunk, self.impl = tuple(dt_limit), chunk, impl
        self.scan, self.rows_before = scan, rows_before
        self.d_mixed = d_inner + 2 * n_groups * d_state  # x, B and C go through the convolution together
        self.in_proj = nn.Linear(d_model, d_inner + self.d_mixed + n_heads, bias=bias)
        self.conv1d = nn.Conv1d(self.d_mixed, self.d_mixed, d_conv, groups=self.d_mixed, bias=conv_bias)
        self.dt_bias = nn.Parameter(step_bias(n_heads, dt_min, dt_max))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(n_heads))
        self.norm = GroupRMSNorm(d_inner, n_groups, eps=eps)
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        *,
        cache: MambaCache | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); no output depends on a later input.

        Args:
            x: (B, N, E); N may be 0.
            cache: what is remembered of the positions before x, as in `Mamba`; it is brought up to date, unless this
                call raises.
            reset: True at the first position of each of several sequences packed along N, as in `Mamba`; but see
                `nondual.ops.ssd` on a NaN, which may reach its neighbours in a chunk.

        Raises:
            ValueError: x of another rank, width or kind, a cache made for another batch or module.
            TypeError: x is not a Tensor, or cache is not a MambaCache.
        """
        check_input(x, self.d_model, cache)
        if cache is not None:
            cache.check(x, *self._cache_shapes(x.shape[0]))
        # --8<-- [start:block]
        z, mixed, delta = self.in_proj(x).split([self.d_inner, self.d_mixed, self.n_heads], dim=-1)
        past, mixed = past_rows(self, mixed, None if cache is None else cache.history(mixed), reset)
        mixed, history = convolve(self.conv1d, mixed, past, reset, self.d_conv)
        shared = self.n_groups * self.d_state
        u, B, C = F.silu(mixed).split([self.d_inner, shared, shared], dim=-1)
        u, z = (rearrange(v, "b n (h p) -> b n h p", p=self.d_head) for v in (u, z))
        B, C = (rearrange(v, "b n (g s) -> b n g s", s=self.d_state) for v in (B, C))
        delta, bias = self._step_length(delta)
        y, state = (self.scan or ssd)(
            u,
            delta,
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            self.D,
            z,
            bias,
            delta_softplus=bias is not None,
            state=None if cache is None else cache.state,
            reset=reset,
            chunk=self.chunk,
            impl=step_engine(self.impl, x),
        )
        out = self.out_proj(self.norm(rearrange(y, "b n h p -> b n (h p)")))
        # --8<-- [end:block]
        if cache is not None:  # last of all: nothing that raises has changed it
            cache.conv, cache.state = history, state
        return out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, *, cache: MambaCache | None = None, reset: Tensor | None = None) -> Tensor: ...

    def step(self, x: Float[Tensor, "b e"], cache: MambaCache) -> Float[Tensor, "b e"]:
        """One position: x (B, E) -> (B, E), in time and memory that do not depend on how many came before.

        Raises:
            ValueError: x of another rank, width or kind, a cache made for another batch or module.
            TypeError: as `forward`.
        """
        return one_step(self, x, cache)

    def new_cache(self, batch: int, max_len: int | None = None) -> MambaCache:
        """An empty cache for a batch of B sequences, of any length: max_len is not needed."""
        return empty_cache(self.conv1d, self.D, *self._cache_shapes(batch))

    def _cache_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.d_conv - 1, self.d_mixed), (batch, self.n_heads, self.d_head, self.d_state)

    def _step_length(self, delta: Tensor) -> tuple[Tensor, Tensor | None]:
        """Delta and its bias for the scan to join; or, where lengths are limited, the lengths themselves and None."""
        low, high = self.dt_limit
        if (low, high) == (0, float("inf")):
            return delta, self.dt_bias
        length = F.softplus(at_least_float32(delta) + self.dt_bias).clamp(low, high)
        return length.to(delta.dtype), None
