"""The steps that the kernels of state space duality share: tiles of matrices, products on tensor cores, decays."""

import triton
import triton.language as tl

# --- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(p, o_row, s_row, m_row, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows o_row of a matrix (len(o_row), BLOCK_W); 0 where m_row is False, and beyond its WIDTH."""
    o_col = tl.arange(0, BLOCK_W)
    m_tile = m_row[:, None]
    if WIDTH < BLOCK_W:
        m_tile = m_tile & (o_col < WIDTH)[None, :]
    return tl.load(p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_rows(p, o_row, s_row, m_row, b_tile, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Write rows o_row of a matrix, where m_row is True."""
    o_col = tl.arange(0, BLOCK_W)
    m_tile = m_row[:, None]
    if WIDTH < BLOCK_W:
        m_tile = m_tile & (o_col < WIDTH)[None, :]
    p_tile = p + o_row.to(tl.int64)[:, None] * s_row + o_col[None, :]
    tl.store(p_tile, b_tile.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def load_state(p, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A whole state (BLOCK_P, BLOCK_N), in float32; its strides are constants, which saves registers for addresses."""
    o_p, o_n = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    p_tile = p + o_p[:, None] * N + o_n[None, :]
    if P == BLOCK_P and N == BLOCK_N:
        b_state = tl.load(p_tile)
    else:
        b_state = tl.load(p_tile, mask=(o_p < P)[:, None] & (o_n < N)[None, :], other=0.0)
    return b_state


@triton.jit
def load_dy(p_dy, p_z, o_row, s_dyl, s_zl, m_row, GATED: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """The gradient of y before its gate, in float32 (len(o_row), BLOCK_P)."""
    b_dy = load_rows(p_dy, o_row, s_dyl, m_row, P, BLOCK_P).to(tl.float32)
    if GATED:
        b_z = load_rows(p_z, o_row, s_zl, m_row, P, BLOCK_P).to(tl.float32)
        b_dy = b_dy * b_z * tl.sigmoid(b_z)
    return b_dy


@triton.jit
def sum_products(b_one, b_other, m, AXIS: tl.constexpr):
    """The sum of products along an axis, of those where m is True.

    Several threads hold copies of the sum. Without the selection the compiler fuses a thread's own product with the
    first addition, which leaves that product unrounded, and so each copy with another last bit.
    """
    return tl.sum(tl.where(m, b_one * b_other, 0.0), AXIS)


# --- products --------------------------------------------------------------------------------------------------------


@triton.jit
def cast_scaled(b_tile, b_like):
    """A float32 tile in b_like's dtype, for a product with it, and the factor to multiply that product by.

    The factor is 1 but in float16, whose range is small: there the tile is first divided by its largest magnitude.
    """
    scale = 1.0
    if b_like.dtype == tl.float16:
        scale = tl.max(tl.abs(b_tile))  # over both axes at once: Triton 3.7 on sm_100 fails on one after the other
        scale = tl.where(scale < float("inf"), tl.maximum(scale, 1e-30), 1.0)  # so 1 / scale is finite
        b_tile = b_tile * (1.0 / scale)
    return b_tile.to(b_like.dtype), scale


@triton.jit
def dot_add(b_a, b_b, b_acc):
    """acc + a b, with a in float32 and b in the inputs' dtype."""
    b_cast, scale = cast_scaled(b_a, b_b)
    if b_b.dtype == tl.float16:
        return b_acc + tl.dot(b_cast, b_b, input_precision="ieee") * scale
    return tl.dot(b_cast, b_b, b_acc, input_precision="ieee")


# --- step lengths and decays -----------------------------------------------------------------------------------------


@triton.jit
def softplus(x):
    """log(1 + exp(x)), exact to the last place for x < 0 too: the rounding of 1 + exp(x) is divided out (Kahan)."""
    b_e = tl.exp(tl.minimum(x, 20.0))
    b_u = 1.0 + b_e
    b_d = b_u - 1.0
    b_log = tl.where(b_d == 0, b_e, tl.log(b_u) * (b_e / tl.where(b_d == 0, 1.0, b_d)))
    return tl.where(x <= 20.0, b_log, x)  # NaN stays NaN: a GPU's minimum of NaN and 20 is 20


@triton.jit
def log_decay(b_step, a):
    """The log of a step's decay, Δ A, in float64, for `a` that is A log2(e): to the base 2.

    It is -1500 at the least: exp2 gives 0 there already, and larger sums are less precise. NaN stays NaN.
    """
    b_log = b_step.to(tl.float64) * a
    return tl.where(b_log < -1500.0, -1500.0, b_log)


@triton.jit
def load_log_decay(p_high, p_low, o, m):
    """The log of the decay to each step o from the start of its chunk, or of its sequence if later: in two parts."""
    return tl.load(p_high + o, mask=m, other=0.0), tl.load(p_low + o, mask=m, other=0.0)


@triton.jit
def decay_between(b_high_t, b_low_t, b_high_s, b_low_s, m_ts):
    """The decay from s to t, 0 where t does not depend on s; the shapes of the parts broadcast.

    The mask comes before the exponential: where s is later than t, that could overflow.
    """
    b_log = (b_high_t - b_high_s) + (b_low_t - b_low_s)
    return tl.exp2(tl.where(m_ts, b_log, float("-inf")))


INTERPRETED = not isinstance(load_rows, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 was set before the import
