"""Flash attention as the op of a module: exact attention that never holds the N x M weights.

Source: Dao et al. 2022 (2205.14135). The algorithm, forward and backward, is `nondual.ops.flash_attention.reference`;
the kernels are `nondual.ops.flash_attention.triton`. Symbols: B batch, H heads, N queries, M keys, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nondual.ops.attention import attention
from nondual.ops.flash_attention import Impl, flash_attention


@dataclass(frozen=True)
class FlashAttention:
    """What `MultiHeadAttention(op=...)` calls, over the flash kernels; it has no parameters.

        MultiHeadAttention(512, 8, op=FlashAttention())            # the same module, its weights never formed
        MultiHeadAttention(512, 8, op=FlashAttention(window=128))  # each position sees the last 128

    Attributes:
        window: how many keys a query sees, its own included; it implies causal. All where None.
        scale: factor on q · k; 1/√D where None.
        impl: "auto", "reference", "sdpa" or "triton", as in `nondual.ops.flash_attention`.
        otherwise: the op that is called instead where a mask, a dropout or the weights are asked for, such as
            `nondual.ops.attention.attention`; where None, that is an error. It cannot go with a window.
    """

    window: int | None = None
    scale: float | None = None
    impl: Impl = "auto"
    otherwise: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if self.otherwise is not None and self.window is not None:
            raise ValueError(f"otherwise must be None with a window, which it does not know, got {self.otherwise}")

    def __call__(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Float[Tensor, "b h n dv"]:
        """Attention as `nondual.ops.attention.attention` gives it, for what can be had without forming the weights.

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, M, D), H a multiple of G.
            v: values (B, G, M, Dv).
            mask: None, unless there is `otherwise`. Which keys a query sees follows from positions alone: causal and
                window.
            causal: no query sees a later key.
            dropout: 0, unless there is `otherwise`.
            return_weights: False, unless there is `otherwise`.

        Returns:
            out (B, H, N, Dv).

        Raises:
            TypeError: q, k or v is not a tensor.
            ValueError: a mask, a dropout or the weights are asked for without `otherwise`; or q, k and v do not fit.
            RuntimeError: as in `nondual.ops.flash_attention.flash_attention`.
        """
        if self.otherwise is not None and (mask is not None or dropout or return_weights):
            scale = {} if self.scale is None else {"scale": self.scale}
            return self.otherwise(
                q, k, v, mask=mask, causal=causal, dropout=dropout, return_weights=return_weights, **scale
            )
        if mask is not None:
            raise ValueError(
                "mask must be None for flash attention, which knows causal and window, "
                f"got a mask {tuple(mask.shape)}, which a bias of positions such as ALiBi is too{_ELSE}"
            )
        if dropout:
            raise ValueError(
                f"dropout must be 0 for flash attention, which keeps no weights to drop, got {dropout}{_ELSE}"
            )
        if return_weights:
            raise ValueError(f"return_weights must be False for flash attention, which never forms them{_ELSE}")
        if self.impl == "auto" and self.window is None and _is_one_on_cpu(q):
            return attention(q, k, v, scale=self.scale)  # torch's kernel either way; this way is shorter
        return flash_attention(q, k, v, causal=causal, window=self.window, scale=self.scale, impl=self.impl)


def _is_one_on_cpu(q: Tensor) -> bool:
    """Whether there is one query in each row, as while a text is written: it sees all keys, and its weights are few."""
    return isinstance(q, Tensor) and q.ndim == 4 and q.shape[2] == 1 and q.device.type == "cpu"


_ELSE = "; for that use op=nondual.ops.attention.attention"
