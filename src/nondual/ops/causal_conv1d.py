"""A short causal convolution, channel by channel: what a step sees is itself and the few steps before it.

    y_t = Σ_{j=0}^{K-1} w_{K-1-j} x_{t-j} + b

What Mamba has in front of its scan (Gu and Dao 2023, 2312.00752, figure 3). Symbols: B batch, L steps, D channels, K
the width of the window. The last K - 1 inputs are its whole memory, and are handed on as a scan hands on its state.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nondual.ops.autocast import as_autocast_does
from nondual.ops.checks import check_kinds, check_shapes, check_tensors


def causal_conv1d(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    history: Float[Tensor, "b k_1 d"] | None = None,
    *,
    reset: Bool[Tensor, "b l"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b k_1 d"]]:
    """The convolved sequence, and the inputs that the next call must remember.

    Splitting a sequence and handing on the history gives the same as the whole. Under autocast all is cast to
    its dtype.

    Args:
        x: (B, L, D); L may be 0, or less than the window.
        weight: (D, K), the latest step last, as in nn.Conv1d.
        bias: (D,).
        history: the K - 1 inputs before the first (B, K-1, D); zeros where left out.
        reset: True at the first step of each of several sequences packed along L: no window looks back across it.

    Returns:
        y (B, L, D), and the last K - 1 inputs (B, K-1, D), with zeros for those before the last reset, in memory of
        their own. Both in x's dtype, and differentiable any number of times, in reverse and in forward mode.

    Raises:
        TypeError: what is not a tensor.
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_tensors({"x": x, "weight": weight}, {"bias": bias, "history": history, "reset": reset})
    x, weight, bias, history = as_autocast_does(x, weight, bias, history)
    _check(x, weight, bias, history, reset)
    length, width = x.shape[1], weight.shape[1]
    if history is None:
        history = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if length == 0:
        return x.clone(), history.clone()
    window = torch.cat([history, x], 1)  # (B, K-1+L, D)
    if reset is None:
        y = F.conv1d(window.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
        return y, window[:, length:].clone()  # a copy: a view would keep the whole sequence in memory
    # --8<-- [start:reset]
    foreign = other_sequence(reset, width)
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for k in range(width):  # each tap on its own, since which of them count differs from step to step
        y = y + window[:, k : k + length].masked_fill(foreign[:, :, k, None], 0) * weight[:, k]
    return y, window[:, length:].masked_fill(foreign[:, -1, 1:, None], 0)
    # --8<-- [end:reset]


def other_sequence(reset: Bool[Tensor, "b l"], width: int) -> Bool[Tensor, "b l k"]:
    """Which of the K inputs in each step's window belong to an earlier sequence, and must not be seen from that step.

        reset  0 1 0, K = 3
        step 0 0 0 0    the history belongs to the sequence that was under way before the first step
        step 1 1 1 0
        step 2 1 0 0

    Args:
        reset: True at the first step of each sequence.
        width: K.
    """
    sequence = F.pad(reset.cumsum(1), (width - 1, 0))  # of each input (B, K-1+L)
    length = reset.shape[1]
    return torch.stack([sequence[:, k : k + length] for k in range(width)], 2) != sequence[:, width - 1 :, None]


def _check(x, weight, bias, history, reset) -> None:
    """Refuse what does not fit together: what was expected, what was got."""
    if x.ndim != 3:
        raise ValueError(f"x must be 3-dimensional (B, L, D), got {tuple(x.shape)}")
    batch, length, channels = x.shape
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be (D, K) with D = {channels} as in x and K of 1 or more, got {tuple(weight.shape)}"
        )
    check_shapes(
        {
            "bias": (bias, (channels,), "(D,)"),
            "history": (history, (batch, weight.shape[1] - 1, channels), "(B, K-1, D)"),
            "reset": (reset, (batch, length), "(B, L)"),
        }
    )
    check_kinds({"x": x, "weight": weight, "bias": bias, "history": history}, {}, reset)
