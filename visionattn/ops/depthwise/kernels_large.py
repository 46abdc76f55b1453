"""Triton kernels of depthwise convolution with large and dilated kernels.

A program holds ``ROWS`` rows of ``BLOCK_P`` pixels of a map, ``BLOCK_C`` channels each, two values to a thread. For one
column of the kernel after the other it walks down the input rows once and uses each loaded value for all rows of the
result that it reaches: with 28 rows an output of a 17 x 17 kernel costs 27 loads instead of 289. Columns are a loop at
run time, or the program would be too long for the compiler and the instruction cache.

With a dilation the rows of a program lie that far apart, so that they share input rows all the same.

What is known beforehand costs nothing: where ``STEP`` is given rows are reached by constant offsets, and where
``WHOLE`` the program has all rows of the map, and input rows beyond the border are left out of the code. Where ``FULL``
all rows of all tiles are on the map, so that only the rows around them may lie outside.
"""

import triton
import triton.language as tl

from visionattn.ops.depthwise.kernels_depthwise import _float32, _load


@triton.jit
def _origin(strip, strips, ROWS: tl.constexpr, DILATION: tl.constexpr, WHOLE: tl.constexpr):
    """First row of a tile: strips of rows that lie a dilation apart, for one remainder after the other."""
    if WHOLE:
        return 0
    else:
        return strip // strips + strip % strips * ROWS * DILATION


