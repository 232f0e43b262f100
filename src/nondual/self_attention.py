"""Self-attention: queries, keys and values are three projections of one X.

Source: Vaswani et al. 2017 (1706.03762), sections 3.2.1 and 3.2.2; grouped key/value heads: Ainslie et al. 2023
(2305.13245). Symbols: x (B, N, E), memory (B, M, E), H heads of width D, G key/value heads.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.ops.attention import attention
from nondual.ops.autocast import is_autocasting
from nondual.ops.checks import check_tensors


class SelfAttention(nn.Module):
    """One head: Q = X W_Q, K = X W_K, V = X W_V, out = softmax(Q Kᵀ / √d_k) V.

    Args:
        d_model: width E of x.
        d_k: width of queries and keys; d_model where left out.
        d_v: width of values, and of the output; d_k where left out.
        bias: whether the projections have one.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def __init__(self, d_model: int, d_k: int | None = None, d_v: int | None = None, *, bias: bool = False):
        super().__init__()
        d_k = d_model if d_k is None else d_k
        self.q_proj = nn.Linear(d_model, d_k, bias=bias)
        self.k_proj = nn.Linear(d_model, d_k, bias=bias)
        self.v_proj = nn.Linear(d_model, d_k if d_v is None else d_v, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dv"] | tuple[Float[Tensor, "b n dv"], Float[Tensor, "b n n"]]:
        """x (B, N, E) looks at itself: out (B, N, d_v), and the weights (B, N, N) if asked for.

        Args:
            x: (B, N, E), of the dtype of the weights, or any that autocast casts.
            mask: as in `nondual.ops.attention.attention`.
            causal: no position sees a later one.
            return_weights: also return the weights.

        Raises:
            TypeError: x or mask is not a tensor.
            ValueError: x of another rank or width, or a mask that does not fit.
        """
        _check_width("x", x, self.q_proj.in_features)
        # --8<-- [start:one_head]
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, N, d_k), (B, N, d_k), (B, N, d_v)
        q, k, v = q[:, None], k[:, None], v[:, None]  # one head: (B, 1, N, ·)
        out = attention(q, k, v, mask=mask, causal=causal, return_weights=return_weights)
        # --8<-- [end:one_head]
        return (out[0][:, 0], out[1][:, 0]) if isinstance(out, tuple) else out[:, 0]

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False, return_weights: Literal[False] = False
        ) -> Tensor: ...

        @overload
        def __call__(
            self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False, return_weights: Literal[True]
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False, return_weights: bool
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class MultiHeadAttention(nn.Module):
    """H heads side by side in subspaces of width D, joined by W_O: self-attention, or cross-attention over a memory.

    Its state_dict has q_proj, k_proj, v_proj and out_proj; a state_dict of nn.MultiheadAttention loads as it is.
    Its masks are True where attending is allowed: invert nn.MultiheadAttention's with `~`.

    Args:
        d_model: width E of x and of the output.
        n_heads: H, the query heads.
        n_kv_heads: G, the key/value heads, a divisor of H; H where left out.
        d_head: D; d_model / n_heads where left out.
        d_memory: width of the memory in cross-attention; d_model where left out.
        bias: whether the four projections have one.
        dropout: probability of dropping a weight while training.
        op: what joins q, k and v, called as `nondual.ops.attention.attention` is.

    Raises:
        ValueError: head counts that do not divide, or a dropout outside [0, 1).
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    dropout: float
    op: Callable[..., Any]
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        d_memory: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        op: Callable = attention,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        d_memory = d_model if d_memory is None else d_memory
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, both 1 or more, got {n_heads} and {n_kv_heads}"
            )
        if d_head is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}; or give d_head")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        d_head = d_model // n_heads if d_head is None else d_head
        self.n_heads, self.n_kv_heads, self.d_head, self.dropout, self.op = n_heads, n_kv_heads, d_head, dropout, op
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_memory, n_kv_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_memory, n_kv_heads * d_head, bias=bias)
        self.out_proj = nn.Linear(n_heads * d_head, d_model, bias=bias)
        self.register_load_state_dict_pre_hook(_from_torch)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        memory: Float[Tensor, "b m em"] | None = None,
        *,
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        causal: bool = False,
        cache: "KVCache | None" = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "b h n m"]]:
        """x (B, N, E) attends to itself, to what the cache holds of its past, or to `memory` (B, M, d_memory).

        Args:
            x: (B, N, E).
            memory: what is attended to instead of x.
            mask: (N, M) or broadcastable to (B, H, N, M); True where attending is allowed.
            causal: no position sees a later one.
            cache: keys and values of the positions before x; x's own are appended. Whatever this call raises, the
                cache is then as it was before.
            return_weights: also return the weights (B, H, N, M).

        Returns:
            out (B, N, E), or (out, weights).

        Raises:
            TypeError: x, memory or mask is not a tensor.
            ValueError: a rank, width or batch that does not fit; a cache together with a memory; a full cache.
            RuntimeError: a cache while gradients are recorded.
        """
        _check_width("x", x, self.q_proj.in_features)
        if memory is not None:
            _check_width("memory", memory, self.k_proj.in_features)
            if cache is not None:
                raise ValueError("cache holds x's own past and cannot go with memory: give one of the two")
        elif self.k_proj.in_features != self.q_proj.in_features:
            raise ValueError(f"memory must be given: its width d_memory={self.k_proj.in_features} is not that of x")
        source = x if memory is None else memory
        q = rearrange(self.q_proj(x), "b n (h d) -> b h n d", h=self.n_heads)
        k = rearrange(self.k_proj(source), "b m (g d) -> b g m d", g=self.n_kv_heads)
        v = rearrange(self.v_proj(source), "b m (g d) -> b g m d", g=self.n_kv_heads)
        dropout = self.dropout if self.training else 0.0
        with as_before_if_raised(cache):
            if cache is not None:
                k, v = cache.append(k, v)
            out: Any = self.op(q, k, v, mask=mask, causal=causal, dropout=dropout, return_weights=return_weights)
            weights: Any = None
            if return_weights:
                out, weights = out
            out = self.out_proj(rearrange(out, "b h n d -> b n (h d)"))
        return (out, weights) if return_weights else out

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | None = None,
            *,
            mask: Tensor | None = None,
            causal: bool = False,
            cache: "KVCache | None" = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | None = None,
            *,
            mask: Tensor | None = None,
            causal: bool = False,
            cache: "KVCache | None" = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | None = None,
            *,
            mask: Tensor | None = None,
            causal: bool = False,
            cache: "KVCache | None" = None,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class KVCache:
    """Keys and values of the positions already read, in memory set aside once: for decoding token by token.

    Args:
        batch: B.
        n_kv_heads: G.
        capacity: how many positions it can hold.
        d_head: D.
        dtype: of keys and values; torch's default where left out. Under autocast it may be any: what is appended is
            cast to it.
        device: where they are kept.

    Attributes:
        keys: (B, G, capacity, D).
        values: (B, G, capacity, D).
        length: how many positions are held; what lies beyond is not read.
    """

    keys: Tensor
    values: Tensor
    length: int

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        capacity: int,
        d_head: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        self.keys = torch.zeros(batch, n_kv_heads, capacity, d_head, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def append(
        self, k: Float[Tensor, "b g n d"], v: Float[Tensor, "b g n d"]
    ) -> tuple[Float[Tensor, "b g m d"], Float[Tensor, "b g m d"]]:
        """Add n positions; returns views of all M = length keys and values held so far, in the cache's dtype.

        Args:
            k: keys (B, G, n, D), of the cache's dtype and device; under autocast of any dtype but float64.
            v: values, likewise.

        Raises:
            TypeError: k or v is not a tensor.
            ValueError: the cache is full, or was made for another batch, head count, width, dtype or device.
            RuntimeError: k or v requires a gradient; the cache is for inference.
        """
        check_tensors({"k": k, "v": v})
        capacity, end = self.keys.shape[2], self.length + k.shape[2]
        for name, x in (("k", k), ("v", v)):
            expected = (*self.keys.shape[:2], k.shape[2], self.keys.shape[3])
            if tuple(x.shape) != expected:
                raise ValueError(f"{name} must be {expected} for this cache, got {tuple(x.shape)}")
            cast = is_autocasting(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
            if (x.dtype != self.keys.dtype and not cast) or x.device != self.keys.device:
                raise ValueError(
                    f"{name} must be {self.keys.dtype} on {self.keys.device} for this cache, "
                    f"got {x.dtype} on {x.device}"
                )
        if end > capacity:
            raise ValueError(f"cache holds {capacity} positions, and {end} were asked of it: make it larger or reset()")
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("a KVCache is for inference: call the model under torch.no_grad()")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reset(self) -> None:
        """Forget everything; keep the memory."""
        self.length = 0


class _AsBeforeIfRaised:
    """Puts the caches' attributes back where an exception leaves the block, a KeyboardInterrupt too.

    A cache replaces what it holds, or writes beyond its length: so its attributes are all that there is to put back.
    """

    def __init__(self, caches: tuple[object, ...]):
        self.caches = caches

    def __enter__(self):
        self.before = [dict(vars(cache)) for cache in self.caches]

    def __exit__(self, kind, *_):
        if kind is not None:
            for cache, before in zip(self.caches, self.before):
                vars(cache).update(before)


def as_before_if_raised(*caches: object | None) -> AbstractContextManager[Any]:
    """A context: where an exception leaves it, the caches are as they were when it was entered.

    Args:
        caches: each a KVCache, a MambaCache, or any other whose attributes are replaced as it goes on and never
            written into; or None. Compiled, an exception leaves no change behind by itself, and this does nothing.
    """
    given = tuple(cache for cache in caches if cache is not None)
    return nullcontext() if not given or torch.compiler.is_compiling() else _AsBeforeIfRaised(given)


def _check_width(name: str, x: Tensor, width: int) -> None:
    check_tensors({name: x})
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (B, length, {width}), got {tuple(x.shape)}")


def _from_torch(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """Rename nn.MultiheadAttention's state to ours: one in_proj of three stacked blocks, or three named weights."""
    for kind in ("weight", "bias"):
        stacked = state.pop(f"{prefix}in_proj_{kind}", None)
        if stacked is not None:
            for name, block in zip("qkv", stacked.chunk(3)):
                state[f"{prefix}{name}_proj.{kind}"] = block
    for name in "qkv":
        separate = state.pop(f"{prefix}{name}_proj_weight", None)
        if separate is not None:
            state[f"{prefix}{name}_proj.weight"] = separate
