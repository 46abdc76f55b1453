"""The second step of a sum over all pixels: adding up what the programs of the first step found."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["programs", "taps", "biased"])
def sum_kernel(
    partial_ptr, weight_ptr, bias_ptr, programs, C, taps, biased, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum of ``partial [programs, taps + 1, C]`` over the programs, in an order that is always the same.

    The first ``taps`` rows are the gradient of a weight ``[C, taps]``, the last one is that of a bias ``[C]``, where
    it is ``biased``.
    """
    tap, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < programs)[:, None] & (c < C)[None, :]
        total += tl.load(partial_ptr + (n * (taps + 1) + tap)[:, None] * C + c[None, :], mask=mask, other=0.0)
    result = tl.sum(total, 0)
    if tap < taps:
        tl.store(weight_ptr + c * taps + tap, result.to(weight_ptr.dtype.element_ty), mask=c < C)
    elif biased:
        tl.store(bias_ptr + c, result.to(bias_ptr.dtype.element_ty), mask=c < C)
