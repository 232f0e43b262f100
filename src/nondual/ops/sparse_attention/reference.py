"""Block-sparse attention by its definition: all N x M scores, of which those outside of the mask are dropped.

Slow and in memory that grows with N · M, in any floating dtype, on any device; every transform of torch can follow it,
and it can be differentiated any number of times. Symbols as in `nondual.ops.sparse_attention`.
"""

import torch
from torch import Tensor

from nondual.ops.attention import masked_softmax
from nondual.ops.autocast import autocast_off
from nondual.ops.dtypes import accumulation_dtype
from nondual.ops.sparse_attention.block_mask import BlockMask


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, H, N, Dv) in q's dtype and lse (B, H, N), from checked inputs."""
    wide = accumulation_dtype(q.dtype)
    share = q.shape[1] // k.shape[1] if k.shape[1] else 1  # query heads to each key head
    # --8<-- [start:reference]
    allowed = block_mask.mask()  # (Bm, Gm, N, M)
    if allowed.shape[1] != 1:
        allowed = allowed.repeat_interleave(share, dim=1)
    k, v = (x.to(wide).repeat_interleave(share, dim=1) for x in (k, v))
    with autocast_off(q.device.type):  # it would multiply in half precision
        scores = scale * q.to(wide) @ k.mT  # (B, H, N, M)
        out = masked_softmax(scores, allowed) @ v
    # --8<-- [end:reference]
    # A row without a key has a constant lse of -inf, whose derivative would be NaN: it is set afterwards.
    empty = ~allowed.any(-1)
    scores = scores.masked_fill(~allowed, -torch.inf).masked_fill(empty[..., None], 0)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_zeros(scores.shape[:-1])
    return out.to(q.dtype), lse.masked_fill(empty, -torch.inf)
