"""The backward kernels of state space duality: the state's gradient, what is summed for each output step (rows) and for
each input step (columns), and the gradient of the step lengths.

The gradient of the log decay of a step r has a part within its chunk and a part by way of the state. Within the chunk
y = W x, where W[t, s] = decay(s, t) Δ_s (C_t · B_s). With dW = dy xᵀ and Q = W ∘ dW, that part is the sum of Q[t, s]
over s < r <= t. It is summed directly: as a difference, Q's rows less its columns, it would be the small difference of
large numbers. A chunk is cut into tiles, and with R the tile of r the sum has four parts:

    rows        t in R, t >= r; s in an earlier tile        stored for each t
    columns     s in R, s < r; t in a later tile            stored for each s
    diagonal    s and t in R                                stored for each r
    across      s in an earlier tile, t in a later one      stored for each tile of t and each R before it

By way of the state it has three:

    from_state  what outputs t >= r read of the state before the chunk, times dy_t              stored for each t
    into_state  what inputs s < r add to the state after the chunk, times its gradient          stored for each s
    through     what is left of the state before in the state after, times its gradient         stored for each chunk
"""

import triton
import triton.language as tl

from nondual.ops.ssd.triton.primitives import (
    cast_scaled,
    decay_between,
    dot_add,
    load_dy,
    load_log_decay,
    load_rows,
    load_state,
    store_rows,
    sum_products,
)


