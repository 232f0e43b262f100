"""Layers of linear attention with weights written by hand, each of which is exactly one step of gradient descent.

A token is (x_j, r_j), where r_j is what is still missed at x_j: at first y_j, and 0 at a question. One layer of linear
attention with a residual path gives

    r_j  <-  r_j - η/N Σ_i r_i (x_i · x_j)                 the sum over the examples i

If r_i = y_i - w · x_i for every example, then Σ r_i x_i / N is the downhill gradient of 1/(2N) Σ (w · x_i - y_i)², so
the layer turns w into w + η/N Σ r_i x_i without ever writing w down. At a question r is -w · x after every layer. The
weights of the layers do not depend on the examples; k layers are k steps.

Source: von Oswald et al. 2022 (2212.07677), proposition 1 and section 3. Symbols: B prompts, N examples, M questions, D
inputs.
"""

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.efficient_attention.feature_maps import identity
from nondual.efficient_attention.linear_attention import LinearAttention
from nondual.ops.checks import check_sizes, check_tensors
from nondual.self_attention import MultiHeadAttention
from nondual.transformer_layer import MixerBlock


@torch.no_grad()
def descent_layer(d: int, rate: float, dtype: torch.dtype | None = None) -> MixerBlock:
    """x + attention(x) over tokens (…, D + 1), whose four matrices are written by hand: one step of size `rate`.

    Args:
        d: D.
        rate: η/N, the step on half the sum of the squares.
        dtype: of the matrices; torch's default where left out.
    """
    # --8<-- [start:layer]
    op = LinearAttention(identity, normalise=False)
    mixer = MultiHeadAttention(d + 1, 1, bias=False, op=op).to(dtype)
    inputs = torch.eye(d + 1, dtype=dtype)
    inputs[d, d] = 0  # x alone: queries and keys
    missed = torch.eye(d + 1) - inputs  # r alone: values
    mixer.q_proj.weight.copy_(inputs)
    mixer.k_proj.weight.copy_(inputs)
    mixer.v_proj.weight.copy_(missed)
    mixer.out_proj.weight.copy_(-rate * missed)
    return MixerBlock(mixer, d + 1, norm=nn.Identity)
    # --8<-- [end:layer]


class DescentByAttention(nn.Module):
    """k layers of linear attention that are k steps of gradient descent from w = 0.

        model = DescentByAttention(5, n=20, steps=3, rate=0.5)
        said = model(x, y, questions)                             # (B, M)

    Args:
        d: D.
        n: N, how many examples the contexts have: the sum over them is divided by it.
        steps: k.
        rate: η, the step on half the mean of the squares.
        dtype: of the matrices; torch's default where left out.

    Raises:
        ValueError: d, n or steps below 1.
    """

    d: int
    layers: nn.ModuleList

    def __init__(self, d: int, *, n: int, steps: int, rate: float, dtype: torch.dtype | None = None):
        super().__init__()
        check_sizes(d=d, n=n, steps=steps)
        self.d = d
        self.layers = nn.ModuleList(descent_layer(d, rate / n, dtype) for _ in range(steps))

    def forward(
        self, x: Float[Tensor, "b n d"], y: Float[Tensor, "b n"], questions: Float[Tensor, "b m d"]
    ) -> Float[Tensor, "b m"]:
        """Predictions (B, M) at the questions.

        Args:
            x: inputs of the examples (B, N, D).
            y: their answers (B, N).
            questions: (B, M, D).

        Raises:
            TypeError: x, y or questions is not a Tensor.
            ValueError: shapes that do not fit.
        """
        check_tensors({"x": x, "y": y, "questions": questions})
        if x.ndim != 3 or x.shape[2] != self.d or y.shape != x.shape[:2]:
            raise ValueError(f"x must be (B, N, {self.d}) and y (B, N), got {tuple(x.shape)} and {tuple(y.shape)}")
        if questions.ndim != 3 or questions.shape[::2] != x.shape[::2]:
            raise ValueError(f"questions must be (B, M, D) = ({x.shape[0]}, M, {self.d}), got {tuple(questions.shape)}")
        n = x.shape[1]
        missed = torch.cat([y, y.new_zeros(questions.shape[:2])], 1)
        tokens = torch.cat([torch.cat([x, questions], 1), missed[..., None]], -1)  # (B, N + M, D + 1)
        examples = torch.arange(tokens.shape[1], device=x.device) < n  # no token reads a question
        for layer in self.layers:
            tokens = cast(MixerBlock, layer)(tokens, mask=examples[None, None, None])
        return -tokens[:, n:, -1]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        def __call__(self, x: Tensor, y: Tensor, questions: Tensor) -> Tensor: ...
