"""The steps of which flash attention's kernels are made: tiles loaded and stored, masks, and the online softmax.

Source: Dao 2023 (2307.08691), section 3.1. Symbols as in `nondual.ops.flash_attention.triton`.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(p, o_row, s_row, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """Rows o_row of a matrix with `rows` rows, as (len(o_row), BLOCK): 0 beyond its WIDTH and beyond its last row.

    Without EDGE all of o_row must exist: rows are then not compared.
    """
    # --8<-- [start:load_tile]
    o_col = tl.arange(0, BLOCK)
    p_tile = p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]
    if EDGE:
        m_tile = (o_row < rows)[:, None] & (o_col < WIDTH)[None, :]
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif WIDTH < BLOCK:
        b_tile = tl.load(p_tile, mask=(o_col < WIDTH)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile
    # --8<-- [end:load_tile]


@triton.jit
def store_tile(p, o_row, s_row, rows, b_tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write b_tile to the rows o_row of a matrix, but for those beyond its last row, in the matrix's dtype."""
    o_col = tl.arange(0, BLOCK)
    m_tile = (o_row < rows)[:, None] & (o_col < WIDTH)[None, :]
    p_tile = p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]
    tl.store(p_tile, b_tile.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def load_top(p, o_q, n):
    """The highest score of rows o_q; +inf past the end and for a row without a visible key, so that
    P = exp2(S - inf) = 0 there."""
    b_top = tl.load(p + o_q, mask=o_q < n, other=float("inf"))
    return tl.where(b_top == float("-inf"), float("inf"), b_top)


@triton.jit
def visible(o_q, o_kv, m, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The mask: which of the keys o_kv the queries o_q see. o_q and o_kv are shaped to broadcast against each other."""
    m_seen = o_kv < m
    if CAUSAL:
        m_seen = m_seen & (o_kv <= o_q + shift)
    if WINDOWED:
        m_seen = m_seen & (o_kv > o_q + (shift - window))
    return m_seen


@triton.jit
def key_bounds(first, last, m, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The keys that queries first..last see, as lo, whole, part, hi.

    The tiles of keys lo..whole need a mask (the window begins there), those of whole..part need none, and those of
    part..hi need one (the diagonal or the last key lies there). Tiles outside of lo..hi are not visited.
    """
    lo = 0
    hi = m
    whole = 0
    part = m // BLOCK_KV * BLOCK_KV
    if CAUSAL:
        hi = tl.maximum(0, tl.minimum(m, last + shift + 1))
        part = tl.maximum(0, tl.minimum(m, first + shift + 1)) // BLOCK_KV * BLOCK_KV
    if WINDOWED:
        lo = tl.maximum(0, first + shift - window + 1) // BLOCK_KV * BLOCK_KV
        whole = tl.cdiv(tl.maximum(0, last + shift - window + 1), BLOCK_KV) * BLOCK_KV
        whole = tl.minimum(whole, tl.cdiv(hi, BLOCK_KV) * BLOCK_KV)
        part = tl.maximum(part, whole)
    return lo, whole, part, hi


@triton.jit
def query_bounds(first, last, n, shift, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The queries that see keys first..last, as lo, whole, part, hi.

    The tiles of queries lo..whole need a mask (the diagonal lies there), those of whole..part need none, and those of
    part..hi need one (the window ends or the last query lies there). Tiles outside of lo..hi are not visited.
    """
    lo = 0
    hi = n
    whole = 0
    part = n // BLOCK_Q * BLOCK_Q
    if WINDOWED:
        hi = tl.maximum(0, tl.minimum(n, last + window - shift))
        part = tl.maximum(0, tl.minimum(n, first + window - shift)) // BLOCK_Q * BLOCK_Q
    if CAUSAL:
        lo = tl.maximum(0, first - shift) // BLOCK_Q * BLOCK_Q
        whole = tl.cdiv(tl.maximum(0, last - shift), BLOCK_Q) * BLOCK_Q
        whole = tl.minimum(whole, tl.cdiv(hi, BLOCK_Q) * BLOCK_Q)
        part = tl.maximum(part, whole)
    return lo, whole, part, hi


@triton.jit
def online_softmax_update(b_s, b_l, b_m, scale, MASKED: tl.constexpr):
    """Add a tile of raw scores b_s to each row's running maximum b_m and sum of exponentials b_l, to the base 2.

    Returns the tile's weights (not yet divided by b_l), the factor that rescales earlier sums, the new b_l and b_m.
    """
    # --8<-- [start:online_softmax_update]
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_shift = b_m_new
    if MASKED:
        # A row without a visible key so far: exp2(-inf - 0) = 0, not NaN.
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s * scale - b_shift[:, None])
    b_rescale = tl.exp2(b_m - b_shift)
    return b_p, b_rescale, b_l * b_rescale + tl.sum(b_p, 1), b_m_new
    # --8<-- [end:online_softmax_update]


INTERPRETED = not isinstance(load_tile, triton.runtime.JITFunction)
"""Whether the kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when triton was imported."""
