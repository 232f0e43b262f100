"""Forget gates in the kernels: what a score loses between a key and a query, without the difference of two long sums.

Source: Lin et al. 2025 (2503.02130), section 3. Where we differ: the running sum c of the logarithms of the gates comes
in as two float32 numbers, `high` and `low`, together good to 48 bits, whose differences are taken one by one; and
`first` says which key a position still sees, after a gate of 0. `nondual.ops.flash_attention.forget` makes c.

Three numbers for each position of each query head are read, and no tile of N x M. Within a tile that every query sees
whole, c is counted from the tile's last key: what is lost since then and what is lost up to it are both 0 or less, so
that their sum cancels no digit, and a score costs one addition more. In the tiles with a mask, where the diagonal
lies, the two differences are taken for each score.

Symbols as in `nondual.ops.flash_attention.triton`. `gates` are the pointers to the three numbers of one head's first
position (or a column of such pointers, where rows are of several heads), `at_` what was loaded at some positions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def gates_of(forget: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """c and first, both (B, H, M), as the kernels take them, by the names of their arguments; none without gates.

    Args:
        forget: c in float64, of the natural logarithms, and first; None without gates.
    """
    if forget is None:
        return {}
    sums, first = forget[0] * math.log2(math.e), forget[1]
    high = sums.float()
    low = (sums - high.double()).float()
    return {"p_high": high.contiguous(), "p_low": low.contiguous(), "p_first": first.to(torch.int32).contiguous()}


@triton.jit
def gates_at(p_high, p_low, p_first, offset):
    """The gates of the head whose numbers begin at `offset`."""
    return p_high + offset, p_low + offset, p_first + offset


@triton.jit
def load_gates(gates, o, m):
    """high, low and first at the positions o, shaped as o (or as gates and o together).

    Positions past the end, of which nothing is stored, have the last one's numbers; those before the first, 0.
    """
    o_at = tl.minimum(o, m - 1)
    b_high = tl.load(gates[0] + o_at, mask=o_at >= 0, other=0.0)
    b_low = tl.load(gates[1] + o_at, mask=o_at >= 0, other=0.0)
    b_first = tl.load(gates[2] + o_at, mask=o_at >= 0, other=0)
    return b_high, b_low, b_first


@triton.jit
def decay_between(at_q, at_kv, at_last, o_kv, last, MASKED: tl.constexpr):
    """What is added to the scores of a tile, to the base 2: -inf where a gate of 0 stands between.

    at_q, at_kv and o_kv are shaped to broadcast against each other. Without MASKED no query stands before `last`, the
    tile's last key, whose numbers are at_last.
    """
    if MASKED:
        b_decay = (at_q[0] - at_kv[0]) + (at_q[1] - at_kv[1])
        b_decay = tl.where(at_q[2] <= o_kv, b_decay, float("-inf"))
    else:
        b_since = (at_q[0] - at_last[0]) + (at_q[1] - at_last[1])
        b_since = tl.where(at_q[2] <= last, b_since, float("-inf"))
        b_until = (at_last[0] - at_kv[0]) + (at_last[1] - at_kv[1])
        b_until = tl.where(at_last[2] <= o_kv, b_until, float("-inf"))
        b_decay = b_since + b_until
    return b_decay


@triton.jit
def decay_of_keys(gates, at_q, o_kv, last, m, MASKED: tl.constexpr):
    """`decay_between` for a tile of keys o_kv that ends with `last`, (BLOCK_Q, BLOCK_KV)."""
    at_kv, at_last = load_gates(gates, o_kv[None, :], m), load_gates(gates, last, m)
    return decay_between(at_q, at_kv, at_last, o_kv[None, :], last, MASKED)
