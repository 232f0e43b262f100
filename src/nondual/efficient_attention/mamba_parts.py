"""The parts that Mamba and Mamba-2 share: the cache, the convolution, the first step lengths, and checks of inputs.

Symbols: x (B, N, E) as in every mixer, D inner channels, K the convolution's width, S states.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nondual.ops.causal_conv1d import causal_conv1d, other_sequence
from nondual.ops.checks import check_kinds, check_shapes, check_tensors
from nondual.ops.dtypes import at_least_float32
from nondual.weights import only_a_weight


# --8<-- [start:cache]
@dataclass(eq=False)
class MambaCache:
    """All that a Mamba block remembers of what it has read: as much after one token as after a million.

    Made by a block's `new_cache`, and brought up to date by its `forward` and its `step`. They put new tensors in the
    place of the old ones and never write into them, so that `copy.copy(cache)` is a point to go back to.

    Attributes:
        conv: the last K - 1 inputs of the convolution (B, K-1, channels).
        state: the state of the scan, (B, D, S) or, in Mamba-2, (B, H, P, S); float32, or float64.
    """

    conv: Tensor
    state: Tensor

    def reset(self) -> None:
        """Zero window and zero state."""
        self.conv, self.state = torch.zeros_like(self.conv), torch.zeros_like(self.state)

    # --8<-- [end:cache]

    def select(self, rows: Int[Tensor, " r"]) -> "MambaCache":
        """A cache of its own for these rows of the batch, in this order; a row may be taken more than once."""
        return MambaCache(self.conv[rows], self.state[rows])

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


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a linear layer, of whatever class: quantised layers have a method of that name."""
    bias = getattr(module, "bias", None)
    return cast("Tensor | None", bias() if callable(bias) else bias)


def without_bias(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x) less its bias, which is added later, where sums are kept in float32."""
    if only_a_weight(linear, nn.Linear):
        return F.linear(x, linear.weight)
    y, bias = linear(x), bias_of(linear)
    return y if bias is None else (at_least_float32(y) - bias).to(y.dtype)


def convolve(
    conv1d: nn.Module, x: Tensor, history: Tensor | None, reset: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """What `causal_conv1d` computes, by a module.

    Args:
        conv1d: an nn.Conv1d of D groups without padding, or what stands in its place.
        x: (B, N, D).
        history: the K - 1 inputs before x (B, K-1, D); zeros where left out.
        reset: (B, N), True where a packed sequence begins.
        width: K.

    Returns:
        y (B, N, D), and the last K - 1 inputs (B, K-1, D), with zeros for those before the last reset.
    """
    length, plain = x.shape[1], conv1d if only_a_weight(conv1d, nn.Conv1d) else None
    if plain is not None and not (length == 1 and reset is None):
        return causal_conv1d(x, plain.weight[:, 0], plain.bias, history, reset=reset)
    if history is None:
        history = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    window = torch.cat([history, x], 1)
    if plain is not None:  # one position: a sum, since a call of conv1d costs several times as much on a CPU
        y = (at_least_float32(window) * plain.weight[:, 0].T).sum(1, keepdim=True)
        return (y if plain.bias is None else y + plain.bias).to(x.dtype), window[:, 1:].clone()
    if length == 0:
        return x, history
    if reset is None:
        return conv1d(window.transpose(1, 2)).transpose(1, 2), window[:, length:].clone()
    check_shapes({"reset": (reset, tuple(x.shape[:2]), "(B, N)")})
    check_kinds({"x": x}, {}, reset)
    foreign = other_sequence(reset, width)  # (B, N, K)
    windows = window.unfold(1, width, 1).masked_fill(foreign[:, :, None], 0)  # (B, N, D, K)
    y = conv1d(windows.flatten(0, 1)).view(x.shape)
    return y, window[:, length:].masked_fill(foreign[:, -1, 1:, None], 0)


def past_rows(mixer: Any, x: Tensor, past: Tensor | None, reset: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The K - 1 inputs of a mixer's convolution before x (B, N, D), None for zeros; and x.

    Args:
        mixer: its `rows_before`, where it is not None, is called with x, K - 1, history= and reset=, and returns both.
        x: (B, N, D).
        past: what a cache holds of them.
        reset: (B, N), True where a packed sequence begins.
    """
    if mixer.rows_before is None:
        return past, x
    return mixer.rows_before(x, mixer.d_conv - 1, history=past, reset=reset)


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
    delta = torch.exp(low + (high - low) * torch.rand(n).double()).clamp(min=floor)
    bias = delta + torch.log(-torch.expm1(-delta))  # the inverse of softplus, exact for small delta too
    return bias.to(torch.get_default_dtype())


def empty_cache(conv1d: nn.Module, D: Tensor, conv: tuple[int, ...], state: tuple[int, ...]) -> MambaCache:
    """A cache of these shapes, all zeros, on the device of D: the window in the dtype of conv1d's weight, or of D where
    that is no floating-point tensor (a quantised layer), the state in float32 or better."""
    weight = getattr(conv1d, "weight", None)
    like = weight if isinstance(weight, Tensor) and weight.is_floating_point() else D
    return MambaCache(conv=D.new_zeros(conv, dtype=like.dtype), state=at_least_float32(like.new_zeros(state)))


def one_step(mixer: nn.Module, x: Tensor, cache: MambaCache) -> Tensor:
    """The forward of a sequence of one position: x (B, E) -> (B, E)."""
    check_tensors({"x": x})
    if x.ndim != 2:
        raise ValueError(f"x must be (B, E), one position of each sequence, got {tuple(x.shape)}")
    return mixer(x[:, None], cache=cache)[:, 0]


def step_engine(impl: str, x: Tensor) -> Any:
    """The engine for x (B, N, E): "auto" is "reference" for one position on a CPU, where every other costs more to call
    than it computes."""
    return "reference" if impl == "auto" and x.shape[1] == 1 and x.device.type == "cpu" else impl


def check_input(x: Tensor, width: int, cache: MambaCache | None) -> None:
    """Refuse an x that is not a floating-point Tensor (B, N, E) of this E, and what is no cache."""
    check_tensors({"x": x})
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"x must be (B, N, {width}), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    if cache is not None and not isinstance(cache, MambaCache):
        raise TypeError(f"cache must be a MambaCache, from this module's new_cache, got {type(cache).__name__}")
