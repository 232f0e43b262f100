"""Linear attention as the op of a module: a feature map, a normaliser, and the sum over keys taken first.

Source: Katharopoulos et al. 2020 (2006.16236), section 3.2. Symbols: B batch, H heads, G key/value heads, N queries, M
keys, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nondual.efficient_attention.feature_maps import elu_plus_one
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.linear_attention import Impl, linear_attention


class LinearAttention(nn.Module):
    """What `MultiHeadAttention(op=...)` calls: φ(q) (φ(k)ᵀ v), divided by φ(q) · Σ φ(k).

        MultiHeadAttention(512, 8, op=LinearAttention())
        MultiHeadAttention(512, 8, op=LinearAttention(PositiveRandomFeatures(64, 256)))

    Time and memory grow with N + M, not with N M. It has no scale of its own: a feature map may bring one along. It is
    a module, so that a feature map with weights moves, is saved and is trained with it.

    A key/value cache keeps every position, which linear attention does not need. So this op refuses to go on from one;
    `LinearAttentionMixer` is the same attention with a cache of fixed size.

    Args:
        feature_map: φ, from (…, D) to (…, F).
        normalise: divide by the sum of the weights, so that they sum to 1.
        chunk: as in `nondual.ops.linear_attention`.
        impl: likewise.
    """

    feature_map: Callable[[Tensor], Tensor]
    normalise: bool
    chunk: int | None
    impl: Impl

    def __init__(
        self,
        feature_map: Callable[[Tensor], Tensor] = elu_plus_one,
        *,
        normalise: bool = True,
        chunk: int | None = None,
        impl: Impl = "auto",
    ):
        super().__init__()
        self.feature_map, self.normalise, self.chunk, self.impl = feature_map, normalise, chunk, impl

    def forward(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m dv"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        return_weights: bool = False,
    ) -> Any:
        """Out (B, H, N, Dv), or (out, weights (B, H, N, M)).

        Args:
            q: queries (B, H, N, D).
            k: keys (B, G, M, D), H a multiple of G.
            v: values (B, G, M, Dv).
            mask: which keys there are, boolean (B or 1, 1, 1, M), as `nondual.ops.masks.padding` makes it: True where
                one is read. Which query sees which key cannot be said, since all queries read one sum.
            causal: no query sees a later key; then N must be M.
            dropout: 0.
            return_weights: also return the weights, which are formed for it, N x M.

        Raises:
            TypeError: q, k, v or mask is not a tensor.
            ValueError: a mask of another kind, a dropout, causal with N != M, or q, k and v that do not fit.
        """
        check_tensors({"q": q, "k": k, "v": v}, {"mask": mask})
        if dropout:
            raise ValueError(f"dropout must be 0 for linear attention, which keeps no weights to drop, got {dropout}")
        if causal and q.ndim == k.ndim == 4 and q.shape[2] != k.shape[2]:
            raise ValueError(
                f"q and k must have the same length for a causal linear attention, got {q.shape[2]} and {k.shape[2]}; "
                "to go on from a cache use LinearAttentionMixer, whose cache does not grow"
            )
        q, k = self.feature_map(q), self.feature_map(k)
        if mask is not None:
            keys = _of_keys(mask, k)
            k, v = k.masked_fill(~keys, 0), v.masked_fill(~keys, 0)
        wide = accumulation_dtype(q.dtype, v.dtype) if q.dtype != v.dtype else v.dtype
        dtype, (q, k, v) = v.dtype, (x.to(wide) for x in (q, k, v))
        given = {"normalise": self.normalise, "causal": causal, "chunk": self.chunk, "impl": self.impl}
        out = linear_attention(q, k, v, **given)[0].to(dtype)
        if not return_weights:
            return out
        M = torch.eye(k.shape[2], dtype=wide, device=k.device).expand(*k.shape[:3], -1)
        return out, linear_attention(q, k, M, **given)[0].to(dtype)


def _of_keys(mask: Tensor, k: Tensor) -> Tensor:
    """A mask (B or 1, 1, 1, M) as (B or 1, 1, M, 1)."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:] != (1, 1, k.shape[2]):
        raise ValueError(
            f"mask must be boolean (B, 1, 1, M) with M = {k.shape[2]} for linear attention, which sums over all keys "
            f"before a query reads them, got {mask.dtype} {tuple(mask.shape)}; for sequences packed along N, and for a "
            "cache, use LinearAttentionMixer"
        )
    return mask.transpose(2, 3)
