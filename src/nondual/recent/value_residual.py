"""Value residuals: the values that attention averages in each layer are mixed with those of the first layer.

Source: Zhou et al. 2024 (2410.17897), section 3, its ResFormer with learned weights. Symbols: V_n the values of layer
n, (B, G, N, D), n from 1:

    V'_n = a_n V_1 + b_n V_n,    n = 2 ... L

Queries and keys stay the layer's own. The paper also gives a model whose layers all use V_1 and have no values of their
own (SVFormer), for its smaller cache; with a = 1 and b = 0 this computes the same, without that saving.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.connections import LayerCall, check_count
from nondual.mixers import check_takes
from nondual.ops.checks import check_sizes


class ValueResidual(nn.Module):
    """Values of the first layer in all later ones, as a connection: GPT(..., connection=ValueResidual(n_layers)).

    The mixers must be attention with as many key/value heads in each layer, and take `values=`, as
    `MultiHeadAttention` does.

    Args:
        n_layers: L, of the model.
        first: what a_n starts at. With first=0 and own=1 the model starts as the plain stream.
        own: what b_n starts at.

    Raises:
        ValueError: n_layers below 1.
    """

    n_layers: int
    first: nn.Parameter
    own: nn.Parameter

    def __init__(self, n_layers: int, *, first: float = 0.5, own: float = 0.5):
        super().__init__()
        check_sizes(n_layers=n_layers)
        self.n_layers = n_layers
        self.first = nn.Parameter(torch.full((n_layers - 1,), float(first)))
        self.own = nn.Parameter(torch.full((n_layers - 1,), float(own)))

    def forward(self, x: Float[Tensor, "b n e"], layers: Sequence[LayerCall]) -> Float[Tensor, "b n e"]:
        """The embeddings (B, N, E) through the layers, each told what to do to its values.

        Args:
            x: (B, N, E).
            layers: of one forward pass, in order.

        Raises:
            ValueError: another number of layers, a layer without a mixer, a mixer that takes no values, or whose values
                have another number of heads or another width than those of the first layer.
        """
        check_count("layers", len(layers), self.n_layers)
        for i, layer in enumerate(layers):
            if not hasattr(layer.layer, "mixer"):
                raise ValueError(
                    f"layers must have a mixer whose values can be mixed, as TransformerLayer and MixerBlock do, got "
                    f"{type(layer.layer).__name__}"
                )
            check_takes(cast(Any, layer.layer).mixer, "values", f"layer {i}")
        # --8<-- [start:mix]
        values: list[Tensor] = []  # V_1, once the first layer has run

        def mixed(n: int) -> Callable[[Tensor], Tensor]:
            def mix(v: Tensor) -> Tensor:
                if n == 0:
                    values.append(v)
                    return v
                _check_like_the_first(v, values[0], n)
                return self.first[n - 1] * values[0] + self.own[n - 1] * v

            return mix

        for n, layer in enumerate(layers):
            x = layer(x, values=mixed(n))
        return x
        # --8<-- [end:mix]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, layers: Sequence[LayerCall], /) -> Tensor: ...


def _check_like_the_first(v: Tensor, first: Tensor, n: int) -> None:
    """Refuse values (B, G, N, D) with other heads than the first layer's: one head would be added to several."""
    if v.shape[1] != first.shape[1] or v.shape[3] != first.shape[3]:
        raise ValueError(
            f"mixers must have as many key/value heads of one width in every layer, got {first.shape[1]} of width "
            f"{first.shape[3]} in layer 0 and {v.shape[1]} of width {v.shape[3]} in layer {n}"
        )
