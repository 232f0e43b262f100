"""Gated linear attention: each channel of the keys forgets at a pace that the input sets at every step.

Source: Yang et al. 2023 (2312.06635), sections 4.1 and 4.4. Symbols: x (B, N, E), H heads of width D.
"""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nondual.efficient_attention.linear_attention.mixer import LinearMixer
from nondual.ops.dtypes import at_least_float32
from nondual.ops.linear_attention import Impl


class GatedLinearAttention(LinearMixer):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ with α_t = sigmoid(x_t W_1 W_2 + b)^(1/τ), one for each channel.

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(GatedLinearAttention(64, 4), 64))

    Where we differ from the paper: queries and keys are as wide as values where d_value is left out (there half as
    wide).

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        d_head: width D of queries and keys; d_model / n_heads where left out.
        d_value: width of values; D where left out.
        d_conv: width of a short convolution; 0 for none, as published.
        rank: of the decays' projection, W_1 (E, rank) and W_2 (rank, H D).
        temperature: τ; the larger, the slower the state is forgotten at the start.
        norm: whether each head's output is divided by its root mean square.
        gate: whether the output is multiplied by silu(x W_z), as the paper has it.
        chunk: as in `nondual.ops.linear_attention`.
        impl: likewise.

    Raises:
        ValueError: a size below 1, or heads that do not divide d_model.
    """

    scale: float
    temperature: float
    decay_proj: nn.Sequential

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_value: int | None = None,
        d_conv: int = 0,
        rank: int = 16,
        temperature: float = 16.0,
        norm: bool = True,
        gate: bool = True,
        chunk: int | None = None,
        impl: Impl = "auto",
    ):
        super().__init__(
            d_model,
            n_heads,
            d_head=d_head,
            d_value=d_value,
            d_conv=d_conv,
            norm=norm,
            gate=gate,
            chunk=chunk,
            impl=impl,
        )
        self.scale, self.temperature = self.d_head**-0.5, temperature
        self.decay_proj = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, n_heads * self.d_head))

    def gates(self, x: Float[Tensor, "b n e"]) -> dict[str, Tensor]:
        """The decay of each channel."""
        # --8<-- [start:decay]
        log_decay = F.logsigmoid(at_least_float32(self.decay_proj(x))) / self.temperature
        # --8<-- [end:decay]
        return {"log_decay": rearrange(log_decay, "b n (h d) -> b h n d", h=self.n_heads)}
