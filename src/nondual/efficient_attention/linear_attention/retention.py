"""Retention: every head forgets at a fixed pace of its own.

Source: Sun et al. 2023 (2307.08621), equations 5 to 8. Symbols: x (B, N, E), H heads of width D.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nondual.efficient_attention.linear_attention.mixer import LinearMixer
from nondual.ops.linear_attention import Impl
from nondual.relative_positions import RelativePositions, Rotary


class Retention(LinearMixer):
    """S_t = γ S_{t-1} + k_t v_tᵀ with γ = 1 - 2^(-5-h) for head h = 0, 1, …; q and k are turned by their place.

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(Retention(64, 4), 64))

    Where we differ from the paper: values are as wide as keys where d_value is left out (there twice as wide), and the
    norm of each head is a root-mean-square norm with weights (there without).

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        d_head: width D of queries and keys, even if rotary; d_model / n_heads where left out.
        d_value: width of values; D where left out.
        d_conv: width of a short convolution; 0 for none, as published.
        rotary: whether q and k are turned by their place, as the paper has it.
        norm: whether each head's output is divided by its root mean square.
        gate: whether the output is multiplied by silu(x W_z), as the paper has it.
        chunk: as in `nondual.ops.linear_attention`.
        impl: likewise.

    Raises:
        ValueError: a size below 1, heads that do not divide d_model, or an odd width to be turned.
    """

    scale: float
    log_decay: Tensor
    positions: RelativePositions | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_value: int | None = None,
        d_conv: int = 0,
        rotary: bool = True,
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
        self.scale = self.d_head**-0.5
        self.positions = Rotary(self.d_head) if rotary else None
        # --8<-- [start:decay]
        decay = torch.log1p(-(2.0 ** (-5 - torch.arange(n_heads, dtype=torch.float64))))
        self.register_buffer("log_decay", decay.to(torch.get_default_dtype()), persistent=False)
        # --8<-- [end:decay]

    def features(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """q and k turned by their places."""
        if self.positions is None:
            return q, k
        return self.positions.turn(q, start), self.positions.turn(k, start)

    def gates(self, x: Float[Tensor, "b n e"]) -> dict[str, Tensor]:
        """The decay of each head."""
        return {"log_decay": self.log_decay}
