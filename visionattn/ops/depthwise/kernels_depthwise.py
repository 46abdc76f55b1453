"""Triton kernels of depthwise convolution.

A program holds ``ROWS`` rows of ``BLOCK_P`` pixels of a map, ``BLOCK_C`` channels each. For every column of the kernel
it walks down the input rows once and uses each loaded value for all rows of the result that it reaches: an output of a
5 x 5 kernel costs 10 loads and conversions to float32 instead of 25, and the time goes to the multiply-adds. Pixels are
counted across the images of the batch, so that narrow maps fill a program.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["taps"])
def arrange_kernel(weight_ptr, out_ptr, C, taps, BLOCK_C: tl.constexpr):
    """Weight ``[C, taps]`` as float32 ``[taps, C]``, so that neighbouring channels are loaded together."""
    tap, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c * taps + tap, mask=c < C, other=0.0)
    tl.store(out_ptr + tap * C + c, weight.to(tl.float32), mask=c < C)


@triton.jit
def _load(pointer, there, EVEN: tl.constexpr):
    """Values of some channels in float32, without a mask where all of them are there."""
    if EVEN:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _whole(pixels, channels, EVEN: tl.constexpr):
    """The mask of a tile from those of its pixels and of its channels ``[1, BLOCK_C]``, where not all of them exist."""
    if EVEN:
        return pixels[:, None]
    else:
        return pixels[:, None] & channels


@triton.jit
def _float32(x):
    """``x`` in float32: of two packed bfloat16 one is shifted and one masked, half of what the compiler makes of it."""
    if x.dtype == tl.bfloat16:
        both: tl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        return tl.inline_asm_elementwise(both, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def _tile(number, B, W, strips, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """First row of a tile, image and column of its pixels, and which of them there are."""
    pixel = number // strips * BLOCK_P + tl.arange(0, BLOCK_P)
    return (number % strips) * ROWS, (pixel // W).to(tl.int64), pixel % W, pixel < B * W


@triton.jit(do_not_specialize=["B", "H", "W", "strips", "biased", "added"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, x_sb, x_sh, x_sw, r_sb, r_sh, r_sw, out_sw,
    tap_first, tap_step, B, H, W, C, strips, biased, added, KH: tl.constexpr, KW: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolution, bias and residual of one tile.

    The taps lie ``tap_step`` apart from ``tap_first`` on, which turns the kernel around for the gradient. The first
    ``biased`` channels have a bias and the first ``added`` rows a residual: all or none. Programs that read the same
    rows are neighbours. ``EVEN`` slices have all their channels.
    """
    slices = tl.cdiv(C, BLOCK_C)
    c = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    first, image, column, inside = _tile(tl.program_id(0) // slices, B, W, strips, ROWS, BLOCK_P)
    channels = (c < C)[None, :]
    x_ptr += (image * x_sb + (column - KW // 2) * x_sw)[:, None] + c[None, :]
    x_rows, x_there, acc = (), (), ()
    for i in tl.static_range(ROWS + KH - 1):
        y = first + i - KH // 2
        x_rows, x_there = x_rows + (x_ptr + y.to(tl.int64) * x_sh,), x_there + ((y >= 0) & (y < H),)
    start = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    start += tl.load(bias_ptr + c, mask=c < biased, other=0.0).to(tl.float32)[None, :]
    for _ in tl.static_range(ROWS):
        acc = acc + (start,)
    for dx in tl.static_range(KW):
        there, taps = inside & (column + (dx - KW // 2) >= 0) & (column + (dx - KW // 2) < W), ()
        for dy in tl.static_range(KH):
            taps = taps + (_load(weight_ptr + tap_first + (dy * KW + dx) * tap_step + c, c < C, EVEN)[None, :],)
        for i in tl.static_range(ROWS + KH - 1):
            mask, reached = _whole(there & x_there[i], channels, EVEN), ()
            x = _float32(tl.load(x_rows[i] + dx * x_sw, mask=mask, other=0.0))
            for r in tl.static_range(i - KH + 1 if i >= KH else 0, i + 1 if i < ROWS else ROWS):
                reached = reached + (tl.fma(x, taps[i - r], acc[r]),)
            acc = acc[: i - KH + 1 if i >= KH else 0] + reached + acc[i + 1 if i < ROWS else ROWS :]
    for r in tl.static_range(ROWS):
        y = first + r
        mask = _whole(inside & (y < H), channels, EVEN)
        where = (image * r_sb + y.to(tl.int64) * r_sh + column * r_sw)[:, None] + c[None, :]
        out = acc[r] + _float32(tl.load(residual_ptr + where, mask=mask & (y < added), other=0.0))
        where = (image * H + y) * W + column
        tl.store(out_ptr + where[:, None] * out_sw + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "H", "W", "strips", "tiles"])
def weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr, x_sb, x_sh, x_sw, g_sb, g_sh, g_sw, B, H, W, C, strips, tiles,
    KH: tl.constexpr, KW: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias over every so many-th tile, as ``partial [programs, KH * KW + 1, C]``."""
    slices = tl.cdiv(C, BLOCK_C)
    program, c = tl.program_id(0) // slices, tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    channels, sums, bias = (c < C)[None, :], (), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for _ in tl.static_range(KH * KW):
        sums = sums + (bias,)
    for tile in range(program, tiles, tl.num_programs(0) // slices):
        first, image, column, inside = _tile(tile, B, W, strips, ROWS, BLOCK_P)
        x_tile = x_ptr + (image * x_sb + (column - KW // 2) * x_sw)[:, None] + c[None, :]
        g_tile = grad_ptr + (image * g_sb + column * g_sw)[:, None] + c[None, :]
        grads, new = (), ()
        for r in tl.static_range(ROWS):
            mask = _whole(inside & (first + r < H), channels, EVEN)
            grads = grads + (_float32(tl.load(g_tile + (first + r).to(tl.int64) * g_sh, mask=mask, other=0.0)),)
            bias += grads[r]
        x_rows, x_there = (), ()
        for i in tl.static_range(ROWS + KH - 1):
            y = first + i - KH // 2
            x_rows, x_there = x_rows + (x_tile + y.to(tl.int64) * x_sh,), x_there + ((y >= 0) & (y < H),)
        for dx in tl.static_range(KW):
            there = inside & (column + (dx - KW // 2) >= 0) & (column + (dx - KW // 2) < W)
            of_column = sums[dx * KH : dx * KH + KH]
            for i in tl.static_range(ROWS + KH - 1):
                mask, reached = _whole(there & x_there[i], channels, EVEN), ()
                x = _float32(tl.load(x_rows[i] + dx * x_sw, mask=mask, other=0.0))
                for dy in tl.static_range(i - ROWS + 1 if i >= ROWS else 0, i + 1 if i < KH else KH):
                    reached = reached + (tl.fma(x, grads[i - dy], of_column[dy]),)
                before = of_column[: i - ROWS + 1 if i >= ROWS else 0]
                of_column = before + reached + of_column[i + 1 if i < KH else KH :]
            new = new + of_column
        sums = new
    row = program * (KH * KW + 1)
    for t in tl.static_range(KH * KW):
        tl.store(partial_ptr + (row + t % KH * KW + t // KH) * C + c, tl.sum(sums[t], 0), mask=c < C)
    tl.store(partial_ptr + (row + KH * KW) * C + c, tl.sum(bias, 0), mask=c < C)
