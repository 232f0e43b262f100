"""A causal transformer that reads examples of a function and says, for each input, what its answer will be.

    x_1    (x_1, y_1)    x_2    (x_2, y_2)    x_3    …
     |                    |                    |
    ŷ_1                  ŷ_2                  ŷ_3          ŷ_3 from two examples

Source: Garg et al. 2022 (2208.01066), section 3. Where we differ: the token of an answer carries its input as well, so
that a layer need not first bring the two together; and there are no positions, so that a prompt may be of any length.
Symbols: B prompts, N examples, D inputs, E width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.ops.checks import check_sizes, check_tensors
from nondual.transformer import Encoder


class InContextRegressor(nn.Module):
    """Examples of a function to predictions of each answer, from the examples before it and its own input.

        model = InContextRegressor(5, 64, 3, 4)
        said = model(x, y)                              # (B, N): said[:, i] has seen x[:, : i + 1] and y[:, :i]
        loss = (said - y).square().mean()

    Args:
        d: D, how many inputs the functions have.
        d_model: width E.
        n_layers: how many layers.
        n_heads: heads of each layer.
        d_ff: width of the feed-forward networks; 4 E where left out.
        mixer: makes the causal mixer of one layer, given E, in place of attention; n_heads then counts for nothing.

    Raises:
        ValueError: a d below 1, or what the layers refuse.
    """

    d: int
    read_in: nn.Linear
    encoder: Encoder
    read_out: nn.Linear

    def __init__(
        self,
        d: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        *,
        d_ff: int | None = None,
        mixer: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        check_sizes(d=d)
        self.d = d
        self.read_in = nn.Linear(d + 2, d_model)  # x, y, and whether y is known
        self.encoder = Encoder(
            d_model,
            n_heads,
            4 * d_model if d_ff is None else d_ff,
            n_layers,
            norm_first=True,
            causal=True,
            mixer=mixer,
        )
        self.read_out = nn.Linear(d_model, 1)

    def forward(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Predictions (B, N) of y: each from its own x and the examples before it.

        Args:
            x: (B, N, D), in the dtype of the weights.
            y: (B, N), likewise. The last answer is read by nothing.

        Raises:
            TypeError: x or y is not a Tensor.
            ValueError: x or y of another shape, or not floating point.
        """
        return self.read_out(self.read(x, y))[..., 0]

    def read(self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"]) -> Float[Tensor, "b n e"]:
        """What the model has made of each question, (B, N, E), before a prediction is read from it.

        Args:
            x: as in `forward`.
            y: as in `forward`.

        Raises:
            TypeError, ValueError: as in `forward`.
        """
        check_tensors({"x": x, "y": y})
        if x.ndim != 3 or x.shape[2] != self.d or not x.is_floating_point():
            raise ValueError(f"x must be floating point (B, N, {self.d}), got {x.dtype} {tuple(x.shape)}")
        if y.shape != x.shape[:2] or not y.is_floating_point():
            raise ValueError(f"y must be floating point (B, N) = {tuple(x.shape[:2])}, got {y.dtype} {tuple(y.shape)}")
        # --8<-- [start:tokens]
        given = torch.stack([y, torch.ones_like(y)], -1)  # y, and that it is known
        questions = torch.cat([x, torch.zeros_like(given)], -1)  # (B, N, D + 2)
        answers = torch.cat([x, given], -1)
        tokens = torch.stack([questions, answers], 2).flatten(1, 2)  # (B, 2N, D + 2)
        return self.encoder(self.read_in(tokens))[:, ::2]  # what stands at the questions
        # --8<-- [end:tokens]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...
