"""Mamba: a mixer of positions without attention. Each step decides how much to forget, what to take in, what to read.

Source: Gu and Dao 2023 (2312.00752), section 3.4 and figure 3; the scan is section 3.2, Algorithm 2. Symbols: x (B, N,
E) as in every mixer, D = expand · E inner channels, each with S states; K the convolution's width; R the rank of Δ.

Where we differ from the paper: its D is our E, its N our S here, since N counts positions in this library's modules.
Parameters are named and laid out as in the released code, in Hugging Face's and in mambapy's: their state_dicts load.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.efficient_attention.mamba_parts import MambaCache as MambaCache
from nondual.efficient_attention.mamba_parts import (
    bias_of,
    check_input,
    convolve,
    empty_cache,
    one_step,
    past_rows,
    step_bias,
    step_engine,
    without_bias,
)
from nondual.ops.checks import check_sizes
from nondual.ops.dtypes import at_least_float32
from nondual.ops.selective_scan import selective_scan


class Mamba(nn.Module):
    """A gated block: two projections of x, one convolved and scanned, the other its gate.

        u, z = x W_in      u = silu(conv(u))      Δ, B, C = u W_x
        y = scan(u, Δ, A, B, C) + D u             out = (y · silu(z)) W_out

    It mixes positions causally, in time linear in N, and drops into `TransformerLayer` as any mixer does.

    in_proj, conv1d, x_proj, dt_proj and out_proj may be replaced or wrapped (LoRA, quantised layers), and may have
    forward hooks and parametrizations. Two of them are called as modules only where that makes a difference:

    - dt_proj. While it is a plain nn.Linear without hooks, its weight is applied here and its bias is added by the
      scan, in float32. Otherwise it is called, and its bias is added as it adds it.
    - conv1d. While it is a plain nn.Conv1d without hooks, its weight and bias are read. Otherwise it is called with
      (B, D, K-1+N), the last K - 1 inputs first; where `reset` is given, with each position's window, (B N, D, K).

    Args:
        d_model: width E of x and of the output.
        d_state: states S of each channel.
        d_conv: width K of the convolution.
        expand: inner channels D as a multiple of E.
        dt_rank: rank R of the step lengths' projection; E / 16, rounded up, where left out.
        dt_min: the shortest step length at the start.
        dt_max: the longest.
        bias: whether in_proj and out_proj have one.
        conv_bias: whether the convolution has one.
        impl: the scan's engine, as in `nondual.ops.selective_scan`.
        scan: what stands in place of `nondual.ops.selective_scan`, with the same arguments, such as one where a
            sequence lies on several devices (`nondual.parallel.shard_time`).
        rows_before: what gives the convolution the inputs before the first, called as
            `nondual.parallel.rows_before`; a cache, or zeros, where left out.

    Raises:
        ValueError: a size below 1, or step lengths out of order.
    """

    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    impl: Literal["auto", "reference", "cpu", "triton"]
    scan: Callable[..., tuple[Tensor, Tensor]] | None
    rows_before: Callable[..., tuple[Tensor, Tensor]] | None
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
        impl: Literal["auto", "reference", "cpu", "triton"] = "auto",
        scan: Callable[..., tuple[Tensor, Tensor]] | None = None,
        rows_before: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        d_inner = int(expand * d_model)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, d_inner=d_inner, dt_rank=dt_rank)
        self.d_model, self.d_inner, self.d_state, self.d_conv, self.dt_rank = d_model, d_inner, d_state, d_conv, dt_rank
        self.impl, self.scan, self.rows_before = impl, scan, rows_before
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner, bias=conv_bias)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))  # A = -(1 … S), S4D-real
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_bias(d_inner, dt_min, dt_max))

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
            cache: what is remembered of the positions before x; it is brought up to date, unless this call raises.
                Reading a sequence in parts gives what reading it at once does, gradients too, unless torch.no_grad()
                says otherwise.
            reset: True at the first position of each of several sequences packed along N. Nothing from before reaches
                what follows, neither by the state nor by the convolution: each is as if alone. A batch padded on the
                left has it at its first real token.

        Raises:
            ValueError: x of another rank, width or kind, a cache made for another batch or module.
            TypeError: x is not a Tensor, or cache is not a MambaCache.
        """
        check_input(x, self.d_model, cache)
        if cache is not None:
            cache.check(x, *self._cache_shapes(x.shape[0]))
        # --8<-- [start:block]
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, N, D) each
        past, u = past_rows(self, u, None if cache is None else cache.history(u), reset)
        u, history = convolve(self.conv1d, u, past, reset, self.d_conv)
        u = F.silu(u)
        delta, B, C = self.select(u)
        y, state = (self.scan or selective_scan)(
            u,
            delta,
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            self.D,
            z,
            bias_of(self.dt_proj),
            delta_softplus=True,
            state=None if cache is None else cache.state,
            reset=reset,
            impl=step_engine(self.impl, x),
        )
        out = self.out_proj(y)
        # --8<-- [end:block]
        if cache is not None:  # last of all: nothing that raises has changed it
            cache.conv, cache.state = history, state
        return out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, *, cache: MambaCache | None = None, reset: Tensor | None = None) -> Tensor: ...

    # --8<-- [start:select]
    def select(self, u: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """What the content decides: Δ before bias and softplus (B, N, D); B, C (B, N, S).

        A is not among them. A subclass that returns the same whatever u is, B and C as
        (D, S), is a time-invariant model.
        """
        sizes = [self.dt_rank, self.d_state, self.d_state]
        delta, B, C = self.x_proj(u).split(sizes, dim=-1)
        return without_bias(self.dt_proj, delta), B, C  # the scan adds the bias, in float32

    # --8<-- [end:select]

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
        return (batch, self.d_conv - 1, self.d_inner), (batch, self.d_inner, self.d_state)