@triton.jit(do_not_specialize=["length", "chunks"])
def pass_back_kernel(
    p_states, p_grads, p_dlast, p_high, p_low, p_start, p_dinitial, p_through, length, heads, chunks,
    RESET: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of a piece of a head's state, from the last chunk to the first.

    p_grads holds what each chunk's outputs add to the gradient of the state before the chunk, and is overwritten by the
    gradient of the state after it. p_through gets this piece's part of "through", for each chunk.
    """
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_tile = tl.program_id(0) % tiles
    o = i_tile * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    b_dh = tl.load(p_dlast + i_bh * SIZE + o, mask=m, other=0.0)
    for i in tl.range(0, chunks):
        i_c = chunks - 1 - i
        i_chunk = (i_b * chunks + i_c) * heads + i_h
        b_added = tl.load(p_grads + i_chunk * SIZE + o, mask=m, other=0.0)
        tl.store(p_grads + i_chunk * SIZE + o, b_dh, mask=m)
        end = tl.minimum(i_c * CHUNK + CHUNK, length) - 1
        b_dh = b_dh * tl.exp2(tl.load(p_high + i_bh * length + end) + tl.load(p_low + i_bh * length + end))
        b_h = tl.load(p_states + i_chunk * SIZE + o, mask=m, other=0.0)
        if RESET:
            crosses = tl.load(p_start + i_b * length + end) < i_c * CHUNK
            b_dh = tl.where(crosses, b_dh, 0.0)
            b_h = tl.where(crosses, b_h, 0.0)
        tl.store(p_through + (i_bh * chunks + i_c) * tiles + i_tile, tl.sum(b_h * b_dh, 0))
        b_dh += b_added
    tl.store(p_dinitial + i_bh * SIZE + o, b_dh, mask=m)


@triton.jit(do_not_specialize=["batch", "length", "chunks", "tiles", "splits"])
def rows_kernel(
    p_x, p_b, p_c, p_d, p_z, p_dy, p_step, p_high, p_low, p_start, p_states, p_dc, p_dz, p_rows, p_across, p_diagonal,
    p_from_state,
    s_xb, s_xl, s_xh, s_bb, s_bl, s_bg, s_cb, s_cl, s_cg, s_zb, s_zl, s_zh, s_dyb, s_dyl, s_dyh,
    batch, length, heads, chunks, tiles, splits,
    SKIP: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr, PER: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: what is summed for each output step, in a tile of them, for PER heads of a group.

    That is the heads' part of dC, the dz of each head, and "rows", "across", "diagonal" and "from_state".
    """
    groups = heads // SHARE
    i_tile = tl.program_id(0) % tiles
    i_c = i_tile * BLOCK // CHUNK
    i_split = tl.program_id(0) // tiles % splits
    i_bg = (tl.program_id(0) // tiles // splits).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    p_b += i_b * s_bb + i_g * s_bg
    p_c += i_b * s_cb + i_g * s_cg
    begin = i_c * CHUNK
    o_t = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < length
    o_p = tl.arange(0, BLOCK_P)
    b_start = o_t * 0 - 1
    if RESET:
        b_start = tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)
    m_reached = m_t & (b_start < begin)
    b_c = load_rows(p_c, o_t, s_cl, m_t, N, BLOCK_N)  # (BLOCK, BLOCK_N)
    b_dc = tl.zeros((BLOCK, BLOCK_N), tl.float32)

    for i_h in tl.range(i_g * SHARE + i_split * PER, i_g * SHARE + tl.minimum(i_split * PER + PER, SHARE)):
        i_bh = i_b * heads + i_h
        p_xh = p_x + i_b * s_xb + i_h * s_xh
        p_zh = p_z + i_b * s_zb + i_h * s_zh
        p_dyh = p_dy + i_b * s_dyb + i_h * s_dyh
        b_high_t, b_low_t = load_log_decay(p_high + i_bh * length, p_low + i_bh * length, o_t, m_t)  # (BLOCK,)
        b_dy = load_dy(p_dyh, p_zh, o_t, s_dyl, s_zl, m_t, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
        b_dyn, s_dyn = cast_scaled(b_dy, b_c)

        # the state before the chunk
        p_state = p_states + ((i_b * chunks + i_c) * heads + i_h) * P * N
        b_h = load_state(p_state, P, N, BLOCK_P, BLOCK_N)  # (BLOCK_P, BLOCK_N)
        b_h, s_h = cast_scaled(b_h, b_c)
        b_decay = tl.exp2(tl.where(m_reached, b_high_t + b_low_t, float("-inf")))
        b_y = tl.dot(b_c, tl.trans(b_h), input_precision="ieee") * (b_decay * s_h)[:, None]  # (BLOCK, BLOCK_P)
        b_dc_state = tl.dot(b_dyn, b_h, input_precision="ieee") * (b_decay * s_dyn * s_h)[:, None]  # (BLOCK, BLOCK_N)
        if RESET:
            b_y = tl.where(m_reached[:, None], b_y, 0.0)
            b_dc_state = tl.where(m_reached[:, None], b_dc_state, 0.0)
        b_dc += b_dc_state
        tl.store(p_from_state + i_bh * length + o_t, tl.sum(b_y * b_dy, 1), mask=m_t)

        # within the chunk
        b_rows = tl.zeros((BLOCK,), tl.float32)
        for first in tl.range(begin, i_tile * BLOCK + BLOCK, BLOCK):
            o_s = first + tl.arange(0, BLOCK)
            m_s = o_s < length
            m_ts = (o_s[None, :] <= o_t[:, None]) & (o_s[None, :] >= b_start[:, None]) & m_t[:, None]
            b_high_s, b_low_s = load_log_decay(p_high + i_bh * length, p_low + i_bh * length, o_s, m_s)
            b_decay_ts = decay_between(b_high_t[:, None], b_low_t[:, None], b_high_s[None, :], b_low_s[None, :], m_ts)
            b_decay_ts *= tl.load(p_step + i_bh * length + o_s, mask=m_s, other=0.0)[None, :]
            b_x = load_rows(p_xh, o_s, s_xl, m_s, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            b_dw = tl.dot(b_dyn, tl.trans(b_x), input_precision="ieee") * s_dyn  # (BLOCK, BLOCK)
            b_dw = tl.where(m_ts, b_dw * b_decay_ts, 0.0)
            b_b = load_rows(p_b, o_s, s_bl, m_s, N, BLOCK_N)  # (BLOCK, BLOCK_N)
            b_scores = tl.dot(b_c, tl.trans(b_b), input_precision="ieee")  # (BLOCK, BLOCK)
            b_q = tl.where(m_ts & (o_s[None, :] != o_t[:, None]), b_scores * b_dw, 0.0)
            if first == i_tile * BLOCK:  # s and t in this tile: for each r in it, Q[t, s] over s < r <= t
                b_crossing = tl.where(o_s[None, :] <= o_t[:, None], tl.cumsum(b_q, 1) - b_q, 0.0)
                tl.store(p_diagonal + i_bh * length + o_s, tl.sum(b_crossing, 0), mask=m_s)
            else:
                i_across = (i_bh * tiles + i_tile) * (CHUNK // BLOCK) + (first - begin) // BLOCK
                tl.store(p_across + i_across, tl.sum(b_rows, 0))  # s before the tile `first`, t in this one
                b_rows += tl.sum(b_q, 1)
            b_dc = dot_add(b_dw, b_b, b_dc)
            if GATED:
                b_y = dot_add(tl.where(m_ts, b_scores * b_decay_ts, 0.0), b_x, b_y)
        tl.store(p_rows + i_bh * length + o_t, b_rows, mask=m_t)

        if GATED:
            if SKIP:
                b_d = tl.load(p_d + i_h * P + o_p, mask=o_p < P, other=0.0)  # (BLOCK_P,)
                b_y += load_rows(p_xh, o_t, s_xl, m_t, P, BLOCK_P).to(tl.float32) * b_d[None, :]
            b_z = load_rows(p_zh, o_t, s_zl, m_t, P, BLOCK_P).to(tl.float32)
            b_s = tl.sigmoid(b_z)
            b_dz = load_rows(p_dyh, o_t, s_dyl, m_t, P, BLOCK_P).to(tl.float32) * b_y * b_s * (1 + b_z * (1 - b_s))
            store_rows(p_dz + (i_b * length * heads + i_h) * P, o_t, heads * P, m_t, b_dz, P, BLOCK_P)

    # p_dc is (splits, B, L, G, N): the launcher adds the parts up
    p_dc += ((i_split * batch + i_b) * length * groups + i_g) * N
    store_rows(p_dc, o_t, groups * N, m_t, b_dc, N, BLOCK_N)


@triton.jit(do_not_specialize=["batch", "length", "chunks", "tiles", "splits"])
def columns_kernel(
    p_x, p_b, p_c, p_d, p_z, p_dy, p_step, p_high, p_low, p_start, p_grads, p_db, p_dx, p_dd, p_dstep, p_columns,
    p_into_state,
    s_xb, s_xl, s_xh, s_bb, s_bl, s_bg, s_cb, s_cl, s_cg, s_zb, s_zl, s_zh, s_dyb, s_dyl, s_dyh,
    batch, length, heads, chunks, tiles, splits,
    SKIP: tl.constexpr, GATED: tl.constexpr, RESET: tl.constexpr, SHARE: tl.constexpr, PER: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: what is summed for each input step, in a tile of them, for PER heads of a group.

    That is the heads' part of dB, the dx of each head, its part of dD, the gradient of Δ as a factor of x, "columns"
    and "into_state". Tiles are transposed: their rows are input steps, their columns output steps.
    """
    groups = heads // SHARE
    i_tile = tl.program_id(0) % tiles
    i_c = i_tile * BLOCK // CHUNK
    i_split = tl.program_id(0) // tiles % splits
    i_bg = (tl.program_id(0) // tiles // splits).to(tl.int64)
    i_b, i_g = i_bg // groups, i_bg % groups
    p_b += i_b * s_bb + i_g * s_bg
    p_c += i_b * s_cb + i_g * s_cg
    begin = i_c * CHUNK
    end = tl.minimum(begin + CHUNK, length)
    o_s = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < length
    o_p = tl.arange(0, BLOCK_P)
    m_to_end = m_s
    if RESET:
        m_to_end = m_s & (o_s >= tl.load(p_start + i_b * length + end - 1))
    b_b = load_rows(p_b, o_s, s_bl, m_s, N, BLOCK_N)  # (BLOCK, BLOCK_N)
    b_db = tl.zeros((BLOCK, BLOCK_N), tl.float32)

    for i_h in tl.range(i_g * SHARE + i_split * PER, i_g * SHARE + tl.minimum(i_split * PER + PER, SHARE)):
        i_bh = i_b * heads + i_h
        p_zh = p_z + i_b * s_zb + i_h * s_zh
        p_dyh = p_dy + i_b * s_dyb + i_h * s_dyh
        b_high_s, b_low_s = load_log_decay(p_high + i_bh * length, p_low + i_bh * length, o_s, m_s)  # (BLOCK,)
        b_step = tl.load(p_step + i_bh * length + o_s, mask=m_s, other=0.0)  # (BLOCK,)
        b_x = load_rows(p_x + i_b * s_xb + i_h * s_xh, o_s, s_xl, m_s, P, BLOCK_P)  # (BLOCK, BLOCK_P)

        # from the gradient of the state after the chunk; b_du is the gradient of u = Δ x
        p_grad = p_grads + ((i_b * chunks + i_c) * heads + i_h) * P * N
        b_dh = load_state(p_grad, P, N, BLOCK_P, BLOCK_N)  # (BLOCK_P, BLOCK_N)
        b_dh, s_dh = cast_scaled(b_dh, b_b)
        high_end, low_end = tl.load(p_high + i_bh * length + end - 1), tl.load(p_low + i_bh * length + end - 1)
        b_decay = decay_between(high_end, low_end, b_high_s, b_low_s, m_to_end)
        b_du = tl.dot(b_b, tl.trans(b_dh), input_precision="ieee") * (b_decay * s_dh)[:, None]  # (BLOCK, BLOCK_P)
        b_db_state = tl.dot(b_x, b_dh, input_precision="ieee") * (b_decay * b_step * s_dh)[:, None]  # (BLOCK, BLOCK_N)
        if RESET:
            b_du = tl.where(m_to_end[:, None], b_du, 0.0)
            b_db_state = tl.where(m_to_end[:, None], b_db_state, 0.0)
        b_db += b_db_state
        tl.store(
            p_into_state + i_bh * length + o_s,
            sum_products(b_du, b_x.to(tl.float32), m_s[:, None], 1) * b_step,
            mask=m_s,
        )

        # within the chunk
        b_columns = tl.zeros((BLOCK,), tl.float32)
        for first in tl.range(i_tile * BLOCK, end, BLOCK):
            o_t = first + tl.arange(0, BLOCK)
            m_t = o_t < length
            m_st = (o_s[:, None] <= o_t[None, :]) & m_t[None, :]
            if RESET:
                m_st = m_st & (o_s[:, None] >= tl.load(p_start + i_b * length + o_t, mask=m_t, other=0)[None, :])
            b_high_t, b_low_t = load_log_decay(p_high + i_bh * length, p_low + i_bh * length, o_t, m_t)
            b_decay_st = decay_between(b_high_t[None, :], b_low_t[None, :], b_high_s[:, None], b_low_s[:, None], m_st)
            b_c = load_rows(p_c, o_t, s_cl, m_t, N, BLOCK_N)  # (BLOCK, BLOCK_N)
            b_scores = tl.dot(b_b, tl.trans(b_c), input_precision="ieee")  # (BLOCK, BLOCK)
            b_dy = load_dy(p_dyh, p_zh, o_t, s_dyl, s_zl, m_t, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            b_dyn, s_dyn = cast_scaled(b_dy, b_b)
            b_du = dot_add(tl.where(m_st, b_scores * b_decay_st * s_dyn, 0.0), b_dyn, b_du)
            b_dw = tl.dot(b_x, tl.trans(b_dyn), input_precision="ieee") * s_dyn  # (BLOCK, BLOCK)
            b_dw = tl.where(m_st, b_dw * b_decay_st * b_step[:, None], 0.0)
            if first != i_tile * BLOCK:  # the rows kernel sums Q where s and t are in one tile
                b_columns += sum_products(b_scores, b_dw, m_st, 1)
            b_db = dot_add(b_dw, b_c, b_db)
        tl.store(p_columns + i_bh * length + o_s, b_columns, mask=m_s)
        tl.store(p_dstep + i_bh * length + o_s, sum_products(b_du, b_x.to(tl.float32), m_s[:, None], 1), mask=m_s)

        b_du = b_du * b_step[:, None]
        if SKIP:
            b_dy = load_dy(p_dyh, p_zh, o_s, s_dyl, s_zl, m_s, GATED, P, BLOCK_P)  # (BLOCK, BLOCK_P)
            b_d = tl.load(p_d + i_h * P + o_p, mask=o_p < P, other=0.0)  # (BLOCK_P,)
            b_du += b_dy * b_d[None, :]
            p_part = p_dd + ((i_b * tiles + i_tile) * heads + i_h) * P  # p_dd is (B, tiles, H, P)
            tl.store(p_part + o_p, sum_products(b_dy, b_x.to(tl.float32), m_s[:, None], 0), mask=o_p < P)
        store_rows(p_dx + (i_b * length * heads + i_h) * P, o_s, heads * P, m_s, b_du, P, BLOCK_P)

    p_db += ((i_split * batch + i_b) * length * groups + i_g) * N  # p_db is (splits, B, L, G, N)
    store_rows(p_db, o_s, groups * N, m_s, b_db, N, BLOCK_N)


@triton.jit(do_not_specialize=["length", "chunks", "tiles", "pieces"])
def steps_back_kernel(
    p_delta, p_a, p_bias, p_step, p_rows, p_across, p_diagonal, p_from_state, p_columns, p_into_state, p_through,
    p_dstep, p_ddelta, p_da, p_dbias, s_db, s_dl, s_dh, length, heads, chunks, tiles, pieces,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """One program: ddelta of a chunk of a head, and the chunk's parts of dA and dbias.

    The gradient of the log decay is put together from its seven parts.
    """
    per_chunk: tl.constexpr = CHUNK // BLOCK  # tiles of a chunk
    i_c = tl.program_id(0) % chunks
    i_bh = (tl.program_id(0) // chunks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_tile = tl.arange(0, per_chunk)
    # each step's tile and its place there, (per_chunk, BLOCK)
    o_rt = i_c * CHUNK + o_tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_rows = tl.load(p_rows + i_bh * length + o_rt, mask=o_rt < length, other=0.0)
    b_columns = tl.load(p_columns + i_bh * length + o_rt, mask=o_rt < length, other=0.0)
    i_row = i_c * per_chunk + o_tile[:, None]
    m_across = (o_tile[:, None] > o_tile[None, :]) & (i_row < tiles)
    o_across = (i_bh * tiles + i_row) * per_chunk + o_tile[None, :]
    b_across = tl.load(p_across + o_across, mask=m_across, other=0.0)  # (per_chunk, per_chunk)
    b_q = tl.cumsum(b_rows, 1, reverse=True) + (tl.cumsum(b_columns, 1) - b_columns) + tl.sum(b_across, 0)[:, None]

    o_t = i_c * CHUNK + tl.arange(0, CHUNK)
    m_t = o_t < length
    o = i_bh * length + o_t
    b_from_state = tl.load(p_from_state + o, mask=m_t, other=0.0)
    b_into_state = tl.load(p_into_state + o, mask=m_t, other=0.0)
    o_piece = tl.arange(0, BLOCK_PIECES)
    b_through = tl.load(p_through + (i_bh * chunks + i_c) * pieces + o_piece, mask=o_piece < pieces, other=0.0)
    b_dlog = tl.reshape(b_q, (CHUNK,)) + tl.load(p_diagonal + o, mask=m_t, other=0.0)
    b_state = tl.cumsum(b_from_state, 0, reverse=True) + (tl.cumsum(b_into_state, 0) - b_into_state)
    b_dlog += b_state + tl.sum(b_through, 0)
    b_dlog = tl.where(m_t, b_dlog, 0.0)

    b_step = tl.load(p_step + o, mask=m_t, other=0.0)
    b_d = tl.load(p_dstep + o, mask=m_t, other=0.0) + b_dlog * tl.load(p_a + i_h)
    if SOFTPLUS:
        p_delta += i_b * s_db + i_h * s_dh
        b_raw = tl.load(p_delta + o_t.to(tl.int64) * s_dl, mask=m_t, other=0.0).to(tl.float32) + tl.load(p_bias + i_h)
        b_d *= tl.where(b_raw > 20.0, 1.0, tl.sigmoid(b_raw))
    tl.store(p_ddelta + (i_b * length + o_t) * heads + i_h, b_d.to(p_ddelta.dtype.element_ty), mask=m_t)
    tl.store(p_da + i_bh * chunks + i_c, tl.sum(b_step * b_dlog, 0))
    tl.store(p_dbias + i_bh * chunks + i_c, tl.sum(b_d, 0))
