"""What a transformer layer does at each position by itself: a two-layer network, plain or gated.

Sources: Vaswani et al. 2017 (1706.03762), section 3.3; gated: Shazeer 2020 (2002.05202), equations 5 and 6. Symbols:
x (B, N, E), F the hidden width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.residual import dropped


class FeedForward(nn.Module):
    """The same two-layer network at every position: E -> F -> E.

    Args:
        d_model: width E.
        d_ff: width F, usually 4 E.
        activation: what stands between the two layers.
        dropout: probability of dropping a hidden unit while training.
    """

    linear1: nn.Linear
    linear2: nn.Linear
    activation: Callable[[Tensor], Tensor]
    dropout: nn.Dropout

    def __init__(
        self, d_model: int, d_ff: int, *, activation: Callable[[Tensor], Tensor] = F.gelu, dropout: float = 0.0
    ):
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E)."""
        return self.linear2(dropped(self.activation(self.linear1(x)), self.dropout))

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor) -> Tensor: ...


class GatedFeedForward(nn.Module):
    """A hidden layer times a gate: (activation(x W) ⊙ x V) W₂. SwiGLU as it comes, GEGLU with F.gelu.

    Args:
        d_model: width E.
        d_ff: width F; 8/3 E has as many weights as a plain network of 4 E.
        activation: of the gate.
        dropout: probability of dropping a hidden unit while training.
        bias: whether the three matrices have one.
    """

    gate: nn.Linear
    linear1: nn.Linear
    linear2: nn.Linear
    activation: Callable[[Tensor], Tensor]
    dropout: nn.Dropout

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.linear1 = nn.Linear(d_model, d_ff, bias=bias)
        self.linear2 = nn.Linear(d_ff, d_model, bias=bias)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        """x (B, N, E) -> (B, N, E)."""
        return self.linear2(dropped(self.activation(self.gate(x)) * self.linear1(x), self.dropout))

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor) -> Tensor: ...
