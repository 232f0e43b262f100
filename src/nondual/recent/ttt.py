"""Test-time training as a mixer: a layer whose memory is a model that learns from the sequence while it reads it.

    q, k, v (, z) = x W_in      q, k = conv(q), conv(k)      η = η₀ sigmoid(x W_η + b_η) / D
    out = norm(ttt(q, k, v, η)) · gelu(z)  W_out

Two loops. The inner one takes gradient steps on the inner model's weights as it reads, in training and in use alike.
The outer one, ordinary training, goes through these steps and learns everything else: the three views, the inner
rates, the inner norm, and the weights W_0 that the inner model begins each sequence with.

Source: Sun et al. 2024 (2407.04620), section 2.7 and figure 16, and the code released with it; the operation is
`nondual.ops.ttt`. Symbols: x (B, N, E), H heads of width D, b tokens of a mini-batch, K the convolution's width.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.efficient_attention.mamba_parts import convolve
from nondual.ops.checks import check_sizes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.ops.ttt import NormedResidual, TTTState, ttt


@dataclass(eq=False)
class TTTCache:
    """All that a TTT layer remembers: the inner model, and the last inputs of the convolution.

    Made by a layer's `new_cache`, and brought up to date by its `forward`, which puts new tensors in the place of the
    old ones.

    Attributes:
        conv: the last K - 1 inputs of the convolution (B, K-1, 2 H D); K - 1 is 0 where there is none.
        state: the inner model; None before the first token, when it is the learned start.
    """

    conv: Tensor
    state: TTTState | None = None

    def reset(self) -> None:
        """Zero window, and the learned start."""
        self.conv, self.state = torch.zeros_like(self.conv), None

    def select(self, rows: Int[Tensor, " r"]) -> "TTTCache":
        """A cache of its own for these rows of the batch, in this order; a row may be taken more than once."""
        return TTTCache(self.conv[rows], None if self.state is None else self.state.select(rows))


class TTT(nn.Module):
    """A TTT layer whose inner model is any stack of linear maps with GELU between them; see `TTTLinear`, `TTTMLP`.

    No output depends on a later input. It takes `cache=`, and neither `reset=` nor `mask=`: the mini-batches of all
    rows end at the same positions.

    Where we differ from the released code: queries and keys are projected apart and share one depthwise convolution
    (there one projection and two convolutions), and are not rotated by their place in the mini-batch.

    Args:
        d_model: width E of x and of the output.
        n_heads: H, each with an inner model of its own.
        hidden: the inner model's hidden widths as multiples of D: () is one linear map, (4,) two.
        base_rate: η₀. It may be set on the layer at any time; with 0 the inner model no longer changes.
        mini_batch: b, how many tokens take their gradients at the same weights.
        d_head: D; d_model / n_heads where left out.
        d_conv: width K of the short convolution over queries and keys; 0 for none.
        gate: whether the output is multiplied by gelu(x W_z), as in the paper's Mamba backbone.
        inner_bias: whether the inner maps have biases.
        eps: added to the variance in both norms.
        impl: as in `nondual.ops.ttt.ttt`.

    Raises:
        ValueError: a size below 1, heads that do not divide d_model, or a base_rate below 0.
    """

    d_model: int
    n_heads: int
    d_head: int
    d_conv: int
    d_gate: int
    base_rate: float
    mini_batch: int
    eps: float
    impl: Literal["dual", "reference"]
    in_proj: nn.Linear
    conv1d: nn.Conv1d | None
    rate_proj: nn.Linear
    share_offset: nn.Parameter
    weights: nn.ParameterList
    inner_norm_weight: nn.Parameter
    inner_norm_bias: nn.Parameter
    norm: nn.LayerNorm
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        hidden: tuple[int, ...] = (),
        base_rate: float = 1.0,
        mini_batch: int = 16,
        d_head: int | None = None,
        d_conv: int = 4,
        gate: bool = True,
        inner_bias: bool = True,
        eps: float = 1e-6,
        impl: Literal["dual", "reference"] = "dual",
    ):
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads, mini_batch=mini_batch)
        if d_conv < 0:
            raise ValueError(f"d_conv must be 0 or more, got {d_conv}")
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; or give d_head")
        d_head = d_model // n_heads if d_head is None else d_head
        check_sizes(d_head=d_head, **{f"hidden[{i}]": times for i, times in enumerate(hidden)})
        if not 0 <= base_rate < math.inf:
            raise ValueError(f"base_rate must be 0 or more, got {base_rate}")
        self.d_model, self.n_heads, self.d_head, self.d_conv = d_model, n_heads, d_head, d_conv
        self.base_rate, self.mini_batch, self.eps, self.impl = base_rate, mini_batch, eps, impl
        inner = n_heads * d_head
        self.d_gate = inner if gate else 0
        self.in_proj = nn.Linear(d_model, 3 * inner + self.d_gate, bias=False)
        self.conv1d = nn.Conv1d(2 * inner, 2 * inner, d_conv, groups=2 * inner) if d_conv else None
        self.rate_proj = nn.Linear(d_model, n_heads)
        nn.init.normal_(self.rate_proj.weight, std=0.02)
        nn.init.zeros_(self.rate_proj.bias)
        self.share_offset = nn.Parameter(torch.zeros(mini_batch))
        widths = [d_head, *(times * d_head for times in hidden), d_head]
        self.weights = nn.ParameterList(_start(n_heads, a, z, inner_bias) for a, z in pairwise(widths))
        self.inner_norm_weight = nn.Parameter(torch.ones(n_heads, d_head))
        self.inner_norm_bias = nn.Parameter(torch.zeros(n_heads, d_head))
        self.norm = nn.LayerNorm(inner, eps=eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def rates(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b h n"]:
        """η of each head and token: η₀ sigmoid(x W_η + b_η) / D."""
        # --8<-- [start:rates]
        return self.base_rate / self.d_head * at_least_float32(self.rate_proj(x)).sigmoid().mT
        # --8<-- [end:rates]

    def shares(self) -> Float[Tensor, " m"]:
        """τ of each place in a mini-batch, at least 0: at the start 1/t, so that each step follows a mean gradient."""
        # --8<-- [start:shares]
        place = torch.arange(1, self.mini_batch + 1, device=self.share_offset.device)
        return (1 / place + self.share_offset).clamp(min=0)
        # --8<-- [end:shares]

    def forward(self, x: Float[Tensor, "b n e"], *, cache: TTTCache | None = None) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E); no output depends on a later input.

        Args:
            x: (B, N, E); N may be 0.
            cache: what is remembered of the positions before x; it is brought up to date, unless this call raises.

        Raises:
            ValueError: x of another rank, width or kind, a cache made for another batch or layer.
            TypeError: x is not a Tensor, or cache is not a TTTCache.
        """
        self._check(x, cache)
        # --8<-- [start:block]
        inner = self.n_heads * self.d_head
        qk, v, z = self.in_proj(x).split([2 * inner, inner, self.d_gate], dim=-1)
        history = None if cache is None else cache.conv
        if self.conv1d is not None:
            past = None if cache is None else cache.conv.to(qk.dtype)
            qk, history = convolve(self.conv1d, qk, past, None, self.d_conv)
        q, k, v = (rearrange(u, "b n (h d) -> b h n d", h=self.n_heads) for u in (*qk.chunk(2, -1), v))
        out, state = ttt(
            q,
            k,
            v,
            self.rates(x),
            list(self.weights),
            head=NormedResidual(self.inner_norm_weight, self.inner_norm_bias, self.eps),
            share=self.shares(),
            mini_batch=self.mini_batch,
            state=None if cache is None else cache.state,
            impl=self.impl,
        )
        out = self.norm(rearrange(out, "b h n d -> b n (h d)").to(x.dtype))
        out = self.out_proj(out * F.gelu(z, approximate="tanh") if self.d_gate else out)
        # --8<-- [end:block]
        if cache is not None:  # last of all: nothing that raises has changed it
            assert history is not None
            cache.conv, cache.state = history, state
        return out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, *, cache: TTTCache | None = None) -> Tensor: ...

    def new_cache(self, batch: int, max_len: int | None = None) -> TTTCache:
        """An empty cache for a batch of B sequences, of any length: max_len is not needed."""
        like = next(p for p in self.parameters() if p.is_floating_point())
        return TTTCache(like.new_zeros(batch, max(self.d_conv - 1, 0), 2 * self.n_heads * self.d_head))

    def _check(self, x: Any, cache: Any) -> None:
        check_tensors({"x": x})
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, N, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if cache is None:
            return
        if not isinstance(cache, TTTCache):
            raise TypeError(f"cache must be a TTTCache, from this module's new_cache, got {type(cache).__name__}")
        shape = (x.shape[0], max(self.d_conv - 1, 0), 2 * self.n_heads * self.d_head)
        if tuple(cache.conv.shape) != shape:
            raise ValueError(
                f"cache.conv must be {shape} for x {tuple(x.shape)} in this module, got {tuple(cache.conv.shape)}; "
                f"make one with new_cache({x.shape[0]})"
            )
        if cache.conv.device != x.device:
            raise ValueError(f"cache.conv must be on the device of x, {x.device}, got {cache.conv.device}")


def _start(heads: int, width: int, out: int, bias: bool) -> nn.Parameter:
    """The first value of a learned start (H, D, D'), small, with one more row of zeros for a bias."""
    w = torch.zeros(heads, width + bias, out)
    w[:, :width].normal_(std=0.02)
    return nn.Parameter(w)


class TTTLinear(TTT):
    """TTT with an inner model of one linear map: f(x; W, b) = x + LayerNorm(x W + b).

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(TTTLinear(64, 4), 64))

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        base_rate: η₀, as published.
        options: the others of `TTT`.
    """

    def __init__(self, d_model: int, n_heads: int, *, base_rate: float = 1.0, **options: Any):
        super().__init__(d_model, n_heads, base_rate=base_rate, **options)


class TTTMLP(TTT):
    """TTT with an inner model of two maps, the hidden one four times as wide, with GELU between them.

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(TTTMLP(64, 4), 64))

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        hidden: the hidden width as a multiple of D, in a tuple.
        base_rate: η₀, as published.
        options: the others of `TTT`.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, hidden: tuple[int, ...] = (4,), base_rate: float = 0.1, **options: Any
    ):
        super().__init__(d_model, n_heads, hidden=hidden, base_rate=base_rate, **options)
