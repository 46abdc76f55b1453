"""Triton kernels of neighbourhood attention: the gradients of keys, values and bias.

The gradient of keys and values is the forward walk with the roles exchanged: a program holds the keys of one tile and
walks over the queries whose windows they lie in.

For the gradient of the bias a program takes one class of tiles, one head and one chunk of their keys, and goes through
a share of all such tiles in all images; the sum of the scores' gradients stays in registers. The sums of all shares,
and then the entries that belong to one relative position, are added in a fixed order.
"""

import triton
import triton.language as tl

from visionattn.ops.neighborhood.kernels_attention import (
    FIELDS,
    LOG2_E,
    _halo,
    _meeting,
    _place,
    _powers,
    _read,
    _tile_rows,
)


@triton.jit
def _queries(
    q_ptr, do_ptr, lse_ptr, delta_ptr, n, count_y, count_x, q_step_y, q_step_x, step_y, step_x, W,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns ``n`` of a walk over queries: channels, gradient, log-sum-exp in powers of 2, delta."""
    a, b = _halo(n, count_y, count_x, WIDTH)
    q = _read(q_ptr, a * q_step_y + b * q_step_x, n, D, BLOCK_D, False)
    pixels = a * (step_y * W) + b * step_x
    do = _read(do_ptr, pixels * (HEADS * D), n, D, BLOCK_D, False)
    return q, do, tl.load(lse_ptr + pixels) * LOG2_E, tl.load(delta_ptr + pixels)


@triton.jit
def _key_grads(
    q, do, lse, delta, k, v, dk, dv, factor, meet_ptr, n, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values with queries ``n`` of the walk added."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = _powers(scores, factor, lse[:, None], meet_ptr, n, 0, ROWS, BLOCK_M, BLOCK_M, BIAS)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION), dv


@triton.jit
def _key_grads_by_key(
    q, do, lse, delta, k, v, dk, dv, factor, meet_ptr, n, ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same with keys as rows: a few queries are no rows for the matrix units."""
    m, n = tl.arange(0, BLOCK_M)[:, None], n[None, :]
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if BIAS:
        tile = tl.load(meet_ptr + n * BLOCK_M + m).to(tl.float32)
        p = tl.exp2(scores * factor + (tile - lse[None, :]))
    else:
        word = tl.load(meet_ptr + (m // 32) * ROWS + n)
        p = tl.where(((word >> (m % 32)) & 1) != 0, tl.exp2(scores * factor - lse[None, :]), factor * 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, meet_ptr, rows_ptr, columns_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    B, H, W, step_y, step_x, classes_x,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_X: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, WALK: tl.constexpr, WORDS: tl.constexpr,
    IMAGES: tl.constexpr, BIAS: tl.constexpr, SPREAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one tile and head, for IMAGES images one after the other.

    The pixels of the gradients are SPREAD times as far apart as those of the output.
    """
    ROWS: tl.constexpr = 32 * WORDS
    head, rows_ptr, columns_ptr = _place(rows_ptr, columns_ptr, HEADS)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    y, x, inside = _tile_rows(rows_ptr, columns_ptr, m, step_y, step_x, TILE_X)
    mask, factor = inside[:, None] & (d < D)[None, :], scale * LOG2_E
    count_y, count_x = tl.load(rows_ptr + 3), tl.load(columns_ptr + 3)
    last = tl.load(rows_ptr + 5) * BLOCK_N if WALK else 0
    query_y, query_x = tl.load(rows_ptr + 2), tl.load(columns_ptr + 2)
    start = query_y * W + query_x
    q_ptr += head * q_sn + query_y * q_sh + query_x * q_sw
    k_ptr += head * k_sn
    v_ptr += head * v_sn
    q_y, q_x = step_y * q_sh, step_x * q_sw
    meet_ptr = _meeting(meet_ptr, rows_ptr, columns_ptr, head, classes_x, HEADS, BLOCK_M, WORDS, BIAS)
    first = tl.program_id(2) * IMAGES
    for number in range(first, min(first + IMAGES, B)):
        batch = tl.cast(number, tl.int64)
        image, plane = batch * (H * W * HEADS * D), (batch * HEADS + head) * (H * W)
        k = _read(k_ptr + batch * k_sb, y * k_sh + x * k_sw, inside, D, BLOCK_D, True)
        v = _read(v_ptr + batch * v_sb, y * v_sh + x * v_sw, inside, D, BLOCK_D, True)
        q_image, do_image = q_ptr + batch * q_sb, do_ptr + image + (start * HEADS + head) * D
        lse_image, delta_image = lse_ptr + plane + start, delta_ptr + plane + start
        dk, dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WALK:
            for n0 in range(0, last, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                q, do, lse, delta = _queries(
                    q_image, do_image, lse_image, delta_image, n, count_y, count_x, q_y, q_x, step_y, step_x, W,
                    HEADS, WIDTH, D, BLOCK_D,
                )  # fmt: skip
                dk, dv = _key_grads(
                    q, do, lse, delta, k, v, dk, dv, factor, meet_ptr, n, ROWS, BLOCK_M, BIAS, PRECISION
                )  # fmt: skip
        for i in tl.static_range(len(PARTS)):
            n = last + PARTS[i][0] + tl.arange(0, PARTS[i][1])
            q, do, lse, delta = _queries(
                q_image, do_image, lse_image, delta_image, n, count_y, count_x, q_y, q_x, step_y, step_x, W, HEADS,
                WIDTH, D, BLOCK_D,
            )  # fmt: skip
            if PARTS[i][1] >= 64:
                dk, dv = _key_grads(
                    q, do, lse, delta, k, v, dk, dv, factor, meet_ptr, n, ROWS, BLOCK_M, BIAS, PRECISION
                )  # fmt: skip
            else:
                dk, dv = _key_grads_by_key(
                    q, do, lse, delta, k, v, dk, dv, factor, meet_ptr, n, ROWS, BLOCK_M, BIAS, PRECISION
                )  # fmt: skip
        where = image * SPREAD + ((y * W + x) * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
        tl.store(dk_ptr + where, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def bias_grad_kernel(
    q_ptr, k_ptr, v_ptr, meet_ptr, rows_ptr, columns_ptr, lists_ptr, splits_ptr, lse_ptr, do_ptr, delta_ptr, part_ptr,
    scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn,
    B, H, W, step_y, step_x, chunks,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_X: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of the scores' gradients over one split, for one head and chunk of keys: ``[splits, heads, rows, columns]``.

    Rows have ``32 * WORDS`` columns, of which the first ``chunks * BLOCK_N`` are written.
    """
    pid = tl.program_id(0)
    chunk, pid = pid % chunks, pid // chunks
    head, split = pid % HEADS, pid // HEADS
    splits_ptr += split * FIELDS
    first, last = tl.load(splits_ptr), tl.load(splits_ptr + 1)
    lists_ptr += 2 * tl.load(splits_ptr + 2)
    m, n0 = tl.arange(0, BLOCK_M), chunk * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    meet_ptr += (tl.load(splits_ptr + 3) * HEADS + head).to(tl.int64) * (BLOCK_M * 32 * WORDS)
    q_ptr += head * q_sn
    k_ptr += head * k_sn
    v_ptr += head * v_sn
    do_ptr += head * D
    factor = scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(first // B, (last + B - 1) // B):
        place = lists_ptr + 2 * number
        row_ptr, column_ptr = rows_ptr + tl.load(place) * FIELDS, columns_ptr + tl.load(place + 1) * FIELDS
        y, x, inside = _tile_rows(row_ptr, column_ptr, m, step_y, step_x, TILE_X)
        key_y, key_x = tl.load(row_ptr + 2), tl.load(column_ptr + 2)
        a, b = _halo(n, tl.load(row_ptr + 3), tl.load(column_ptr + 3), WIDTH)
        key, value = (key_y + a * step_y) * k_sh, (key_y + a * step_y) * v_sh
        key, value = key + (key_x + b * step_x) * k_sw, value + (key_x + b * step_x) * v_sw
        query, pixels = y * q_sh + x * q_sw, y * W + x
        start, end = max(first - number * B, 0), min(last - number * B, B)
        row = (tl.cast(start, tl.int64) * HEADS + head) * (H * W) + pixels
        next_lse = tl.load(lse_ptr + row, mask=inside, other=0.0)  # read a step ahead, as the pipeline does with rows
        next_delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        for image in range(start, end):
            batch = tl.cast(image, tl.int64)
            q = _read(q_ptr + batch * q_sb, query, inside, D, BLOCK_D, True)
            do = _read(do_ptr + batch * (H * W * HEADS * D), pixels * (HEADS * D), inside, D, BLOCK_D, True)
            k = _read(k_ptr + batch * k_sb, key, n, D, BLOCK_D, False)
            v = _read(v_ptr + batch * v_sb, value, n, D, BLOCK_D, False)
            lse, delta = next_lse * LOG2_E, next_delta
            row = ((batch + 1) * HEADS + head) * (H * W) + pixels
            next_lse = tl.load(lse_ptr + row, mask=inside & (image + 1 < end), other=0.0)
            next_delta = tl.load(delta_ptr + row, mask=inside & (image + 1 < end), other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = _powers(scores, factor, lse[:, None], meet_ptr, m, n0, BLOCK_M, 32 * WORDS, BLOCK_N, True)
            acc += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    part_ptr += (split * HEADS + head).to(tl.int64) * (BLOCK_M * 32 * WORDS)
    tl.store(part_ptr + m[:, None] * (32 * WORDS) + n[None, :], acc)


@triton.jit
def bias_sum_kernel(
    part_ptr, classes_ptr, sum_ptr, size, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums over the splits of each class: ``[splits, heads, size]`` to ``[classes, heads, size]``."""
    number, head, n = tl.program_id(1), tl.program_id(2), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, count = tl.load(classes_ptr + number * FIELDS), tl.load(classes_ptr + number * FIELDS + 1)
    some = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK], tl.float32)
    for s in range(0, count, BLOCK_S):
        split = (first + s + some).to(tl.int64)[:, None]
        mask = (s + some < count)[:, None] & (n < size)[None, :]
        total += tl.load(part_ptr + (split * HEADS + head) * size + n[None, :], mask=mask, other=0.0)
    where = (number * HEADS + head).to(tl.int64) * size + n
    tl.store(sum_ptr + where, tl.sum(total, 0), mask=n < size)


@triton.jit
def bias_fold_kernel(
    sum_ptr, classes_ptr, dbias_ptr, classes,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE_X: tl.constexpr, BLOCK_M: tl.constexpr, WORDS: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias of one relative position and head, from sums ``[classes, heads, rows, columns]``."""
    place, head, m = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_M)
    y = place // (2 * KW - 1) - (KH - 1) + m // TILE_X  # of the key, from the tile's first row
    x = place % (2 * KW - 1) - (KW - 1) + m % TILE_X
    total = tl.zeros([BLOCK_M], tl.float32)
    for number in range(classes):
        class_ptr = classes_ptr + number * FIELDS
        a, b = y - tl.load(class_ptr + 2), x - tl.load(class_ptr + 3)
        there = (a >= 0) & (a < tl.load(class_ptr + 4)) & (b >= 0) & (b < tl.load(class_ptr + 5))
        where = (number * HEADS + head).to(tl.int64) * (BLOCK_M * 32 * WORDS) + m * (32 * WORDS) + a * WIDTH + b
        total += tl.load(sum_ptr + where, mask=there, other=0.0)
    entry = head * ((2 * KH - 1) * (2 * KW - 1)) + place
    tl.store(dbias_ptr + entry, tl.sum(total, 0).to(dbias_ptr.dtype.element_ty))
