"""Self-attention: queries, keys and values are three projections of one X.

Source: Vaswani et al. 2017 (1706.03762), sections 3.2.1 and 3.2.2; grouped key/value heads: Ainslie et al. 2023
(2305.13245). Positions inside attention: `nondual.relative_positions`. Symbols: x (B, N, E), memory (B, M, E), H heads
of width D, G key/value heads.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nondual.kv_cache import KVCache as KVCache
from nondual.kv_cache import ProjectedMemory as ProjectedMemory
from nondual.mixers import as_before_if_raised, check_reset, sequence_starts
from nondual.ops.attention import attention
from nondual.ops.checks import check_tensors
from nondual.ops.dtypes import accumulation_dtype
from nondual.relative_positions import RelativePositions


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
        # (B, N, d_k), (B, N, d_k), (B, N, d_v)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
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
        causal: whether no position sees a later one where a call does not say.
        op: what joins q, k and v, called as `nondual.ops.attention.attention` is.
        positions: where queries and keys stand, such as `Rotary(d_head)`, `ALiBi(n_heads)` or `RelativeBias(n_heads)`;
            None for attention that does not know. A bias reaches the op as a mask, which it must take.

    Raises:
        TypeError: positions that do not act inside attention.
        ValueError: head counts that do not divide, a dropout outside [0, 1), positions made for another number or
            width of heads, positions that the op refuses, or positions together with a d_memory of another width.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    dropout: float
    causal: bool
    op: Callable[..., Any]
    positions: RelativePositions | None
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
        causal: bool = False,
        op: Callable = attention,
        positions: RelativePositions | None = None,
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
        if positions is not None:
            _check_positions(positions, n_heads, d_head, op)
            if d_memory != d_model:
                raise ValueError(f"positions must be None for a memory of another width, d_memory={d_memory}: {_ONE_X}")
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.dropout, self.causal, self.op, self.positions = dropout, causal, op, positions
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_memory, n_kv_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_memory, n_kv_heads * d_head, bias=bias)
        self.out_proj = nn.Linear(n_heads * d_head, d_model, bias=bias)
        self.register_load_state_dict_pre_hook(_from_torch)

    def forward(
        self,
        x: Float[Tensor, "b n e"],
        memory: Float[Tensor, "b m em"] | ProjectedMemory | None = None,
        *,
        mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
        causal: bool | None = None,
        cache: KVCache | None = None,
        reset: Bool[Tensor, "b n"] | None = None,
        values: Callable[[Tensor], Tensor] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n e"] | tuple[Float[Tensor, "b n e"], Float[Tensor, "b h n m"]]:
        """x (B, N, E) attends to itself, to what the cache holds of its past, or to `memory` (B, M, d_memory).

        Args:
            x: (B, N, E).
            memory: what is attended to instead of x; or what `project` made of it, where it is read more than once.
            mask: (N, M) or broadcastable to (B, H, N, M); True where attending is allowed.
            causal: no position sees a later one; as the module was made where left out.
            cache: keys and values of the positions before x; x's own are appended. Whatever this call raises, the
                cache is then as it was before.
            reset: True at the first position of each of several sequences packed along N: a position sees those of its
                own sequence alone. A batch padded on the left has it at the first real token of each row. The op then
                gets a mask, also in later calls with the same cache.
            values: what is done to the values of x, (B, G, N, D) to the same shape, before the cache keeps them, such
                as adding those of another layer (`nondual.recent.value_residual`).
            return_weights: also return the weights (B, H, N, M).

        Returns:
            out (B, N, E), or (out, weights).

        Raises:
            TypeError: x, mask or reset is not a tensor, memory neither that nor a ProjectedMemory, or cache is not a
                KVCache.
            ValueError: a rank, width or batch that does not fit; a cache, a reset, values or positions together with a
                memory; a full cache.
            RuntimeError: a cache while gradients are recorded.
        """
        _check_width("x", x, self.q_proj.in_features)
        if memory is not None:
            if isinstance(memory, ProjectedMemory):
                self._check_projected(memory, x.shape[0])
            else:
                _check_width("memory", memory, self.k_proj.in_features)
            if cache is not None:
                raise ValueError("cache holds x's own past and cannot go with memory: give one of the two")
            if reset is not None:
                raise ValueError("reset marks sequences within x and cannot go with memory: give a mask instead")
            if values is not None:
                raise ValueError("values changes those of x itself and cannot go with memory: change the memory's own")
            if self.positions is not None:
                raise ValueError(f"memory must be None for a module with positions: {_ONE_X}")
        elif self.k_proj.in_features != self.q_proj.in_features:
            raise ValueError(f"memory must be given: its width d_memory={self.k_proj.in_features} is not that of x")
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, from this module's new_cache, got {type(cache).__name__}")
        if reset is not None:
            check_reset(reset, x)
        source = x if memory is None else memory
        # --8<-- [start:queries]
        q = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, N, D)
        # --8<-- [end:queries]
        k, v = source if isinstance(source, ProjectedMemory) else self._keys_and_values(source)
        v = v if values is None else values(v)
        causal = self.causal if causal is None else causal
        dropout = self.dropout if self.training else 0.0
        with as_before_if_raised(cache):
            mask = _within_sequences(mask, reset, cache, x.shape[1])
            if self.positions is not None:
                start = 0 if cache is None else cache.length
                q, k = self.positions.turn(q, start), self.positions.turn(k, start)
            if cache is not None:
                k, v = cache.append(k, v)
            if self.positions is not None:
                mask = _with_bias(mask, self.positions, q, k)
            out: Any = self.op(q, k, v, mask=mask, causal=causal, dropout=dropout, return_weights=return_weights)
            weights: Any = None
            if return_weights:
                out, weights = out
            # --8<-- [start:join]
            out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, H D) to (B, N, E)
            # --8<-- [end:join]
        return (out, weights) if return_weights else out

    def project(self, memory: Float[Tensor, "b m em"]) -> ProjectedMemory:
        """The keys and values of a memory, which do not depend on x: made once, and given to each call in its place.

        Args:
            memory: (B, M, d_memory).

        Raises:
            TypeError: memory is not a tensor.
            ValueError: a wrong rank or width.
        """
        _check_width("memory", memory, self.k_proj.in_features)
        return ProjectedMemory(*self._keys_and_values(memory))

    def _keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        # --8<-- [start:keys_and_values]
        k = self.k_proj(source).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(source).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        # --8<-- [end:keys_and_values]
        return k, v

    def _check_projected(self, memory: ProjectedMemory, batch: int) -> None:
        check_tensors({"memory.keys": memory.keys, "memory.values": memory.values})
        expected = (batch, self.n_kv_heads, self.d_head)
        for name, x in (("keys", memory.keys), ("values", memory.values)):
            if x.ndim != 4 or (*x.shape[:2], x.shape[3]) != expected:
                shape = "({}, {}, M, {})".format(*expected)
                raise ValueError(
                    f"memory must be this module's own project(memory), {name} {shape}, got {tuple(x.shape)}"
                )

    def new_cache(self, batch: int, max_len: int | None = None) -> KVCache:
        """An empty cache for self-attention, in the dtype and on the device of the key projection.

        Args:
            batch: B.
            max_len: how many positions it can hold.

        Raises:
            ValueError: max_len was left out, or is below 1.
        """
        if max_len is None or max_len < 1:
            raise ValueError(f"max_len must be given, 1 or more: attention keeps every position, got {max_len}")
        like = self.k_proj.weight
        if not isinstance(like, Tensor) or not like.is_floating_point():  # a quantised layer gives another dtype
            like = next(self.parameters(), torch.empty(0))
        return KVCache(batch, self.n_kv_heads, max_len, self.d_head, dtype=like.dtype, device=like.device)

    if TYPE_CHECKING:  # what nn.Module hands on to forward

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | ProjectedMemory | None = None,
            *,
            mask: Tensor | None = None,
            causal: bool | None = None,
            cache: KVCache | None = None,
            reset: Tensor | None = None,
            values: Callable[[Tensor], Tensor] | None = None,
            return_weights: Literal[False] = False,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | ProjectedMemory | None = None,
            *,
            mask: Tensor | None = None,
            causal: bool | None = None,
            cache: KVCache | None = None,
            reset: Tensor | None = None,
            values: Callable[[Tensor], Tensor] | None = None,
            return_weights: Literal[True],
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            memory: Tensor | ProjectedMemory | None = None,
            *,
            mask: Tensor | None = None,
            causal: bool | None = None,
            cache: KVCache | None = None,
            reset: Tensor | None = None,
            values: Callable[[Tensor], Tensor] | None = None,
            return_weights: bool,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def _check_width(name: str, x: Tensor, width: int) -> None:
    check_tensors({name: x})
    if x.ndim != 3 or x.shape[-1] != width:
        raise ValueError(f"{name} must be (B, length, {width}), got {tuple(x.shape)}")


_ONE_X = "positions are of x alone, and the steps between x and a memory have no meaning"


def _check_positions(positions: object, n_heads: int, d_head: int, op: object) -> None:
    if not isinstance(positions, RelativePositions):
        raise TypeError(
            f"positions must be Rotary, ALiBi, RelativeBias or another of RelativePositions, got {_name(positions)}; "
            "what is added to embeddings, such as Sinusoidal, goes to CausalLM(positions=)"
        )
    why = positions.refuses(n_heads, d_head)
    refuses = getattr(op, "refuses_positions", None)  # of attention over a sequence that lies on several devices
    if why is None and refuses is not None:
        why = refuses(positions)
    if why is not None:
        raise ValueError(why)


def _name(x: object) -> str:
    return x.__name__ if isinstance(x, type) else type(x).__name__


def _with_bias(mask: Tensor | None, positions: RelativePositions, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask with the positions' bias (H, N, M) added to it: forbidden pairs become -inf."""
    bias = positions.bias(q.shape[2], k.shape[2], dtype=accumulation_dtype(q.dtype), device=q.device)
    if bias is None:
        return mask
    bias = bias[None]  # (1, H, N, M)
    if mask is None:
        return bias
    check_tensors({"mask": mask})
    shape = (q.shape[0], *bias.shape[1:])
    fits = all(a in (1, b) for a, b in zip(mask.shape, shape[-mask.ndim :])) if mask.ndim in (2, 4) else False
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"mask must be boolean or floating, and (N, M) = {shape[2:]} or broadcast to (B, H, N, M) = {shape}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _within_sequences(mask: Tensor | None, reset: Tensor | None, cache: KVCache | None, n: int) -> Tensor | None:
    """The mask, narrowed to keys of the query's own sequence where several are packed; the cache keeps where it began.

    reset  F F T F     1 1 0 0
                       1 1 0 0
                       0 0 1 1
                       0 0 1 1
    """
    length, start = (0, None) if cache is None else (cache.length, cache.start)
    starts = sequence_starts(reset, n, length=length, start=start)
    if starts is None:
        return mask
    earlier = torch.arange(length, device=starts.device).expand(len(starts), -1)
    first = torch.zeros_like(starts[:, :1]) if start is None else start[:, None]
    earlier = torch.where(earlier >= first, first, -1)  # -1: of a sequence that ended before this call
    own = (starts[:, :, None] == torch.cat([earlier, starts], 1)[:, None])[:, None]  # (B, 1, N, M)
    if cache is not None and n:
        cache.start = starts[:, -1]
    if mask is None:
        return own
    return own & mask if mask.dtype == torch.bool else mask.masked_fill(~own, -torch.inf)


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
