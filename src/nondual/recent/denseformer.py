"""DenseFormer: after each layer, a learned average of what all layers before it gave, the embeddings included.

Source: Pagliardini et al. 2024 (2402.02622), sections 3.1 and 3.2, where a layer is called a block. Symbols: L layers;
X_0 the embeddings, X_i what layer i gives, i from 1; dilation k and period p; a[i, j] the weight of X_j after layer i:

    Y_i = sum of a[i, j] X_j over j = i, i - k, i - 2k, ... down to 0 or more,       where p divides i
    Y_i = X_i                                                                        elsewhere
    X_(i + 1) = layer_(i + 1)(Y_i)

The weights are numbers, one for each pair of layers: they are the same for every token and every text, may be negative,
and need not sum to 1. They start as 1 for X_i and 0 for the others, which is the plain stream.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.connections import LayerCall, check_count
from nondual.ops.autocast import autocast_off
from nondual.ops.checks import check_sizes
from nondual.ops.dtypes import accumulation_dtype


class DenseFormer(nn.Module):
    """Depth-weighted averages, as a connection: CausalLM(..., connection=DenseFormer(n_layers)).

    Args:
        n_layers: L, of the model.
        dilation: k; each average is of every k-th layer, counted back from the last. 1 for all.
        period: p; an average stands after every p-th layer. 1 for after each.

    Raises:
        ValueError: one of them below 1.
    """

    n_layers: int
    dilation: int
    period: int
    weights: nn.ParameterList

    def __init__(self, n_layers: int, *, dilation: int = 1, period: int = 1):
        super().__init__()
        check_sizes(n_layers=n_layers, dilation=dilation, period=period)
        self.n_layers, self.dilation, self.period = n_layers, dilation, period
        # One vector an average, from the earliest of its layers to the last.
        self.weights = nn.ParameterList(
            nn.Parameter(torch.eye(1, 1 + i // dilation).flip(-1)[0]) for i in range(period, n_layers + 1, period)
        )

    def forward(self, x: Float[Tensor, "b n e"], layers: Sequence[LayerCall]) -> Float[Tensor, "b n e"]:
        """The embeddings (B, N, E) through the layers, and an average after every p-th.

        Args:
            x: (B, N, E).
            layers: of one forward pass, in order.

        Raises:
            ValueError: another number of layers.
        """
        check_count("layers", len(layers), self.n_layers)
        # --8<-- [start:averages]
        given = [x]  # X_0, X_1, ..., each (B, N, E)
        for i, layer in enumerate(layers, start=1):
            x = layer(x)
            given.append(x)
            if i % self.period == 0:
                # ..., X_(i - 2k), X_(i - k), X_i
                chosen = given[i % self.dilation :: self.dilation]
                x = weighted_sum(self.weights[i // self.period - 1], chosen)
        return x
        # --8<-- [end:averages]

    @torch.no_grad()
    def matrix(self) -> Float[Tensor, "averages given"]:
        """All weights as one matrix: a row for each average, a column for X_0 to X_L, 0 where none is."""
        rows = torch.zeros(len(self.weights), self.n_layers + 1)
        for row, weights in enumerate(self.weights):
            i = (row + 1) * self.period
            rows[row, i % self.dilation : i + 1 : self.dilation] = weights.float().cpu()
        return rows

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, layers: Sequence[LayerCall], /) -> Tensor: ...


def n_weights(n_layers: int, dilation: int = 1, period: int = 1) -> int:
    """How many weights a DenseFormer has: the sum of 1 + floor(i / k) over the multiples i of p up to L.

    With k = p = 1 it is L (L + 3) / 2.

    Args:
        n_layers: L.
        dilation: k.
        period: p.

    Raises:
        ValueError: one of them below 1.
    """
    check_sizes(n_layers=n_layers, dilation=dilation, period=period)
    return sum(1 + i // dilation for i in range(period, n_layers + 1, period))


def weighted_sum(weights: Float[Tensor, " l"], vectors: Sequence[Tensor]) -> Tensor:
    """The sum of weights[l] · vectors[l], in the dtype of the last vector, also under autocast.

    For the backward pass it keeps no more than the vectors themselves: a stack of them would be a copy for every sum,
    in a DenseFormer of L layers some L² / 2 vectors a position.

    Args:
        weights: (L,).
        vectors: L tensors of one shape, one or more.

    Raises:
        ValueError: no vectors, or another number of weights.
    """
    if not vectors or weights.shape != (len(vectors),):
        raise ValueError(
            f"weights must be one number for each vector, got {tuple(weights.shape)} for {len(vectors)} vectors"
        )
    dtype = vectors[-1].dtype
    with autocast_off(weights.device.type):
        # Each weight keeps an axis: a number without axes would leave a product of half precision in half precision.
        first, *others = weights.to(accumulation_dtype(dtype)).split(1)
        total = first * vectors[0]
        for weight, vector in zip(others, vectors[1:]):
            total = torch.addcmul(total, weight, vector)
        return total.to(dtype)
