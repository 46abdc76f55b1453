"""Triton kernels of sums of scaled maps: every value is read and written once."""

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, y_weight_ptr, y_bias_ptr, keep_ptr, out_ptr, gain,
    x_sn, y_sn, N, C, first, pixels,
    SCALED: tl.constexpr, DROPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows of ``x``, from column ``first`` on times weight plus bias plus those of ``y``.

    ``y`` is scaled too, or with DROPS multiplied by ``gain`` times the number in ``keep`` of the row's image.
    """
    rows, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, own, n = rows < N, (c >= first) & (c < C), rows.to(tl.int64)[:, None]
    mask = inside[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + n * x_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + n * y_sn + (c - first)[None, :], mask=inside[:, None] & own[None, :], other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c - first, mask=own, other=1.0).to(tl.float32)
    bias = tl.load(bias_ptr + c - first, mask=own, other=0.0).to(tl.float32)
    if SCALED:
        bias += tl.load(y_bias_ptr + c - first, mask=own, other=0.0).to(tl.float32)
        y *= tl.load(y_weight_ptr + c - first, mask=own, other=0.0).to(tl.float32)[None, :]
    if DROPS:
        y *= (tl.load(keep_ptr + rows // pixels, mask=inside, other=0.0).to(tl.float32) * gain)[:, None]
    out = x * weight[None, :] + bias[None, :] + y
    tl.store(out_ptr + n * C + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, y_ptr, weight_ptr, y_weight_ptr, keep_ptr, dx_ptr, dy_ptr, partial_ptr, gain,
    grad_sn, x_sn, y_sn, N, C, first, pixels,
    SCALED: tl.constexpr, DROPS: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of both maps, and with PARTIAL the sums for factors, offsets and, where it has them, those of ``y``.

    A program takes every so many-th block of rows; the sums are ``[programs, 2 or 3, C - first]``.
    """
    program, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there, own, width = c < C, (c >= first) & (c < C), C - first
    weight = tl.load(weight_ptr + c - first, mask=own, other=1.0).to(tl.float32)
    if SCALED:
        y_weight = tl.load(y_weight_ptr + c - first, mask=own, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([ROWS, BLOCK_C], tl.float32), tl.zeros([ROWS, BLOCK_C], tl.float32)
    dy_weight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(program * ROWS, N, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside, n = rows < N, rows.to(tl.int64)[:, None]
        mask, last = inside[:, None] & there[None, :], inside[:, None] & own[None, :]
        grad = tl.load(grad_ptr + n * grad_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + n * C + c[None, :], (grad * weight[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)
        dy = grad
        if SCALED:
            dy = grad * y_weight[None, :]
        if DROPS:
            dy = grad * (tl.load(keep_ptr + rows // pixels, mask=inside, other=0.0).to(tl.float32) * gain)[:, None]
        tl.store(dy_ptr + n * width + (c - first)[None, :], dy.to(dy_ptr.dtype.element_ty), mask=last)
        if PARTIAL:
            dweight += grad * tl.load(x_ptr + n * x_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
            dbias += grad
            if SCALED:
                y = tl.load(y_ptr + n * y_sn + (c - first)[None, :], mask=last, other=0.0)
                dy_weight += grad * y.to(tl.float32)
    if PARTIAL:
        partial_ptr += program * width * (3 if SCALED else 2) + c - first
        tl.store(partial_ptr, tl.sum(dweight, 0), mask=own)
        tl.store(partial_ptr + width, tl.sum(dbias, 0), mask=own)
        if SCALED:
            tl.store(partial_ptr + 2 * width, tl.sum(dy_weight, 0), mask=own)
