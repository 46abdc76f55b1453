"""Triton kernels of layer norm: a program takes several rows, each of them whole, so all sums stay in registers."""

import triton
import triton.language as tl


@triton.jit
def _normalized(x, mean, rstd, there):
    return tl.where(there[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def forward_kernel(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, stats_ptr, eps, x_sn, delta_sn, N,
    C: tl.constexpr, ADD: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm of ``ROWS`` rows of ``x``, or of ``x + delta``, which is then written too."""
    rows, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
    inside, there = rows < N, c < C
    mask, n = inside[:, None] & there[None, :], rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + n * x_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + n * delta_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + n * C + c[None, :], rounded, mask=mask)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + c, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where(there[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    out = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + n * C + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(stats_ptr + rows, mean, mask=inside)
        tl.store(stats_ptr + N + rows, rstd, mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, partial_ptr, grad_sn, grad_sum_sn, x_sn, N,
    C: tl.constexpr, ADD: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows, plus ``grad_sum`` that reaches them past the norm, and sums for weight and bias.

    A program takes every so many-th block of rows, and writes its sums to ``partial [programs, 2, C]``.
    """
    program, c = tl.program_id(0), tl.arange(0, BLOCK_C)
    there = c < C
    weight = tl.load(weight_ptr + c, mask=there, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([ROWS, BLOCK_C], tl.float32), tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(program * ROWS, N, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < N
        mask, n = inside[:, None] & there[None, :], rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + n * x_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + n * grad_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + rows, mask=inside, other=0.0)
        rstd = tl.load(stats_ptr + N + rows, mask=inside, other=0.0)
        x = _normalized(x, mean, rstd, there)
        if PARTIAL:
            dweight += grad * x
            dbias += grad
        grad *= weight[None, :]
        shift, tilt = tl.sum(grad, 1) / C, tl.sum(grad * x, 1) / C
        dx = (grad - shift[:, None] - x * tilt[:, None]) * rstd[:, None]
        if ADD:
            dx += tl.load(grad_sum_ptr + n * grad_sum_sn + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + n * C + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if PARTIAL:
        tl.store(partial_ptr + program * 2 * C + c, tl.sum(dweight, 0), mask=there)
        tl.store(partial_ptr + (program * 2 + 1) * C + c, tl.sum(dbias, 0), mask=there)
