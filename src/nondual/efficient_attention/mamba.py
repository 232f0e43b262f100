"""Mamba: a mixer of positions without attention. Each step decides how much to forget, what to take in, what to read.

Source: Gu and Dao 2023 (2312.00752), section 3.4 and figure 3; the scan is section 3.2, Algorithm 2. Symbols: x (B, N,
E) as in every mixer, D = expand · E inner channels, each with S states; K the convolution's width; R the rank of Δ.

Where we differ from the paper: its D is our E, its N our S here, since N counts positions in this library's modules.
Parameters are named and laid out as in the released code, in Hugging Face's and in mambapy's: their state_dicts load.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.ops.causal_conv1d import causal_conv1d
from nondual.ops.selective_scan import selective_scan


class Mamba(nn.Module):
    """A gated block: two projections of x, one convolved and scanned, the other its gate.

        u, z = x W_in      u = silu(conv(u))      Δ, B, C = u W_x
        y = scan(u, Δ, A, B, C) + D u             out = (y · silu(z)) W_out

    It mixes positions causally, in time linear in N, and drops into `TransformerLayer` as any mixer does.

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

    Raises:
        ValueError: a size below 1, or step lengths out of order.
    """

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
        impl: str = "auto",
    ):
        super().__init__()
        d_inner = int(expand * d_model)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, d_inner=d_inner, dt_rank=dt_rank)
        self.d_model, self.d_inner, self.d_state, self.d_conv, self.dt_rank = d_model, d_inner, d_state, d_conv, dt_rank
        self.impl = impl
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
        cache: "MambaCache | None" = None,
        reset: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); no output depends on a later input.

        Args:
            x: (B, N, E); N may be 0.
            cache: what is remembered of the positions before x; it is brought up to date. Reading a sequence in parts
                gives what reading it at once does, gradients too, unless torch.no_grad() says otherwise.
            reset: True at the first position of each of several sequences packed along N. Nothing from before reaches
                what follows, neither by the state nor by the convolution: each is as if alone. A batch padded on the
                left has it at its first real token.

        Raises:
            ValueError: x of another rank or width, a cache made for another batch or module.
        """
        check_width(x, self.d_model)
        if cache is not None:
            cache.check(x, *self._cache_shapes(x.shape[0]))
        # --8<-- [start:block]
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, N, D) each
        u, history = causal_conv1d(
            u, self.conv1d.weight[:, 0], self.conv1d.bias, None if cache is None else cache.history(u), reset=reset
        )
        u = F.silu(u)
        delta, B, C = self.select(u)
        y, state = selective_scan(
            u,
            delta,
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            state=None if cache is None else cache.state,
            reset=reset,
            impl=self.impl,
        )
        # --8<-- [end:block]
        if cache is not None:
            cache.conv, cache.state = history, state
        return self.out_proj(y)

    # --8<-- [start:select]
    def select(self, u: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """What the content decides: Δ before bias and softplus (B, N, D), and B and C (B, N, S).

        A is not among them. A subclass that returns the same whatever u is, B and C as (D, S),
        is a time-invariant model.
        """
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return F.linear(delta, self.dt_proj.weight), B, C  # the scan adds the bias, in float32

    # --8<-- [end:select]

    def step(self, x: Float[Tensor, "b e"], cache: "MambaCache") -> Float[Tensor, "b e"]:
        """One position: x (B, E) -> (B, E), in time and memory that do not depend on how many came before.

        Raises:
            ValueError: x of another rank or width, a cache made for another batch or module.
        """
        return one_step(self, x, cache)

    def new_cache(self, batch: int) -> "MambaCache":
        """A cache that remembers nothing yet, for a batch of B sequences."""
        return empty_cache(self.conv1d.weight, *self._cache_shapes(batch))

    def _cache_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, self.d_conv - 1, self.d_inner), (batch, self.d_inner, self.d_state)


# --8<-- [start:cache]
@dataclass
class MambaCache:
    """All that a Mamba block remembers of what it has read: as much after one token as after a million.

    Made by a block's `new_cache`, and brought up to date by its `forward` and its `step`.

    Attributes:
        conv: the last K - 1 inputs of the convolution (B, K-1, channels).
        state: the state of the scan, (B, D, S) or, in Mamba-2, (B, H, P, S); float32, or float64.
    """

    conv: Tensor
    state: Tensor

    def reset(self) -> None:
        """Forget everything."""
        self.conv, self.state = torch.zeros_like(self.conv), torch.zeros_like(self.state)

    # --8<-- [end:cache]

    def history(self, x: Tensor) -> Tensor:
        """The convolution's last inputs in the dtype of x, which autocast may have changed since they were kept."""
        return self.conv.to(x.dtype)

    def check(self, x: Tensor, conv: tuple[int, ...], state: tuple[int, ...]) -> None:
        """Refuse a cache of other shapes than a module expects for x, or on another device."""
        for name, own, shape in (("conv", self.conv, conv), ("state", self.state, state)):
            if tuple(own.shape) != shape:
                raise ValueError(
                    f"cache.{name} must be {shape} for x {tuple(x.shape)} in this module, got {tuple(own.shape)}; "
                    f"make one with new_cache({x.shape[0]})"
                )
            if own.device != x.device:
                raise ValueError(f"cache.{name} must be on the device of x, {x.device}, got {own.device}")


# What Mamba and Mamba-2 have in common.


def step_bias(n: int, dt_min: float, dt_max: float, *, floor: float = 1e-4) -> Float[Tensor, " n"]:
    """n biases whose softplus, the step length at the start, lies log-uniformly between dt_min and dt_max.

    Source: Gu and Dao 2023, section 3.6. That it is the logarithm which is uniform, and the floor, is in the code
    released with it.

    Raises:
        ValueError: dt_min and dt_max out of order, or not above 0.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min and dt_max must be in order and above 0, got {dt_min} and {dt_max}")
    low, high = math.log(dt_min), math.log(dt_max)
    delta = torch.exp(low + (high - low) * torch.rand(n)).clamp(min=floor)
    return delta + torch.log(-torch.expm1(-delta))  # the inverse of softplus, right for small ones too


def empty_cache(like: Tensor, conv: tuple[int, ...], state: tuple[int, ...]) -> MambaCache:
    """A cache of these shapes, all zeros, where `like` is: the window in its dtype, the state in float32 or better."""
    return MambaCache(conv=like.new_zeros(conv), state=at_least_float32(like.new_zeros(state)))


def one_step(mixer: nn.Module, x: Tensor, cache: MambaCache) -> Tensor:
    """The forward of a sequence of one position, its axis left out."""
    if x.ndim != 2:
        raise ValueError(f"x must be (B, E), one position of each sequence, got {tuple(x.shape)}")
    return mixer(x[:, None], cache=cache)[:, 0]


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it has more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_width(x: Tensor, width: int) -> None:
    """Refuse an x that is not (B, N, E) of this E."""
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x must be (B, N, {width}), got {tuple(x.shape)}")


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")
