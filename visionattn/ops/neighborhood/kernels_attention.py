"""Triton kernels of neighbourhood attention: the forward pass and the gradient of the queries.

A program holds the queries of one tile, image and head, and walks over the keys that their windows reach, a rectangle
of the tile's dilation group read where it lies, a chunk at a time. Which query meets which key is a mask, the same for
all tiles of a class (``geometry.py``): bit words without a bias; with one a tile of numbers, the bias where they meet
and -inf elsewhere, made by ``bias_tile_kernel`` at every call.

The forward pass takes exponentials of the scores as they are, without looking for the largest first. Only if a row's
sum comes out too large or too small for float32 is its tile computed again, with its maxima. In float16, whose range is
too small for that, the maxima come first always.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(60000.0)  # entry of a tile of bias, which float16 must hold
FIELDS = tl.constexpr(8)


@triton.jit
def _place(rows_ptr, columns_ptr, HEADS: tl.constexpr):
    """Head of the program, and where the tables describe its tile. Heads run fastest: they share lines of memory."""
    head, x = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    return head, rows_ptr + tl.program_id(1) * FIELDS, columns_ptr + x * FIELDS


@triton.jit
def _tile_rows(rows_ptr, columns_ptr, m, step_y, step_x, TILE_X: tl.constexpr):
    """Pixels of rows ``m`` of a tile, and which of them exist."""
    i, j = m // TILE_X, m % TILE_X
    inside = (i < tl.load(rows_ptr + 1)) & (j < tl.load(columns_ptr + 1))
    return tl.load(rows_ptr) + i * step_y, tl.load(columns_ptr) + j * step_x, inside


@triton.jit
def _halo(n, count_y, count_x, WIDTH: tl.constexpr):
    """Place of columns ``n`` of a walk in the halo, moved inside where there are no more."""
    return tl.minimum(n // WIDTH, count_y - 1), tl.minimum(n % WIDTH, count_x - 1)


@triton.jit
def _read(ptr, offsets, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Channels of the pixels at ``offsets``, 0 beyond a head's own and, if MASKED, where ``mask`` is false."""
    d = tl.arange(0, BLOCK_D)
    where = ptr + offsets[:, None] + d[None, :]
    if MASKED:
        return tl.load(where, mask=mask[:, None] & (d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(where)
    return tl.load(where, mask=(d < D)[None, :], other=0.0)


@triton.jit
def _columns(
    ptr, n, count_y, count_x, step_y, step_x, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Channels of columns ``n`` of a walk; ``step_y`` and ``step_x`` lead to the next one of the dilation group."""
    a, b = _halo(n, count_y, count_x, WIDTH)
    return _read(ptr, a * step_y + b * step_x, n, D, BLOCK_D, False)


@triton.jit
def _bias(meet_ptr, rows, n0, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """Columns ``n0 ... n0 + COUNT`` of a tile of bias ``[rows, COLUMNS]``."""
    return tl.load(meet_ptr + rows[:, None] * COLUMNS + (n0 + tl.arange(0, COUNT))[None, :]).to(tl.float32)


@triton.jit
def _mask(meet_ptr, rows, n0, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Which rows meet which columns ``n0 ... n0 + COUNT``, from words ``[columns / 32, ROWS]``."""
    column, word_ptr = tl.arange(0, COUNT), meet_ptr + (n0 // 32) * ROWS + rows
    word = tl.load(word_ptr)[:, None]
    if COUNT < 32:
        word = word >> (n0 & 31)
    # in two steps: the first is the same for all columns of a thread, the second a constant
    word = word >> (column & 6)[None, :]
    if COUNT >= 64:  # which word a register's column is in is known when this is compiled
        second = tl.load(word_ptr + ROWS)[:, None] >> (column & 6)[None, :]
        word = tl.where(((column & 32) == 0)[None, :], word, second)
    if COUNT == 128:
        third = tl.load(word_ptr + 2 * ROWS)[:, None] >> (column & 6)[None, :]
        fourth = tl.load(word_ptr + 3 * ROWS)[:, None] >> (column & 6)[None, :]
        word = tl.where((column < 64)[None, :], word, tl.where((column < 96)[None, :], third, fourth))
    return (word & (1 << (column & 25))[None, :]) != 0


@triton.jit
def _powers(
    scores, factor, shift, meet_ptr, rows, n0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Exponentials of the scores less ``shift``, 0 where row and column do not meet."""
    if BIAS:
        p = tl.exp2(scores * factor + (_bias(meet_ptr, rows, n0, COLUMNS, COUNT) - shift))
    else:  # masked last, or the compiler computes all of the mask beforehand and keeps it in registers
        # against a 0 that the compiler does not know, or it would mask 16-bit halves of registers
        p = tl.where(_mask(meet_ptr, rows, n0, ROWS, COUNT), tl.exp2(scores * factor - shift), factor * 0.0)
    return p


@triton.jit
def _sum(p, total, ONES: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of rows added to ``total``, one column, or with ONES 16 alike that the matrix units add up."""
    if ONES:
        total = tl.dot(p, tl.full([p.shape[1], 16], 1.0, p.dtype), total, input_precision=PRECISION)
    else:
        total += tl.sum(p, 1)[:, None]
    return total


@triton.jit
def _meeting(
    meet_ptr, rows_ptr, columns_ptr, head, classes_x,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, WORDS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Where the mask of a tile begins."""
    number = tl.load(rows_ptr + 4) * classes_x + tl.load(columns_ptr + 4)
    if BIAS:
        return meet_ptr + (number * HEADS + head).to(tl.int64) * (BLOCK_M * 32 * WORDS)
    return meet_ptr + number * (((BLOCK_M + 31) // 32) * 32 * WORDS)


@triton.jit
def bias_tile_kernel(
    bias_ptr, words_ptr, classes_ptr, tile_ptr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE_X: tl.constexpr, BLOCK_M: tl.constexpr, WORDS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, BY_KEY: tl.constexpr,
):  # fmt: skip
    """Bias in powers of 2 where query and key of a class meet, -inf elsewhere: ``[classes, heads, queries, keys]``.

    Of a tile of queries or, if BY_KEY, of keys.
    """
    number, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ROW_WORDS: tl.constexpr = (BLOCK_M + 31) // 32
    m, n = tl.arange(0, BLOCK_M)[:, None], part * 32 + tl.arange(0, 32)[None, :]
    words_ptr += number * (ROW_WORDS * 32 * WORDS)
    shift_y, shift_x = tl.load(classes_ptr + number * FIELDS + 2), tl.load(classes_ptr + number * FIELDS + 3)
    y = n // WIDTH - m // TILE_X + shift_y  # from row to column in the dilation group
    x = n % WIDTH - m % TILE_X + shift_x
    if BY_KEY:
        y, x = -y, -x
        word = tl.load(words_ptr + (m // 32) * (32 * WORDS) + n)
        meet = ((word >> (m % 32)) & 1) != 0
        where = n * BLOCK_M + m
    else:
        word = tl.load(words_ptr + part * (32 * ROW_WORDS) + m)
        meet = ((word >> (n % 32)) & 1) != 0
        where = m * (32 * WORDS) + n
    entry = (head * (2 * KH - 1) + y + KH - 1) * (2 * KW - 1) + x + KW - 1
    bias = tl.load(bias_ptr + entry, mask=meet, other=float("-inf")).to(tl.float32)
    limited = tl.minimum(tl.maximum(bias * LOG2_E, -LARGEST), LARGEST)
    tile = tl.where((bias == float("-inf")) | (bias != bias), bias, limited)
    tile_ptr += (number * HEADS + head).to(tl.int64) * (BLOCK_M * 32 * WORDS)
    tl.store(tile_ptr + where, tile.to(tile_ptr.dtype.element_ty))


@triton.jit
def _store(
    out_ptr, lse_ptr, acc, sums, shift, batch, head, pixels, inside, size,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of the queries at ``pixels``, from sums of exponentials less ``shift``."""
    d = tl.arange(0, BLOCK_D)
    sums = tl.where(inside, sums, 1.0)
    where = batch * (size * HEADS * D) + (pixels * HEADS + head)[:, None] * D + d[None, :]
    out = (acc * (1.0 / sums)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + where, out, mask=inside[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + (batch * HEADS + head) * size + pixels, shift / LOG2_E + tl.log(sums), mask=inside)


@triton.jit
def _unshifted(
    q, k, v, total, acc, factor, meet_ptr, m, n0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums and output with ``COUNT`` keys from ``n0`` on added."""
    # sums of what is rounded already: the matrix units are as exact
    ONES: tl.constexpr = PRECISION != "ieee"
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = _powers(scores, factor, 0.0, meet_ptr, m, n0, ROWS, COLUMNS, COUNT, BIAS).to(v.dtype)
    return _sum(p, total, ONES, PRECISION), tl.dot(p, v, acc, input_precision=PRECISION)


@triton.jit
def _shifted_image(
    batch, q_ptr, k_ptr, v_ptr, meet_ptr, out_ptr, lse_ptr, factor, q_sh, q_sw, k_sh, k_sw, v_sh, v_sw,
    H, W, head, y, x, inside, count_y, count_x, step_y, step_x,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, WORDS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the queries of one tile, head and image, from exponentials less their maximum."""
    ROWS: tl.constexpr = (BLOCK_M + 31) // 32 * 32
    COUNT: tl.constexpr = 64 if WORDS % 2 == 0 else 32
    m = tl.arange(0, BLOCK_M)
    q = _read(q_ptr, y * q_sh + x * q_sw, inside, D, BLOCK_D, True)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in range(0, 32 * WORDS, COUNT):
        n = n0 + tl.arange(0, COUNT)
        k = _columns(k_ptr, n, count_y, count_x, step_y * k_sh, step_x * k_sw, WIDTH, D, BLOCK_D)
        v = _columns(v_ptr, n, count_y, count_x, step_y * v_sh, step_x * v_sw, WIDTH, D, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if BIAS:
            scores += _bias(meet_ptr, m, n0, 32 * WORDS, COUNT)
        else:
            scores = tl.where(_mask(meet_ptr, m, n0, ROWS, COUNT), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        p, decay = tl.exp2(scores - shift[:, None]), tl.exp2(top - shift)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        top = higher
    _store(out_ptr, lse_ptr, acc, total, top, batch, head, y * W + x, inside, H * W, HEADS, D, BLOCK_D)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, meet_ptr, rows_ptr, columns_ptr, out_ptr, lse_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    B, H, W, step_y, step_x, classes_x,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_X: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, WALK: tl.constexpr, WORDS: tl.constexpr,
    IMAGES: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the queries of one tile and head, for IMAGES images one after the other."""
    ROWS: tl.constexpr = (BLOCK_M + 31) // 32 * 32
    COLUMNS: tl.constexpr = 32 * WORDS
    head, rows_ptr, columns_ptr = _place(rows_ptr, columns_ptr, HEADS)
    m = tl.arange(0, BLOCK_M)
    y, x, inside = _tile_rows(rows_ptr, columns_ptr, m, step_y, step_x, TILE_X)
    count_y, count_x = tl.load(rows_ptr + 3), tl.load(columns_ptr + 3)
    last = tl.load(rows_ptr + 5) * BLOCK_N if WALK else 0
    q_ptr += head * q_sn
    k_ptr += head * k_sn + tl.load(rows_ptr + 2) * k_sh + tl.load(columns_ptr + 2) * k_sw
    v_ptr += head * v_sn + tl.load(rows_ptr + 2) * v_sh + tl.load(columns_ptr + 2) * v_sw
    meet_ptr = _meeting(meet_ptr, rows_ptr, columns_ptr, head, classes_x, HEADS, BLOCK_M, WORDS, BIAS)
    k_y, k_x, v_y, v_x = step_y * k_sh, step_x * k_sw, step_y * v_sh, step_x * v_sw
    factor = scale * LOG2_E
    first = tl.program_id(2) * IMAGES
    end = min(first + IMAGES, B)
    bad = -1 if EXACT else 0  # bits of the images whose sums leave float32's range
    if not EXACT:
        for image in range(first, end):  # without a walk inside, the next image is read while this one is computed
            batch = tl.cast(image, tl.int64)
            k_image, v_image = k_ptr + batch * k_sb, v_ptr + batch * v_sb
            q = _read(q_ptr + batch * q_sb, y * q_sh + x * q_sw, inside, D, BLOCK_D, True)
            total = tl.zeros([BLOCK_M, 16 if PRECISION != "ieee" else 1], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            if WALK:
                for n0 in range(0, last, BLOCK_N):
                    n = n0 + tl.arange(0, BLOCK_N)
                    k = _columns(k_image, n, count_y, count_x, k_y, k_x, WIDTH, D, BLOCK_D)
                    v = _columns(v_image, n, count_y, count_x, v_y, v_x, WIDTH, D, BLOCK_D)
                    total, acc = _unshifted(
                        q, k, v, total, acc, factor, meet_ptr, m, n0, ROWS, COLUMNS, BLOCK_N, BIAS, PRECISION
                    )  # fmt: skip
            for i in tl.static_range(len(PARTS)):
                n0 = last + PARTS[i][0]
                n = n0 + tl.arange(0, PARTS[i][1])
                k = _columns(k_image, n, count_y, count_x, k_y, k_x, WIDTH, D, BLOCK_D)
                v = _columns(v_image, n, count_y, count_x, v_y, v_x, WIDTH, D, BLOCK_D)
                total, acc = _unshifted(
                    q, k, v, total, acc, factor, meet_ptr, m, n0, ROWS, COLUMNS, PARTS[i][1], BIAS, PRECISION
                )  # fmt: skip
            sums, zero = tl.max(total, 1), tl.zeros([BLOCK_M], tl.float32)
            _store(out_ptr, lse_ptr, acc, sums, zero, batch, head, y * W + x, inside, H * W, HEADS, D, BLOCK_D)
            wrong = tl.max((inside & ((sums < 1e-24) | (sums > 1e30))).to(tl.int32), 0)
            bad |= wrong << (image - first)
    if bad != 0:
        tl.debug_barrier()  # what is there already is written again, perhaps by other threads
        for image in range(first, end):
            if ((bad >> (image - first)) & 1) != 0:
                batch = tl.cast(image, tl.int64)
                _shifted_image(
                    batch, q_ptr + batch * q_sb, k_ptr + batch * k_sb, v_ptr + batch * v_sb, meet_ptr, out_ptr,
                    lse_ptr, factor, q_sh, q_sw, k_sh, k_sw, v_sh, v_sw, H, W, head, y, x, inside, count_y, count_x,
                    step_y, step_x, HEADS, D, BLOCK_D, WIDTH, BLOCK_M, WORDS, BIAS, PRECISION,
                )  # fmt: skip


@triton.jit
def _nothing(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def _query_grads(
    q, do, k, v, lse, delta, dq, factor, meet_ptr, m, n0, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries with ``COUNT`` keys from ``n0`` on added, and those of the scores."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = _powers(scores, factor, lse[:, None], meet_ptr, m, n0, ROWS, COLUMNS, COUNT, BIAS)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), ds


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, meet_ptr, rows_ptr, columns_ptr, order_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, dq_ptr,
    delta_ptr, part_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    B, H, W, step_y, step_x, classes_x,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_X: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, WALK: tl.constexpr, WORDS: tl.constexpr,
    IMAGES: tl.constexpr, BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, LSE_GRAD: tl.constexpr,
    SPREAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of one tile and head, and their ``delta = sum(out * grad_out) - grad_lse``.

    For IMAGES images one after the other. The pixels of the gradient are SPREAD times as far apart as those of the
    output. With BIAS_GRAD the scores' gradients, summed over these images, are written
    to ``[tiles in order_ptr's order, shares of the images, heads, rows, columns]``; the walk must have parts only.
    """
    ROWS: tl.constexpr = (BLOCK_M + 31) // 32 * 32
    COLUMNS: tl.constexpr = 32 * WORDS
    head, rows_ptr, columns_ptr = _place(rows_ptr, columns_ptr, HEADS)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    y, x, inside = _tile_rows(rows_ptr, columns_ptr, m, step_y, step_x, TILE_X)
    mask, factor = inside[:, None] & (d < D)[None, :], scale * LOG2_E
    count_y, count_x = tl.load(rows_ptr + 3), tl.load(columns_ptr + 3)
    last = tl.load(rows_ptr + 5) * BLOCK_N if WALK else 0
    q_ptr += head * q_sn
    k_ptr += head * k_sn + tl.load(rows_ptr + 2) * k_sh + tl.load(columns_ptr + 2) * k_sw
    v_ptr += head * v_sn + tl.load(rows_ptr + 2) * v_sh + tl.load(columns_ptr + 2) * v_sw
    meet_ptr = _meeting(meet_ptr, rows_ptr, columns_ptr, head, classes_x, HEADS, BLOCK_M, WORDS, BIAS)
    k_y, k_x, v_y, v_x = step_y * k_sh, step_x * k_sw, step_y * v_sh, step_x * v_sw
    pixels = y * W + x
    sums = ()
    if BIAS_GRAD:
        for i in tl.static_range(len(PARTS)):
            sums += (_nothing(BLOCK_M, PARTS[i][1]),)
    first = tl.program_id(2) * IMAGES
    for image in range(first, min(first + IMAGES, B)):
        batch = tl.cast(image, tl.int64)
        k_image, v_image = k_ptr + batch * k_sb, v_ptr + batch * v_sb
        q = _read(q_ptr + batch * q_sb, y * q_sh + x * q_sw, inside, D, BLOCK_D, True)
        where = batch * (H * W * HEADS * D) + (pixels * HEADS + head)[:, None] * D + d[None, :]
        do = tl.load(do_ptr + where, mask=mask, other=0.0)
        out = tl.load(out_ptr + where, mask=mask, other=0.0)
        row = (batch * HEADS + head) * (H * W) + pixels
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * LOG2_E
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        if LSE_GRAD:
            delta -= tl.load(dlse_ptr + row, mask=inside, other=0.0)
        tl.store(delta_ptr + row, delta, mask=inside)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WALK:
            for n0 in range(0, last, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                k = _columns(k_image, n, count_y, count_x, k_y, k_x, WIDTH, D, BLOCK_D)
                v = _columns(v_image, n, count_y, count_x, v_y, v_x, WIDTH, D, BLOCK_D)
                dq, _ = _query_grads(
                    q, do, k, v, lse, delta, dq, factor, meet_ptr, m, n0, ROWS, COLUMNS, BLOCK_N, BIAS, PRECISION
                )  # fmt: skip
        added = ()
        for i in tl.static_range(len(PARTS)):
            n0 = last + PARTS[i][0]
            n = n0 + tl.arange(0, PARTS[i][1])
            k = _columns(k_image, n, count_y, count_x, k_y, k_x, WIDTH, D, BLOCK_D)
            v = _columns(v_image, n, count_y, count_x, v_y, v_x, WIDTH, D, BLOCK_D)
            dq, ds = _query_grads(
                q, do, k, v, lse, delta, dq, factor, meet_ptr, m, n0, ROWS, COLUMNS, PARTS[i][1], BIAS, PRECISION
            )  # fmt: skip
            if BIAS_GRAD:
                added += (sums[i] + ds,)
        if BIAS_GRAD:
            sums = added
        where = batch * (H * W * HEADS * D * SPREAD) + (pixels * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
        tl.store(dq_ptr + where, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)
    if BIAS_GRAD:
        order = tl.load(order_ptr + tl.program_id(1) * (tl.num_programs(0) // HEADS) + tl.program_id(0) // HEADS)
        place = (order * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * HEADS + head
        for i in tl.static_range(len(PARTS)):
            n = PARTS[i][0] + tl.arange(0, PARTS[i][1])
            tl.store(part_ptr + place * (BLOCK_M * COLUMNS) + m[:, None] * COLUMNS + n[None, :], sums[i])
        WRITTEN: tl.constexpr = PARTS[len(PARTS) - 1][0] + PARTS[len(PARTS) - 1][1]
        if WRITTEN < COLUMNS:  # half a word, for parts are multiples of 16; sums are taken of whole words
            n = WRITTEN + tl.arange(0, 16)
            nothing = tl.zeros([BLOCK_M, 16], tl.float32)
            tl.store(part_ptr + place * (BLOCK_M * COLUMNS) + m[:, None] * COLUMNS + n[None, :], nothing)
