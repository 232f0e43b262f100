"""The delta rule: what is written at a key is the difference from what is read there, so that a key can be overwritten.

Source: Schlag, Irie and Schmidhuber 2021 (2102.11174), section 4.2; for the block Yang et al. 2024 (2406.06484); with a
decay Yang, Kautz and Hatamizadeh 2024 (2412.06464), section 3.1; for β above 1 Grazzi et al. 2024 (2411.12537).
Symbols: x (B, N, E), H heads of width D.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nondual.efficient_attention.linear_attention.mixer import LinearMixer
from nondual.efficient_attention.mamba_parts import step_bias
from nondual.ops.dtypes import at_least_float32
from nondual.ops.linear_attention import Impl


class DeltaNet(LinearMixer):
    """S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ, q and k of length 1, β_t = beta_max · sigmoid(x_t W_β).

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(DeltaNet(64, 4), 64))

    The state is multiplied by I - β_t k_t k_tᵀ, which has the eigenvalue 1 - β_t along k_t and 1 elsewhere. With
    beta_max=2 it can be negative, which keeping count of even and odd needs.

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        d_head: width D of queries and keys; d_model / n_heads where left out.
        d_value: width of values; D where left out.
        d_conv: width of the short convolution; 0 for none.
        beta_max: the largest β, above 0 and at most 2.
        norm: whether each head's output is divided by its root mean square.
        gate: whether the output is multiplied by silu(x W_z).
        chunk: as in `nondual.ops.linear_attention`.
        impl: likewise.

    Raises:
        ValueError: a size below 1, heads that do not divide d_model, or a beta_max outside (0, 2].
    """

    scale: float
    beta_max: float
    beta_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        beta_max: float = 1.0,
        norm: bool = True,
        gate: bool = False,
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
        if not 0 < beta_max <= 2:
            raise ValueError(f"beta_max must be above 0 and at most 2, beyond which the state grows, got {beta_max}")
        self.scale, self.beta_max = self.d_head**-0.5, beta_max
        self.beta_proj = nn.Linear(d_model, n_heads, bias=False)

    def features(self, q: Tensor, k: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """q and k of length 1."""
        return F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)

    def gates(self, x: Float[Tensor, "b n e"]) -> dict[str, Tensor]:
        """How much of the difference each head writes."""
        # --8<-- [start:beta]
        beta = self.beta_max * at_least_float32(self.beta_proj(x)).sigmoid()
        # --8<-- [end:beta]
        return {"beta": beta.mT}


class GatedDeltaNet(DeltaNet):
    """The delta rule over a state that decays first: S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ with S' = α_t S_{t-1}.

        CausalLM(256, 64, 4, layer=lambda i: MixerBlock(GatedDeltaNet(64, 4), 64))

    α_t = exp(-softplus(x_t W_α + b) A), one for each head, as Mamba-2 has it.

    Args:
        d_model: width E of x and of the output.
        n_heads: H.
        d_head: width D of queries and keys; d_model / n_heads where left out.
        d_value: width of values; D where left out.
        d_conv: width of the short convolution; 0 for none.
        beta_max: the largest β, above 0 and at most 2.
        norm: whether each head's output is divided by its root mean square.
        gate: whether the output is multiplied by silu(x W_z), as the paper has it.
        dt_min: the shortest step length softplus(b) at the start.
        dt_max: the longest.
        chunk: as in `nondual.ops.linear_attention`.
        impl: likewise.

    Raises:
        ValueError: a size below 1, heads that do not divide d_model, a beta_max outside (0, 2], or step lengths out of
            order.
    """

    step_proj: nn.Linear
    dt_bias: nn.Parameter
    A_log: nn.Parameter

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        d_head: int | None = None,
        d_value: int | None = None,
        d_conv: int = 4,
        beta_max: float = 1.0,
        norm: bool = True,
        gate: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        chunk: int | None = None,
        impl: Impl = "auto",
    ):
        super().__init__(
            d_model,
            n_heads,
            d_head=d_head,
            d_value=d_value,
            d_conv=d_conv,
            beta_max=beta_max,
            norm=norm,
            gate=gate,
            chunk=chunk,
            impl=impl,
        )
        self.step_proj = nn.Linear(d_model, n_heads, bias=False)
        self.dt_bias = nn.Parameter(step_bias(n_heads, dt_min, dt_max))
        self.A_log = nn.Parameter(torch.empty(n_heads).uniform_(1, 16).log())

    def gates(self, x: Float[Tensor, "b n e"]) -> dict[str, Tensor]:
        """How much of the difference each head writes, and how much of its state is left before."""
        # --8<-- [start:decay]
        step = F.softplus(at_least_float32(self.step_proj(x)) + self.dt_bias)
        log_decay = -at_least_float32(self.A_log).exp() * step
        # --8<-- [end:decay]
        return super().gates(x) | {"log_decay": log_decay.mT}
