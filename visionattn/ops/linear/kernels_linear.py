"""Triton kernels around the matrix products of linear layers: casts, sums of columns, the gradient of GELU."""

import triton
import triton.language as tl


@triton.jit
def _copy(source_ptr, out_ptr, block, n, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def cast_kernel(
    a_ptr, b_ptr, c_ptr, d_ptr, out_ptr, a_n, b_n, c_n, d_n, b_start, c_start, d_start, BLOCK: tl.constexpr
):
    """Up to four flat tensors in the dtype of one buffer, each at its own place: a launch for all parameters."""
    block, which = tl.program_id(0), tl.program_id(1)
    if which == 0:
        _copy(a_ptr, out_ptr, block, a_n, BLOCK)
    elif which == 1:
        _copy(b_ptr, out_ptr + b_start, block, b_n, BLOCK)
    elif which == 2:
        _copy(c_ptr, out_ptr + c_start, block, c_n, BLOCK)
    else:
        _copy(d_ptr, out_ptr + d_start, block, d_n, BLOCK)


@triton.jit
def column_sum_kernel(
    x_ptr, partial_ptr, x_sn, N, width, first,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of every so many-th block of rows of ``x [N, C]``, as columns ``first ...`` of ``[programs, width]``."""
    program, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < C
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(program * ROWS, N, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & there[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_sn + c[None, :], mask=mask, other=0.0)
        total += x.to(tl.float32)
    tl.store(partial_ptr + program * width + first + c, tl.sum(total, 0), mask=there)


@triton.jit
def gelu_slope(x):
    """Derivative of ``x * Phi(x)``, which is ``Phi(x) + x * phi(x)``.

    ``Phi`` by formula 7.1.26 of Abramowitz and Stegun (error 7.5e-8, as good as float32 near 1): it needs the same
    exponential as the density ``phi``, so that the slope costs one exponential and one division.
    """
    density = tl.exp2(x * x * -0.7213475204444817)  # exp(-x^2 / 2)
    t = 1.0 / (1.0 + 0.2316418883 * tl.abs(x))
    tail = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * density
    return tl.where(x >= 0, 1.0 - tail, tail) + x * density * 0.3989422804014327


@triton.jit
def gelu_grad_kernel(
    pre_ptr, grad_ptr, out_ptr, partial_ptr, N, width, first,
    C: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``grad * gelu'(pre)`` of ``[N, C]``, and with PARTIAL its column sums as ``column_sum_kernel`` gives them.

    ``out`` may be ``grad`` itself.
    """
    program, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < C
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(program * ROWS, N, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < N)[:, None] & there[None, :]
        where = rows.to(tl.int64)[:, None] * C + c[None, :]
        x = tl.load(pre_ptr + where, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + where, mask=mask, other=0.0).to(tl.float32) * gelu_slope(x)
        tl.store(out_ptr + where, grad.to(out_ptr.dtype.element_ty), mask=mask)
        if PARTIAL:
            total += grad
    if PARTIAL:
        tl.store(partial_ptr + program * width + first + c, tl.sum(total, 0), mask=there)
