"""Triton kernels of depthwise convolution with large and dilated kernels.

A program holds ``ROWS`` rows of ``BLOCK_P`` pixels of a map, ``BLOCK_C`` channels each, two values to a thread. For one
column of the kernel after the other it walks down the input rows once and uses each loaded value for all rows of the
result that it reaches: with 28 rows an output of a 17 x 17 kernel costs 27 loads instead of 289. Columns are a loop at
run time, or the program would be too long for the compiler and the instruction cache.

With a dilation the rows of a program lie that far apart, so that they share input rows all the same.

Every kernel takes seconds to compile, so there are as few as can be: channels, bias, residual, direction and statistics
are arguments. What is known beforehand costs nothing, so for the first sizes of maps ``STEP`` reaches the rows by
constant offsets, and where ``WHOLE`` the program has all rows of the map, and input rows beyond the border are left out
of the code. Where ``FULL`` all rows of all tiles are on the map, so that only the rows around them may lie outside.

The compiler's own time goes with the square of the operations of a loop and with every index into a tuple, hence
``tl.fma`` (which the sums became anyway) and loops over just those rows that a value reaches.
"""

import triton
import triton.language as tl

from visionattn.ops.depthwise.kernels_depthwise import _float32, _load


@triton.jit
def _origin(strip, strips, dilation, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """First row of a tile: strips of rows that lie a dilation apart, for one remainder after the other."""
    if WHOLE:
        return 0
    else:
        return strip // strips + strip % strips * ROWS * dilation


@triton.jit
def _pixels(number, lane, B, W, BLOCK_P: tl.constexpr):
    """Image and column of a tile's pixels, counted across the images, and which of them there are."""
    pixel = number * BLOCK_P + lane
    return (pixel // W).to(tl.int64), pixel % W, pixel < B * W


@triton.jit
def _row(pointer, row, step, STEP: tl.constexpr):
    """``pointer`` moved by so many rows (or columns) of a tile, a constant."""
    if STEP:
        return pointer + row * STEP
    else:
        return pointer + row * step


@triton.jit
def _there(mask, y, H, ABOVE: tl.constexpr, BELOW: tl.constexpr):
    """``mask`` where the row ``y`` is one of the map, if it may lie above or below."""
    if ABOVE and BELOW:
        return mask & (tl.cast(y, tl.uint32) < H)  # negative ones become large
    elif ABOVE:
        return mask & (y >= 0)
    elif BELOW:
        return mask & (y < H)
    else:
        return mask


@triton.jit(do_not_specialize=["B", "H", "W", "strips", "biased", "added", "statistics"])
def large_kernel(
    x_ptr, taps_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, x_sb, x_sh, x_sw, r_sb, r_sh, r_sw, out_sw,
    tap_first, tap_step, B, H, W, C, strips, dilation, biased, added, statistics,
    KH: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolution, bias and residual of one tile.

    ``taps`` is float32 ``[KH * KW, C]``; they lie ``tap_step`` apart from ``tap_first`` on, which turns the kernel
    around for the gradient. The first ``biased`` channels have a bias and the first ``added`` rows a residual: all or
    none. Programs that read the same rows are neighbours. ``statistics`` does not keep the result but its sums and
    those of its squares, ``sums [programs, 2, C]`` in float32. ``EVEN`` slices have all their channels.
    """
    slices = tl.cdiv(C, BLOCK_C)
    ragged: tl.constexpr = not (WHOLE or FULL)
    program = tl.program_id(0) // slices
    c = (tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    strip, number = program % (strips * dilation), program // (strips * dilation)
    image, column, inside = _pixels(number, tl.arange(0, BLOCK_P), B, W, BLOCK_P)
    first, channels = _origin(strip, strips, dilation, ROWS, WHOLE), c < C
    column, inside = column[:, None], inside[:, None]
    top, left, step = first - KH // 2 * dilation, column - KW // 2 * dilation, tl.cast(x_sh, tl.int64) * dilation
    x_ptr += image[:, None] * x_sb + tl.cast(top, tl.int64) * x_sh + left * x_sw + c
    # an index of two axes, so that neighbouring channels of a tap are loaded together where they are needed
    tap_ptr, acc = taps_ptr + tap_first + c + tl.zeros([BLOCK_P, 1], tl.int32), ()
    start = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start += tl.load(bias_ptr + c, mask=c < biased, other=0.0).to(tl.float32)
    for _ in tl.static_range(ROWS):
        acc = acc + (start,)
    for _ in range(KW):
        there, taps = inside & (left >= 0) & (left < W), ()
        if not EVEN:
            there = there & channels
        for dy in tl.static_range(KH):
            taps = taps + (_load(tap_ptr + dy * KW * tap_step, channels, EVEN),)
        for i in tl.static_range(ROWS + KH - 1):
            if not WHOLE or (i >= KH // 2 and i < ROWS + KH // 2):
                mask = _there(there, top + i * dilation, H, i < KH // 2, ragged or i >= ROWS + KH // 2)
                x = _float32(tl.load(_row(x_ptr, i, step, STEP), mask=mask, other=0.0))
                reached = ()
                for r in tl.static_range(i - KH + 1 if i >= KH else 0, i + 1 if i < ROWS else ROWS):
                    reached = reached + (tl.fma(x, taps[i - r], acc[r]),)
                acc = acc[: i - KH + 1 if i >= KH else 0] + reached + acc[i + 1 if i < ROWS else ROWS :]
        left += dilation
        x_ptr += dilation * x_sw
        tap_ptr += tap_step
    if statistics:
        total, square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for r in tl.static_range(ROWS):
            value = tl.where(_there(inside & channels, first + r * dilation, H, False, ragged), acc[r], 0.0)
            total += value
            square = tl.fma(value, value, square)
        flat = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
        to_ptr = sums_ptr + program * 2 * C + flat
        tl.store(to_ptr, tl.sum(total, 0), mask=flat < C)
        tl.store(to_ptr + C, tl.sum(square, 0), mask=flat < C)
    else:
        r_tile = residual_ptr + image[:, None] * r_sb + column * r_sw + c
        out_tile = out_ptr + (image[:, None] * H * W + column) * out_sw + c
        for r in tl.static_range(ROWS):
            y = first + r * dilation
            mask = _there(inside & channels, y, H, False, ragged)
            other = tl.load(r_tile + tl.cast(y, tl.int64) * r_sh, mask=mask & (y < added), other=0.0)
            out = acc[r] + _float32(other)
            where = out_tile + tl.cast(y * W, tl.int64) * out_sw
            tl.store(where, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "H", "W", "strips", "across", "share"])
def large_weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr, x_sb, x_sh, x_sw, g_sb, g_sh, g_sw, B, H, W, C, strips, dilation, across, share,
    KH: tl.constexpr, KW: tl.constexpr, STEP: tl.constexpr, G_STEP: tl.constexpr, X_STEP: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias over ``share`` of the ``across`` tiles side by side of one strip.

    A program has ``BLOCK_D`` times ``COLUMNS`` columns of the kernel for its pixels, the latter in one thread. Every
    one of its ``BLOCK_P`` pixels of a tile has sums of its own: ``partial [programs * BLOCK_P, KH * KW + 1, C]``.
    """
    slices = tl.cdiv(C, BLOCK_C)
    ragged: tl.constexpr = not (WHOLE or FULL)
    blocks: tl.constexpr = (KW + BLOCK_D * COLUMNS - 1) // (BLOCK_D * COLUMNS)
    program = tl.program_id(0) // (slices * blocks)
    c = (tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    lane = tl.arange(0, BLOCK_D * BLOCK_P)
    dx = ((tl.program_id(0) // slices % blocks * BLOCK_D + lane // BLOCK_P) * COLUMNS)[:, None]
    first = _origin(program % (strips * dilation), strips, dilation, ROWS, WHOLE)
    start = program // (strips * dilation) * share
    top, shift = first - KH // 2 * dilation, (dx - KW // 2) * dilation
    step, g_step = tl.cast(x_sh, tl.int64) * dilation, tl.cast(g_sh, tl.int64) * dilation
    g_ptr = grad_ptr + tl.cast(first, tl.int64) * g_sh + c
    x_ptr += tl.cast(top, tl.int64) * x_sh + shift * x_sw + c
    sums, bias = (), tl.zeros([BLOCK_D * BLOCK_P, BLOCK_C], tl.float32)
    for _ in tl.static_range(KH * COLUMNS):
        sums = sums + (bias,)
    for number in range(start, tl.minimum(across, start + share)):
        image, column, inside = _pixels(number, lane % BLOCK_P, B, W, BLOCK_P)
        image, column, grads, new = image[:, None], column[:, None], (), ()
        inside = inside[:, None]
        if not EVEN:
            inside = inside & (c < C)
        g_tile, x_tile = g_ptr + (image * g_sb + column * g_sw), x_ptr + (image * x_sb + column * x_sw)
        for r in tl.static_range(ROWS):
            mask = _there(inside, first + r * dilation, H, False, ragged)
            grads = grads + (_float32(tl.load(_row(g_tile, r, g_step, G_STEP), mask=mask, other=0.0)),)
            if BIAS:
                bias += grads[r]
        for j in tl.static_range(COLUMNS):
            x_column = _row(x_tile, j, tl.cast(x_sw, tl.int64) * dilation, X_STEP)
            where, of_column = column + (shift + j * dilation), sums[j * KH : j * KH + KH]
            there = inside & (where >= 0) & (where < W)
            if KW % COLUMNS != 0:
                there = there & (dx + j < KW)
            for i in tl.static_range(ROWS + KH - 1):
                if not WHOLE or (i >= KH // 2 and i < ROWS + KH // 2):
                    mask = _there(there, top + i * dilation, H, i < KH // 2, ragged or i >= ROWS + KH // 2)
                    x, reached = _float32(tl.load(_row(x_column, i, step, STEP), mask=mask, other=0.0)), ()
                    for dy in tl.static_range(i - ROWS + 1 if i >= ROWS else 0, i + 1 if i < KH else KH):
                        reached = reached + (tl.fma(x, grads[i - dy], of_column[dy]),)
                    before = of_column[: i - ROWS + 1 if i >= ROWS else 0]
                    of_column = before + reached + of_column[i + 1 if i < KH else KH :]
            new = new + of_column
        sums = new
    row = (program * BLOCK_P + lane % BLOCK_P)[:, None].to(tl.int64) * (KH * KW + 1)
    for t in tl.static_range(KH * COLUMNS):
        tap, there = t % KH * KW + dx + t // KH, (c < C) & (dx + t // KH < KW)
        tl.store(partial_ptr + (row + tap) * C + c, sums[t], mask=there)
    if BIAS:
        tl.store(partial_ptr + (row + KH * KW) * C + c, bias, mask=(c < C) & (dx == 0))
