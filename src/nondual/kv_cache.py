"""What attention has read, kept for decoding token by token: a cache that grows, and a memory that stays as it is.

Symbols: B batch, G key/value heads of width D, M positions held so far.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from nondual.ops.autocast import is_autocasting
from nondual.ops.checks import check_tensors


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
        start: (B,), the position at which each row's present sequence began, where several are packed along a row or
            rows are padded on the left; None while all began at 0.
    """

    keys: Tensor
    values: Tensor
    length: int
    start: Integer[Tensor, " b"] | None

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
        self.length, self.start = 0, None

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
        batch, heads, capacity, width = self.keys.shape
        n, dtype, device = k.shape[2], self.keys.dtype, self.keys.device
        end, expected = self.length + n, (batch, heads, n, width)
        for name, x in (("k", k), ("v", v)):
            if x.shape != expected:
                raise ValueError(f"{name} must be {expected} for this cache, got {tuple(x.shape)}")
            if (x.dtype != dtype and not _is_cast(x)) or x.device != device:
                raise ValueError(f"{name} must be {dtype} on {device} for this cache, got {x.dtype} on {x.device}")
        if end > capacity:
            raise ValueError(f"cache holds {capacity} positions, and {end} were asked of it: make it larger or reset()")
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("a KVCache is for inference: call the model under torch.no_grad()")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Int[Tensor, " r"]) -> "KVCache":
        """A cache of its own with these rows of the batch, in this order; a row may be taken more than once.

        Args:
            rows: (R,) int64.
        """
        _, heads, capacity, width = self.keys.shape
        chosen = KVCache(len(rows), heads, capacity, width, dtype=self.keys.dtype, device=self.keys.device)
        chosen.keys[:, :, : self.length] = self.keys[rows, :, : self.length]
        chosen.values[:, :, : self.length] = self.values[rows, :, : self.length]
        chosen.length, chosen.start = self.length, None if self.start is None else self.start[rows]
        return chosen

    def reset(self) -> None:
        """Hold no positions; the memory stays allocated."""
        self.length, self.start = 0, None


class ProjectedMemory(NamedTuple):
    """The keys and values of a memory, made once by `MultiHeadAttention.project` and read by any number of calls.

    A memory does not change while a decoder reads it. Neither do these: nothing is appended to them.

    Attributes:
        keys: (B, G, M, D).
        values: (B, G, M, D).
    """

    keys: Float[Tensor, "b g m d"]
    values: Float[Tensor, "b g m d"]

    def select(self, rows: Int[Tensor, " r"]) -> "ProjectedMemory":
        """These rows of the batch, in this order; a row may be taken more than once.

        Args:
            rows: (R,) int64.
        """
        return ProjectedMemory(self.keys[rows], self.values[rows])


def _is_cast(x: Tensor) -> bool:
    """Whether autocast is on, and casts x."""
    return is_autocasting(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
