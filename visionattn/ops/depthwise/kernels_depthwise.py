"""Triton kernels of depthwise convolution.

A program holds ``ROWS`` rows of ``BLOCK_P`` pixels of a map, ``BLOCK_C`` channels each. For every column of the kernel
it walks down the input rows once and uses each loaded value for all rows of the result that it reaches: an output of a
5 x 5 kernel costs 10 loads and conversions to float32 instead of 25, and the time goes to the multiply-adds. Pixels are
counted across the images of the batch, so that narrow maps fill a program.
"""

import triton
import triton.language as tl


@triton.jit
def arrange_kernel(weight_ptr, out_ptr, C, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Weight ``[C, TAPS]`` as float32 ``[TAPS, C]``, so that neighbouring channels are loaded together."""
    tap, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c * TAPS + tap, mask=c < C, other=0.0)
    tl.store(out_ptr + tap * C + c, weight.to(tl.float32), mask=c < C)


@triton.jit
def _load(pointer, there, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Values of ``BLOCK_C`` channels in float32, without a mask where all of them are there."""
    if C % BLOCK_C == 0:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=there, other=0.0).to(tl.float32)


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


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, x_sb, x_sh, r_sb, r_sh, r_sw, B, H, W, strips,
    x_sw: tl.constexpr, out_sw: tl.constexpr, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, FLIP: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolution, bias and residual of one tile, FLIP with the kernel turned around, which gives the gradient.

    Programs that read the same rows are neighbours.
    """
    slices: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    first, image, column, inside = _tile(tl.program_id(0) // slices, B, W, strips, ROWS, BLOCK_P)
    channels = (c < C)[None, :]
    x_ptr += (image * x_sb + column * x_sw)[:, None] + c[None, :]
    x_rows, x_there, acc = (), (), ()
    for i in tl.static_range(ROWS + KH - 1):
        y = first + i - KH // 2
        x_rows, x_there = x_rows + (x_ptr + y.to(tl.int64) * x_sh,), x_there + ((y >= 0) & (y < H),)
    start = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    if BIAS:
        start += _load(bias_ptr + c, c < C, C, BLOCK_C)[None, :]
    for _ in tl.static_range(ROWS):
        acc = acc + (start,)
    for dx in tl.static_range(KW):
        there, taps = inside & (column + (dx - KW // 2) >= 0) & (column + (dx - KW // 2) < W), ()
        for dy in tl.static_range(KH):
            tap_ptr = weight_ptr + (KH * KW - 1 - dy * KW - dx if FLIP else dy * KW + dx) * C
            taps = taps + (_load(tap_ptr + c, c < C, C, BLOCK_C)[None, :],)
        for i in tl.static_range(ROWS + KH - 1):
            mask = (there & x_there[i])[:, None] & channels
            x = _float32(tl.load(x_rows[i] + (dx - KW // 2) * x_sw, mask=mask, other=0.0))
            for dy in tl.static_range(KH):
                if i >= dy and i - dy < ROWS:
                    acc = acc[: i - dy] + (acc[i - dy] + x * taps[dy],) + acc[i - dy + 1 :]
    for r in tl.static_range(ROWS):
        y, out = first + r, acc[r]
        mask = (inside & (y < H))[:, None] & channels
        if RESIDUAL:
            where = image * r_sb + y.to(tl.int64) * r_sh + column * r_sw
            out += _float32(tl.load(residual_ptr + where[:, None] + c[None, :], mask=mask, other=0.0))
        where = (image * H + y) * W + column
        tl.store(out_ptr + where[:, None] * out_sw + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr, x_sb, x_sh, g_sb, g_sh, g_sw, B, H, W, strips, tiles,
    x_sw: tl.constexpr, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias over every so many-th tile, as ``partial [programs, KH * KW + 1, C]``."""
    slices: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, c = tl.program_id(0) // slices, tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    channels, sums = (c < C)[None, :], ()
    for _ in tl.static_range(KH * KW + 1):
        sums = sums + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    for tile in range(program, tiles, tl.num_programs(0) // slices):
        first, image, column, inside = _tile(tile, B, W, strips, ROWS, BLOCK_P)
        x_tile = x_ptr + (image * x_sb + column * x_sw)[:, None] + c[None, :]
        g_tile = grad_ptr + (image * g_sb + column * g_sw)[:, None] + c[None, :]
        grads = ()
        for r in tl.static_range(ROWS):
            mask = (inside & (first + r < H))[:, None] & channels
            grads = grads + (_float32(tl.load(g_tile + (first + r).to(tl.int64) * g_sh, mask=mask, other=0.0)),)
            sums = sums[: KH * KW] + (sums[KH * KW] + grads[r],)
        x_rows, x_there = (), ()
        for i in tl.static_range(ROWS + KH - 1):
            y = first + i - KH // 2
            x_rows, x_there = x_rows + (x_tile + y.to(tl.int64) * x_sh,), x_there + ((y >= 0) & (y < H),)
        for dx in tl.static_range(KW):
            there = inside & (column + (dx - KW // 2) >= 0) & (column + (dx - KW // 2) < W)
            for i in tl.static_range(ROWS + KH - 1):
                mask = (there & x_there[i])[:, None] & channels
                x = _float32(tl.load(x_rows[i] + (dx - KW // 2) * x_sw, mask=mask, other=0.0))
                for dy in tl.static_range(KH):
                    if i >= dy and i - dy < ROWS:
                        total = sums[dy * KW + dx] + x * grads[i - dy]
                        sums = sums[: dy * KW + dx] + (total,) + sums[dy * KW + dx + 1 :]
    for t in tl.static_range(KH * KW + 1):
        where = (program * (KH * KW + 1) + t) * C + c
        tl.store(partial_ptr + where, tl.sum(sums[t], 0), mask=c < C)
