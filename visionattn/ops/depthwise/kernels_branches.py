"""Triton kernels between the convolutions of a sum of normalised ones: what is small, for all branches in one launch.

There are at most eight branches, and an argument for each of them, since their parameters lie apart. A program has some
channels of one branch, or of all.

``kept [taps + 3 * branches, C]`` is float32 and holds the weights of all branches, one branch after the other, one row
for a value of a kernel; behind them the mean, inverse deviation and factor of every branch.
"""

import triton
import triton.language as tl

_SIDES = [f"side_{i}" for i in range(8)]
_DILATIONS = [f"dilation_{i}" for i in range(8)]
_COUNTS = [f"programs_{i}" for i in range(8)]


@triton.jit
def _pick(which, a, b, c, d, e, f, g, h):
    """One of eight arguments of the same type."""
    if which == 1:
        a = b
    if which == 2:
        a = c
    if which == 3:
        a = d
    if which == 4:
        a = e
    if which == 5:
        a = f
    if which == 6:
        a = g
    if which == 7:
        a = h
    return a


@triton.jit
def _before(which, a, b, c, d, e, f, g):
    """Sum of the first ``which`` numbers."""
    early = tl.where(which > 0, a, 0) + tl.where(which > 1, b, 0) + tl.where(which > 2, c, 0)
    late = tl.where(which > 3, d, 0) + tl.where(which > 4, e, 0) + tl.where(which > 5, f, 0)
    return early + late + tl.where(which > 6, g, 0)


@triton.jit
def _taps_before(which, a, b, c, d, e, f, g):
    """Values of the first ``which`` kernels with these sides."""
    return _before(which, a * a, b * b, c * c, d * d, e * e, f * f, g * g)