@triton.jit
def _pixels(number, lane, B, W, BLOCK_P: tl.constexpr):
    """Image and column of a tile's pixels, counted across the images, and which of them there are."""
    pixel = number * BLOCK_P + lane
    return (pixel // W).to(tl.int64), pixel % W, pixel < B * W


@triton.jit
def _row(pointer, row, stride, STEP: tl.constexpr):
    """``pointer`` moved down by so many rows, a constant."""
    if STEP:
        return pointer + row * STEP
    else:
        return pointer + row * stride.to(tl.int64)


@triton.jit
def _there(mask, y, H, ABOVE: tl.constexpr, BELOW: tl.constexpr):
    """``mask`` where the row ``y`` is one of the map, if it may lie above or below."""
    if ABOVE and BELOW:
        return mask & ((y >= 0) & (y < H))
    elif ABOVE:
        return mask & (y >= 0)
    elif BELOW:
        return mask & (y < H)
    else:
        return mask


@triton.jit
def large_kernel(
    x_ptr, taps_ptr, bias_ptr, residual_ptr, out_ptr, x_sb, x_sh, r_sb, r_sh, r_sw, B, H, W, strips,
    x_sw: tl.constexpr, out_sw: tl.constexpr, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DILATION: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, FLIP: tl.constexpr, STATISTICS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolution, bias and residual of one tile, FLIP with the kernel turned around, which gives the gradient.

    ``taps`` is float32 ``[KH * KW, C]``. Programs that read the same rows are neighbours. STATISTICS does not keep the
    result but its sums and those of its squares, ``out [programs, 2, C]`` in float32.
    """
    slices: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ragged: tl.constexpr = not (WHOLE or FULL)
    program = tl.program_id(0) // slices
    c = (tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    strip, number = program % (strips * DILATION), program // (strips * DILATION)
    image, column, inside = _pixels(number, tl.arange(0, BLOCK_P), B, W, BLOCK_P)
    first, channels = _origin(strip, strips, ROWS, DILATION, WHOLE), c < C
    column, inside = column[:, None], inside[:, None]
    top, left = first - KH // 2 * DILATION, column - KW // 2 * DILATION
    x_ptr += image[:, None] * x_sb + tl.cast(top, tl.int64) * x_sh + left * x_sw + c
    # an index of two axes, so that neighbouring channels of a tap are loaded together where they are needed
    tap_ptr = taps_ptr + ((KH * KW - 1) * C if FLIP else 0) + c + tl.zeros([BLOCK_P, 1], tl.int32)
    start, acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), ()
    if BIAS:
        start += tl.load(bias_ptr + c, mask=channels, other=0.0).to(tl.float32)
    for _ in tl.static_range(ROWS):
        acc = acc + (start,)
    for _ in range(KW):
        there, taps = inside & (left >= 0) & (left < W), ()
        if C % BLOCK_C != 0:
            there = there & channels
        for dy in tl.static_range(KH):
            taps = taps + (_load(tap_ptr + (-dy if FLIP else dy) * KW * C, channels, C, BLOCK_C),)
        for i in tl.static_range(ROWS + KH - 1):
            if not WHOLE or (i >= KH // 2 and i < ROWS + KH // 2):
                mask = _there(there, top + i * DILATION, H, i < KH // 2, ragged or i >= ROWS + KH // 2)
                x = _float32(tl.load(_row(x_ptr, i * DILATION, x_sh, STEP), mask=mask, other=0.0))
                for dy in tl.static_range(KH):
                    if i >= dy and i - dy < ROWS:
                        acc = acc[: i - dy] + (acc[i - dy] + x * taps[dy],) + acc[i - dy + 1 :]
        left += DILATION
        x_ptr += DILATION * x_sw
        tap_ptr += -C if FLIP else C
    if STATISTICS:
        total, square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for r in tl.static_range(ROWS):
            value = tl.where(_there(inside & channels, first + r * DILATION, H, False, ragged), acc[r], 0.0)
            total += value
            square += value * value
        out_ptr += program * 2 * C + tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
        here = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C) < C
        tl.store(out_ptr, tl.sum(total, 0), mask=here)
        tl.store(out_ptr + C, tl.sum(square, 0), mask=here)
    for r in tl.static_range(0 if STATISTICS else ROWS):
        y, out = first + r * DILATION, acc[r]
        mask = _there(inside & channels, y, H, False, ragged)
        if RESIDUAL:
            where = image[:, None] * r_sb + tl.cast(y, tl.int64) * r_sh + column * r_sw + c
            out += _float32(tl.load(residual_ptr + where, mask=mask, other=0.0))
        where = ((image * H + y) * W)[:, None] + column
        tl.store(out_ptr + where * out_sw + c, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def large_weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr, x_sb, x_sh, g_sb, g_sh, g_sw, B, H, W, strips, across, share,
    x_sw: tl.constexpr, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr,
    STEP: tl.constexpr, G_STEP: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias over ``share`` of the ``across`` tiles side by side of one strip.

    A program has ``BLOCK_D`` times ``COLUMNS`` columns of the kernel for its pixels, the latter in one thread. Every
    one of its ``BLOCK_P`` pixels of a tile has sums of its own: ``partial [programs * BLOCK_P, KH * KW + 1, C]``.
    """
    slices: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    ragged: tl.constexpr = not (WHOLE or FULL)
    blocks: tl.constexpr = (KW + BLOCK_D * COLUMNS - 1) // (BLOCK_D * COLUMNS)
    program = tl.program_id(0) // (slices * blocks)
    c = (tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    lane = tl.arange(0, BLOCK_D * BLOCK_P)
    dx = ((tl.program_id(0) // slices % blocks * BLOCK_D + lane // BLOCK_P) * COLUMNS)[:, None]
    first = _origin(program % (strips * DILATION), strips, ROWS, DILATION, WHOLE)
    start = program // (strips * DILATION) * share
    top, shift = first - KH // 2 * DILATION, (dx - KW // 2) * DILATION
    g_ptr = grad_ptr + tl.cast(first, tl.int64) * g_sh + c
    x_ptr += tl.cast(top, tl.int64) * x_sh + shift * x_sw + c
    sums, bias = (), tl.zeros([BLOCK_D * BLOCK_P, BLOCK_C], tl.float32)
    for _ in tl.static_range(KH * COLUMNS):
        sums = sums + (bias,)
    for number in range(start, tl.minimum(across, start + share)):
        image, column, inside = _pixels(number, lane % BLOCK_P, B, W, BLOCK_P)
        image, column, grads = image[:, None], column[:, None], ()
        inside = inside[:, None]
        if C % BLOCK_C != 0:
            inside = inside & (c < C)
        g_tile, x_tile = g_ptr + (image * g_sb + column * g_sw), x_ptr + (image * x_sb + column * x_sw)
        for r in tl.static_range(ROWS):
            mask = _there(inside, first + r * DILATION, H, False, ragged)
            grads = grads + (_float32(tl.load(_row(g_tile, r * DILATION, g_sh, G_STEP), mask=mask, other=0.0)),)
            if BIAS:
                bias += grads[r]
        for j in tl.static_range(COLUMNS):
            where = column + (shift + j * DILATION)
            there = inside & (where >= 0) & (where < W)
            if KW % COLUMNS != 0:
                there = there & (dx + j < KW)
            for i in tl.static_range(ROWS + KH - 1):
                if not WHOLE or (i >= KH // 2 and i < ROWS + KH // 2):
                    mask = _there(there, top + i * DILATION, H, i < KH // 2, ragged or i >= ROWS + KH // 2)
                    row = _row(x_tile + j * DILATION * x_sw, i * DILATION, x_sh, STEP)
                    x = _float32(tl.load(row, mask=mask, other=0.0))
                    for dy in tl.static_range(KH):
                        if i >= dy and i - dy < ROWS:
                            total = sums[j * KH + dy] + x * grads[i - dy]
                            sums = sums[: j * KH + dy] + (total,) + sums[j * KH + dy + 1 :]
    row = (program * BLOCK_P + lane % BLOCK_P)[:, None].to(tl.int64) * (KH * KW + 1)
    for t in tl.static_range(KH * COLUMNS):
        tap, there = t % KH * KW + dx + t // KH, (c < C) & (dx + t // KH < KW)
        tl.store(partial_ptr + (row + tap) * C + c, sums[t], mask=there)
    if BIAS:
        tl.store(partial_ptr + (row + KH * KW) * C + c, bias, mask=(c < C) & (dx == 0))
