"""Triton kernels of depthwise convolution.

A program holds ``ROWS`` rows of ``BLOCK_P`` pixels of a map, ``BLOCK_C`` channels each. For every column of the kernel
it walks down the input rows once and uses each loaded value for all rows of the result that it reaches: an output of a
5 x 5 kernel costs 10 loads and conversions to float32 instead of 25, and the time goes to the multiply-adds. Pixels are
counted across the images of the batch, so that narrow maps fill a program.
"""

import triton
import triton.language as tl


@triton.jit
def arrange_kernel(weight_ptr, out_ptr, C, TAPS: tl.constexpr, FLIP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Weight ``[C, TAPS]`` as float32 ``[TAPS, C]``, so that neighbouring channels are loaded together."""
    tap, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = TAPS - 1 - tap if FLIP else tap
    weight = tl.load(weight_ptr + c * TAPS + source, mask=c < C, other=0.0)
    tl.store(out_ptr + tap * C + c, weight.to(tl.float32), mask=c < C)


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, x_sb, x_sh, x_sw, r_sb, r_sh, r_sw, B, H, W, C, strips, slices,
    KH: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Convolution, bias and residual of one tile. Programs that read the same rows are neighbours."""
    tile, c = tl.program_id(0) // slices, tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    first, pixel = (tile % strips) * ROWS, tile // strips * BLOCK_P + tl.arange(0, BLOCK_P)
    image, column = (pixel // W).to(tl.int64), pixel % W
    inside, channels = pixel < B * W, (c < C)[None, :]
    x_ptr += (image * x_sb + column * x_sw)[:, None] + c[None, :]
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    for dx in tl.static_range(KW):
        there = inside & (column + (dx - KW // 2) >= 0) & (column + (dx - KW // 2) < W)
        taps = ()
        for dy in tl.static_range(KH):
            taps = taps + (tl.load(weight_ptr + (dy * KW + dx) * C + c, mask=c < C, other=0.0)[None, :],)
        for i in tl.static_range(ROWS + KH - 1):
            y = first + i - KH // 2
            mask = (there & (y >= 0) & (y < H))[:, None] & channels
            x = tl.load(x_ptr + (y.to(tl.int64) * x_sh + (dx - KW // 2) * x_sw), mask=mask, other=0.0).to(tl.float32)
            for dy in tl.static_range(KH):
                if i >= dy and i - dy < ROWS:
                    acc = acc[: i - dy] + (acc[i - dy] + x * taps[dy],) + acc[i - dy + 1 :]
    if BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for r in tl.static_range(ROWS):
        y = first + r
        mask, out = (inside & (y < H))[:, None] & channels, acc[r]
        if BIAS:
            out += bias
        if RESIDUAL:
            where = image * r_sb + y.to(tl.int64) * r_sh + column * r_sw
            out += tl.load(residual_ptr + where[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        where = (image * H + y) * W + column
        tl.store(out_ptr + where[:, None] * C + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    x_ptr, grad_ptr, partial_ptr, x_sb, x_sh, x_sw, g_sb, g_sh, g_sw, B, H, W, C, strips, slices, tiles,
    KH: tl.constexpr, KW: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias over every so many-th tile, as ``partial [programs, KH * KW + 1, C]``."""
    program, c = tl.program_id(0) // slices, tl.program_id(0) % slices * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = (c < C)[None, :]
    sums = ()
    for _ in tl.static_range(KH * KW + 1):
        sums = sums + (tl.zeros([BLOCK_P, BLOCK_C], tl.float32),)
    for tile in range(program, tiles, tl.num_programs(0) // slices):
        first, pixel = (tile % strips) * ROWS, tile // strips * BLOCK_P + tl.arange(0, BLOCK_P)
        image, column = (pixel // W).to(tl.int64), pixel % W
        inside = pixel < B * W
        x_tile = x_ptr + (image * x_sb + column * x_sw)[:, None] + c[None, :]
        g_tile = grad_ptr + (image * g_sb + column * g_sw)[:, None] + c[None, :]
        grads = ()
        for r in tl.static_range(ROWS):
            y = first + r
            mask = (inside & (y < H))[:, None] & channels
            grad = tl.load(g_tile + y.to(tl.int64) * g_sh, mask=mask, other=0.0).to(tl.float32)
            grads = grads + (grad,)
            sums = sums[: KH * KW] + (sums[KH * KW] + grad,)
        for dx in tl.static_range(KW):
            there = inside & (column + (dx - KW // 2) >= 0) & (column + (dx - KW // 2) < W)
            for i in tl.static_range(ROWS + KH - 1):
                y = first + i - KH // 2
                mask = (there & (y >= 0) & (y < H))[:, None] & channels
                where = y.to(tl.int64) * x_sh + (dx - KW // 2) * x_sw
                x = tl.load(x_tile + where, mask=mask, other=0.0).to(tl.float32)
                for dy in tl.static_range(KH):
                    if i >= dy and i - dy < ROWS:
                        total = sums[dy * KW + dx] + x * grads[i - dy]
                        sums = sums[: dy * KW + dx] + (total,) + sums[dy * KW + dx + 1 :]
    for t in tl.static_range(KH * KW + 1):
        where = (program * (KH * KW + 1) + t) * C + c
        tl.store(partial_ptr + where, tl.sum(sums[t], 0), mask=c < C)
