"""torch's own attention one tile of queries at a time, each over the keys in its reach: causal, or within a window.

torch is handed a window, and causality where N != M, as a mask, which for all queries at once would be N x M. Here it
is handed the mask of one tile, of which every tile's is a part. Memory is linear in N and M, forward and backward, and
the work within a window is linear too. The backward pass forms the weights of one tile again; its equations are those
of Dao 2023 (2307.08691), Algorithm 2, with a row's delta summed from the tile itself.

Symbols: B batch, H query heads, G key/value heads, N queries, M keys, D head width; Q_i, K_i, V_i a tile of queries and
the keys and values in its reach; S scores, P their softmax. Query i stands at position i + M - N among the keys.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from nondual.ops.autocast import autocast_off
from nondual.ops.dtypes import accumulation_dtype

TILE = 128  # queries


def tiles(n: int, m: int, window: int, tile: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each tile of queries that see a key: its rows, the keys in its reach, and the columns of the mask for these.

    Args:
        n: N.
        m: M.
        window: how many keys a query sees, its own included; 0 where it sees all before it.
        tile: how many queries a tile has.
    """
    shift, back = m - n, _reach(m, window)
    for start in range(max(0, -shift), n, tile):
        stop = min(n, start + tile)
        first = max(0, start + shift - back)
        offset = back - (start + shift)  # from a key to its column in the mask
        yield slice(start, stop), slice(first, stop + shift), slice(first + offset, stop + shift + offset)


def _reach(m: int, window: int) -> int:
    """How many keys before its own a query sees at the most."""
    return min(m, window - 1) if window else m


def tile_mask(m: int, window: int, tile: int, like: Tensor) -> Tensor:
    """What is added to the scores of one tile, (tile, reach + tile): 0 where attending is allowed, -inf elsewhere.

    window=3, tile=2     reach = 2; the own position of row r is column reach + r
    1 1 1 0
    0 1 1 1
    """
    back = _reach(m, window)
    row = torch.arange(tile, device=like.device)[:, None]
    behind = row + back - torch.arange(back + tile, device=like.device)  # by how much a key lies before the query
    allowed = (behind >= 0) & (behind < window) if window else behind >= 0
    return like.new_zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Causal attention, aligned at the end, within a window or not.

    Args:
        q: queries (B, H, N, D), any floating dtype.
        k: keys (B, G, M, D), of q's dtype and device.
        v: values (B, G, M, Dv), likewise.
        window: how many keys a query sees, its own included; 0 where it sees all before it.
        scale: factor on q · k.

    Returns:
        out (B, H, N, Dv) in q's dtype; rows that see no key are 0.
    """
    n, m, out = q.shape[2], k.shape[2], _output(q, v)
    out[:, :, : max(0, n - m)] = 0
    mask, grouped = tile_mask(m, window, min(n, TILE), q), q.shape[1] != k.shape[1]
    with autocast_off(q.device.type):
        for rows, keys, columns in tiles(n, m, window, TILE):
            q_i, k_i, v_i = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            mask_i = mask[: q_i.shape[2], columns]
            if mask.device.type != "cpu":
                mask_i = mask_i.clone()  # kernels for a GPU read a mask from an aligned address
            out[:, :, rows] = F.scaled_dot_product_attention(q_i, k_i, v_i, mask_i, scale=scale, enable_gqa=grouped)
    return out


def _output(q: Tensor, v: Tensor) -> Tensor:
    """An empty (B, H, N, Dv), laid out in memory as (B, N, H, Dv): a module then joins the heads without a copy."""
    b, h, n, _ = q.shape
    return q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv from d_out (B, H, N, Dv), summed in float32 or better, in the shapes and dtypes of q, k and v."""
    n, m = q.shape[2], k.shape[2]
    wide = accumulation_dtype(q.dtype)
    dq = q.new_zeros(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    mask, groups = tile_mask(m, window, min(n, TILE), dk), k.shape[1]
    with autocast_off(q.device.type):
        for rows, keys, columns in tiles(n, m, window, TILE) if q.numel() else ():
            # The rows of all heads that share a key head, one head after another: (B, G, H / G · tile, ·).
            q_i, do_i = (x[:, :, rows].to(wide).unflatten(1, (groups, -1)).flatten(2, 3) for x in (q, d_out))
            k_i, v_i = (x[:, :, keys].to(wide) for x in (k, v))
            s = scale * q_i @ k_i.mT  # S = Q_i K_iᵀ, again
            s.unflatten(2, (-1, rows.stop - rows.start)).add_(mask[: rows.stop - rows.start, columns])
            p = torch.softmax(s, -1)
            dv[:, :, keys] += p.mT @ do_i
            dp = do_i @ v_i.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            dk[:, :, keys] += scale * ds.mT @ q_i
            dq[:, :, rows] = (scale * ds @ k_i).unflatten(2, (-1, rows.stop - rows.start)).flatten(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# --- as operators of torch -----------------------------------------------------------------------------------------
# Operators, so that torch.compile does not unroll the loops and compile again for every length.

attention_by_tiles: CustomOpDef = torch.library.custom_op("nondual::attention_by_tiles", forward, mutates_args=())
_backward = torch.library.custom_op("nondual::attention_by_tiles_backward", backward, mutates_args=())


@attention_by_tiles.register_fake
def _(q, k, v, window, scale):
    return _output(q, v)


@_backward.register_fake
def _(d_out, q, k, v, window, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate(ctx, d_out):
    return *_backward(d_out, *ctx.saved_tensors, *ctx.options), None, None


def _refuse(ctx, *_):
    raise RuntimeError(
        "flash_attention(impl='sdpa') has no second derivative; "
        "nondual.ops.attention.attention(impl='reference') has one"
    )


attention_by_tiles.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
