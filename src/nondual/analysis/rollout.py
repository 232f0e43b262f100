"""Attention rolled out: how much of each input reaches each output, if all that layers did was to mix positions.

A layer passes a vector on and adds what attention brings, so it is read as the mixture (1 - r) A + r I, A the mean over
its heads and r the share of the residual path. The product over the layers has rows that sum to 1, as A has. What it
leaves out: what values, output projections and feed-forward networks do to the vectors.

Source: Abnar and Zuidema 2020 (2005.00928), section 3, equation 1, with r = 1/2. Symbols: L layers, B sequences,
H heads, N positions.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import at_least_float32


def attention_rollout(weights: Float[Tensor, "layers b h n n"], *, residual: float = 0.5) -> Float[Tensor, "b n n"]:
    """How much of each position's input is in each position's output, (B, N, N).

    Row i says what output i is mixed of: in a Vision Transformer with a class token, `[:, 0, 1:]` is the share of each
    patch in it. With registers or a distillation token, the patches begin at `model.n_special`.

    Args:
        weights: (L, B, H, N, N), each layer's attention, as `return_weights=True` and `weights_of` give them.
        residual: r, the share of the residual path in each layer, 0 to 1. 0 multiplies attention alone.

    Returns:
        (B, N, N) in float32, or float64 where the weights are; under autocast too.

    Raises:
        TypeError: weights are not a tensor.
        ValueError: not floating point (L, B, H, N, N), no layer or head, or a share that is not in 0 to 1.
    """
    # --8<-- [start:rollout]
    mixed = mixed_layers(weights, residual)  # (L, B, N, N)
    rolled = mixed[0]
    with autocast_off(mixed.device.type):  # it would multiply in half precision
        for layer in mixed[1:]:
            rolled = layer @ rolled  # what comes later is on the left
    return rolled
    # --8<-- [end:rollout]


def mixed_layers(weights: Float[Tensor, "layers b h n n"], residual: float = 0.5) -> Float[Tensor, "layers b n n"]:
    """(1 - r) A + r I of each layer, A the mean over its heads: rows sum to 1 where those of A do.

    Args:
        weights: as in `attention_rollout`.
        residual: r, as there.

    Returns:
        (L, B, N, N) in float32, or float64 where the weights are.

    Raises:
        TypeError, ValueError: as in `attention_rollout`.
    """
    check_tensors({"weights": weights})
    if weights.ndim != 5 or weights.shape[3] != weights.shape[4] or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating point (layers, B, H, N, N), got {weights.dtype} {tuple(weights.shape)}"
        )
    if not weights.shape[0] or not weights.shape[2]:
        raise ValueError(f"weights must be of 1 layer and 1 head or more, got {tuple(weights.shape)}")
    if not 0 <= residual <= 1:
        raise ValueError(f"residual must lie in 0 to 1, got {residual}")
    # --8<-- [start:mixed]
    mixed = (1 - residual) * at_least_float32(weights).mean(2)  # all heads alike
    return mixed + residual * torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
    # --8<-- [end:mixed]
