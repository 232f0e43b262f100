"""The steps that the kernels of the delta rule share: tiles of matrices, decays, the inverse of a chunk's matrix."""

import triton
import triton.language as tl

from nondual.ops.ssd.triton.primitives import decay_between, load_log_decay

# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_of(p, o_row, s_row, o_col):
    """The addresses of a tile (len(o_row), len(o_col)) of a matrix whose rows are s_row numbers apart."""
    return p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]


@triton.jit
def load_tile(p, o_row, s_row, m_row, o_col, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """A tile (len(o_row), len(o_col)); 0 where m_row is False and beyond WIDTH columns. EVEN: no column is beyond."""
    m_tile = m_row[:, None]
    if not EVEN:
        m_tile = m_tile & (o_col < WIDTH)[None, :]
    return tl.load(tile_of(p, o_row, s_row, o_col), mask=m_tile, other=0.0)


@triton.jit
def store_tile(p, o_row, s_row, m_row, o_col, b_tile, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Write a tile where m_row is True, in the dtype of the memory."""
    m_tile = m_row[:, None]
    if not EVEN:
        m_tile = m_tile & (o_col < WIDTH)[None, :]
    tl.store(tile_of(p, o_row, s_row, o_col), b_tile.to(p.dtype.element_ty), mask=m_tile)


# --- decays ----------------------------------------------------------------------------------------------------------


@triton.jit
def starts_of_chunk(p_start, o_t, m_t, length, RESET: tl.constexpr):
    """The first step that each step of a chunk sees (CHUNK,), and that its last step sees; -1 for the initial state."""
    b_start, first = o_t * 0 - 1, -1
    if RESET:
        b_start = tl.load(p_start + o_t, mask=m_t, other=0)
        first = tl.load(p_start + tl.minimum(tl.max(o_t, 0) + 1, length) - 1)
    return b_start, first


@triton.jit
def decays_of_chunk(p_high, p_low, o_t, length, m_from, m_to):
    """The decay from the start of a chunk to each of its steps (CHUNK,), 0 where m_from is False; from each step to the
    chunk's end (CHUNK,), 0 where m_to is False; and of the whole chunk."""
    m_t = o_t < length
    b_high, b_low = load_log_decay(p_high, p_low, o_t, m_t)  # (CHUNK,)
    last = tl.minimum(tl.max(o_t, 0) + 1, length) - 1
    high_end, low_end = tl.load(p_high + last), tl.load(p_low + last)
    b_from = tl.exp2(tl.where(m_from, b_high + b_low, float("-inf")))
    b_to = decay_between(high_end, low_end, b_high, b_low, m_to)
    return b_from, b_to, tl.exp2(high_end + low_end)


@triton.jit
def decays_within(p_high, p_low, o_t, m_ts, length):
    """The decay from step s to step t of one chunk (t, s), 0 where m_ts is False."""
    b_high, b_low = load_log_decay(p_high, p_low, o_t, o_t < length)
    return decay_between(b_high[:, None], b_low[:, None], b_high[None, :], b_low[None, :], m_ts)


# --- the inverse -----------------------------------------------------------------------------------------------------


@triton.jit
def inverse(b_a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)⁻¹ for a matrix `a` (CHUNK, CHUNK) that is 0 on and above its diagonal, in float32.

    By forward substitution in the blocks of 16 on the diagonal, all at once, then by joining neighbours: the block
    below the diagonal of two joined blocks is -T₂ a₂₁ T₁. A series of powers of `a` would need fewer steps, but its
    terms can be far larger than their sum.
    """
    blocks: tl.constexpr = CHUNK // 16
    o_block, o_16 = tl.arange(0, blocks), tl.arange(0, 16)
    m_diagonal = (o_block[:, None] == o_block[None, :])[:, None, :, None]
    b_own = tl.sum(tl.where(m_diagonal, tl.reshape(b_a, (blocks, 16, blocks, 16)), 0.0), 2)  # (blocks, 16, 16)
    o_row = o_16[None, :, None]
    b_t = tl.where(o_row == o_16[None, None, :], 1.0, 0.0) + tl.zeros((blocks, 16, 16), tl.float32)
    for i in tl.range(1, 16):  # row i: its unit vector, less a's row times the rows above
        b_row = tl.sum(tl.where(o_row == i, b_own, 0.0), 1)  # (blocks, 16)
        b_less = tl.sum(b_row[:, :, None] * b_t, 1)
        b_t -= tl.where(o_row == i, b_less[:, None, :], 0.0)
    b_t = tl.reshape(tl.where(m_diagonal, b_t[:, :, None, :], 0.0), (CHUNK, CHUNK))
    if CHUNK >= 32:
        b_t = join(b_a, b_t, 16, CHUNK, PRECISION)
    if CHUNK >= 64:
        b_t = join(b_a, b_t, 32, CHUNK, PRECISION)
    return b_t


@triton.jit
def join(b_a, b_t, SIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """The inverses of blocks of SIZE on the diagonal as those of blocks of twice that size."""
    o_block = tl.arange(0, CHUNK) // SIZE
    m_below = (o_block[:, None] % 2 == 1) & (o_block[None, :] == o_block[:, None] - 1)
    b_right = tl.dot(tl.where(m_below, b_a, 0.0), b_t, input_precision=PRECISION)
    return b_t - tl.dot(b_t, b_right, input_precision=PRECISION)