@triton.jit(do_not_specialize=["pixels", "W", *_SIDES])
def pack_kernel(
    x_ptr, weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7, kept_ptr, rows_ptr,
    x_first, x_sb, x_sw, pixels, W, C, side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weights ``[C, taps]`` of one branch into ``kept``, and about the mean of its convolution, negative, into a row.

    That is the mean of ``pixels`` of ``x``, from ``x_first`` on in rows of ``W`` that lie ``x_sb`` apart, times the
    sum of the weights.
    """
    which, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = (c < C)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, pixels, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        at = x_first + (n // W).to(tl.int64) * x_sb + n % W * x_sw
        mask = (n < pixels)[:, None] & channels
        total += tl.load(x_ptr + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    side = _pick(which, side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7)
    weight_ptr = _pick(which, weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7)
    first = _taps_before(which, side_0, side_1, side_2, side_3, side_4, side_5, side_6)
    taps, sums = side * side, tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, taps, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < taps)[:, None] & channels
        weight = tl.load(weight_ptr + c[None, :] * taps + t[:, None], mask=mask, other=0.0).to(tl.float32)
        tl.store(kept_ptr + (first + t)[:, None] * C + c[None, :], weight, mask=mask)
        sums += weight
    tl.store(rows_ptr + which * C + c, tl.sum(total, 0) / pixels * -tl.sum(sums, 0), mask=c < C)


@triton.jit
def _toward(pointer, value, momentum, mask):
    """Move running statistics towards those of a batch."""
    running = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    running += momentum * (value - running)
    tl.store(pointer, running.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["taps", "count", *_COUNTS])
def fold_kernel(
    sums_ptr, rows_ptr, kept_ptr,
    scale_0, scale_1, scale_2, scale_3, scale_4, scale_5, scale_6, scale_7,
    shift_0, shift_1, shift_2, shift_3, shift_4, shift_5, shift_6, shift_7,
    mean_0, mean_1, mean_2, mean_3, mean_4, mean_5, mean_6, mean_7,
    variance_0, variance_1, variance_2, variance_3, variance_4, variance_5, variance_6, variance_7,
    steps_0, steps_1, steps_2, steps_3, steps_4, steps_5, steps_6, steps_7,
    eps, momentum, taps, C, count,
    programs_0, programs_1, programs_2, programs_3, programs_4, programs_5, programs_6, programs_7,
    BRANCHES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics of one branch from the ``sums [programs, 2, C]`` of all, one branch after the other.

    Mean, inverse deviation and factor go into ``kept``, what the branch adds to the bias of the merged convolution
    into a row behind those of ``pack_kernel``, and the running statistics move. The sums are those of ``count``
    values, to which the row of ``pack_kernel`` was added; float64 keeps the digits that subtracting loses.
    """
    which, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    programs = _pick(
        which, programs_0, programs_1, programs_2, programs_3, programs_4, programs_5, programs_6, programs_7
    )
    first = _before(which, programs_0, programs_1, programs_2, programs_3, programs_4, programs_5, programs_6)
    total, square = tl.zeros([BLOCK_N, BLOCK_C], tl.float64), tl.zeros([BLOCK_N, BLOCK_C], tl.float64)
    for start in range(0, programs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < programs)[:, None] & (c < C)[None, :]
        at = sums_ptr + (first + n)[:, None].to(tl.int64) * 2 * C + c[None, :]
        total += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        square += tl.load(at + C, mask=mask, other=0.0).to(tl.float64)
    number = count.to(tl.float64)
    offset, level = tl.sum(total, 0) / number, tl.load(rows_ptr + which * C + c, mask=c < C, other=0.0)
    variance = tl.sum(square, 0) / number - offset * offset
    variance = tl.where(variance > 0, variance, 0.0)
    mean, inverse = (offset - level).to(tl.float32), (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    scale_ptr = _pick(which, scale_0, scale_1, scale_2, scale_3, scale_4, scale_5, scale_6, scale_7)
    shift_ptr = _pick(which, shift_0, shift_1, shift_2, shift_3, shift_4, shift_5, shift_6, shift_7)
    factor = tl.load(scale_ptr + c, mask=c < C, other=0.0).to(tl.float32) * inverse
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(rows_ptr + (BRANCHES + which) * C + c, shift - mean * factor, mask=c < C)
    kept_ptr += (taps + which) * C + c
    tl.store(kept_ptr, mean, mask=c < C)
    tl.store(kept_ptr + BRANCHES * C, inverse, mask=c < C)
    tl.store(kept_ptr + 2 * BRANCHES * C, factor, mask=c < C)
    unbiased = (variance * (number / (number - 1))).to(tl.float32)
    mean_ptr = _pick(which, mean_0, mean_1, mean_2, mean_3, mean_4, mean_5, mean_6, mean_7)
    variance_ptr = _pick(
        which, variance_0, variance_1, variance_2, variance_3, variance_4, variance_5, variance_6, variance_7
    )
    steps_ptr = _pick(which, steps_0, steps_1, steps_2, steps_3, steps_4, steps_5, steps_6, steps_7)
    _toward(mean_ptr + c, mean, momentum, c < C)
    _toward(variance_ptr + c, unbiased, momentum, c < C)
    if tl.program_id(0) == 0:
        tl.store(steps_ptr, tl.load(steps_ptr) + 1)


@triton.jit(do_not_specialize=["taps", *_SIDES, *_DILATIONS])
def merge_kernel(
    kept_ptr, rows_ptr, merged_ptr, taps, C,
    side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7,
    dilation_0, dilation_1, dilation_2, dilation_3, dilation_4, dilation_5, dilation_6, dilation_7,
    BRANCHES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of the kernels, each times its factor, on the grid of the first one, and in a last row that of the biases."""
    t, c = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sides = (side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7)
    dilations = (dilation_0, dilation_1, dilation_2, dilation_3, dilation_4, dilation_5, dilation_6, dilation_7)
    row, column = t // side_0 - side_0 // 2, t % side_0 - side_0 // 2  # from the middle
    whole, channels = (t < side_0 * side_0)[:, None] & (c < C)[None, :], c < C
    out, bias, first = tl.zeros([BLOCK_T, BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), side_0 - side_0
    for i in tl.static_range(BRANCHES):
        y, x = row + sides[i] // 2 * dilations[i], column + sides[i] // 2 * dilations[i]
        on = (y >= 0) & (y < sides[i] * dilations[i]) & (y % dilations[i] == 0)
        on = on & (x >= 0) & (x < sides[i] * dilations[i]) & (x % dilations[i] == 0)
        at = first + y // dilations[i] * sides[i] + x // dilations[i]
        weight = tl.load(kept_ptr + at[:, None] * C + c[None, :], mask=whole & on[:, None], other=0.0)
        factor = tl.load(kept_ptr + (taps + 2 * BRANCHES + i) * C + c, mask=channels, other=0.0)
        out += weight * factor[None, :]
        bias += tl.load(rows_ptr + (BRANCHES + i) * C + c, mask=channels, other=0.0)
        first += sides[i] * sides[i]
    tl.store(merged_ptr + t[:, None] * C + c[None, :], out, mask=whole)
    if tl.program_id(0) == 0:
        tl.store(rows_ptr + 2 * BRANCHES * C + c, bias, mask=channels)


@triton.jit(do_not_specialize=["taps", "count", *_SIDES, *_DILATIONS])
def norm_grad_kernel(
    merged_ptr, kept_ptr, scaled_ptr, grads_ptr, taps, C, count,
    side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7,
    dilation_0, dilation_1, dilation_2, dilation_3, dilation_4, dilation_5, dilation_6, dilation_7,
    BRANCHES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of one branch's norm, and what the branch's own two convolutions in the backward pass take.

    ``merged [side * side + 1, C]`` is the gradient of the merged kernel and bias, ``grads [2 * branches, C]`` those of
    the factors, then those of the offsets. ``scaled [2 * taps + branches, C]`` gets the weights of all branches times
    their part in the gradient of the convolution, the weights times their factor, and the shift of that gradient.
    """
    which, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    side = _pick(which, side_0, side_1, side_2, side_3, side_4, side_5, side_6, side_7)
    dilation = _pick(
        which, dilation_0, dilation_1, dilation_2, dilation_3, dilation_4, dilation_5, dilation_6, dilation_7
    )
    first = _taps_before(which, side_0, side_1, side_2, side_3, side_4, side_5, side_6)
    margin, values, channels = side_0 // 2 - side // 2 * dilation, side * side, (c < C)[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for start in range(0, values, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < values)[:, None] & channels
        at = (margin + t // side * dilation) * side_0 + margin + t % side * dilation
        grad = tl.load(merged_ptr + at[:, None] * C + c[None, :], mask=mask, other=0.0)
        sums += grad * tl.load(kept_ptr + (first + t)[:, None] * C + c[None, :], mask=mask, other=0.0)
    total = tl.load(merged_ptr + side_0 * side_0 * C + c, mask=c < C, other=0.0)
    row_ptr = kept_ptr + (taps + which) * C + c
    mean = tl.load(row_ptr, mask=c < C, other=0.0)
    inverse = tl.load(row_ptr + BRANCHES * C, mask=c < C, other=0.0)
    factor = tl.load(row_ptr + 2 * BRANCHES * C, mask=c < C, other=0.0)
    dscale = inverse * (tl.sum(sums, 0) - mean * total)  # sum of the gradient times the normalised result
    multiple = dscale * inverse / -count
    grads_ptr += which * C + c
    tl.store(grads_ptr, dscale.to(grads_ptr.dtype.element_ty), mask=c < C)
    tl.store(grads_ptr + BRANCHES * C, total.to(grads_ptr.dtype.element_ty), mask=c < C)
    tl.store(scaled_ptr + (2 * taps + which) * C + c, -total / count - multiple * mean, mask=c < C)
    for start in range(0, values, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask = (t < values)[:, None] & channels
        at = (first + t)[:, None] * C + c[None, :]
        weight = tl.load(kept_ptr + at, mask=mask, other=0.0)
        tl.store(scaled_ptr + at, weight * multiple[None, :], mask=mask)
        tl.store(scaled_ptr + taps * C + at, weight * factor[None, :], mask=mask)


@triton.jit(do_not_specialize=["programs", "taps"])
def weight_sum_kernel(
    partial_ptr, kept_ptr, weight_ptr, programs, C, taps, first, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum of ``partial [programs, taps + 1, C]`` over the programs, always in the same order, times a factor.

    That gives the gradient of a weight ``[C, taps]``; the factors ``[C]`` begin at ``first`` of ``kept``.
    """
    tap, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < programs)[:, None] & (c < C)[None, :]
        total += tl.load(partial_ptr + (n * (taps + 1) + tap)[:, None] * C + c[None, :], mask=mask, other=0.0)
    grad = tl.sum(total, 0) * tl.load(kept_ptr + first + c, mask=c < C, other=0.0)
    tl.store(weight_ptr + c * taps + tap, grad.to(weight_ptr.dtype.element_ty), mask=c < C)
