"""Launching the Triton kernels around linear layers."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, fold_plan, slice_width
from visionattn.ops.linear import kernels_linear

TILE = 4096  # values that a program sums at once
GELU_TILE = 2048  # and of which it finds the gradient
PROGRAMS = 792  # of a sum at most, all slices of the widest layer together: six for each of 132 processors
CAST_BLOCK = 2048
TOGETHER = 2  # fewest parameters that are cast by one launch
APART = 128  # cast tensors start at multiples of so many values, or matrix products would take slower kernels

_casts, _plans = Plans(), Plans()


class _Cast:
    """One launch for several parameters, or with ``launch`` None what has to be cast one by one."""

    def __init__(self, given: Sequence[Tensor], dtype: torch.dtype):
        self.launch, self.total, self.views = None, 0, []
        self.missing = 4 - len(given)
        different = sum(x.dtype != dtype for x in given)
        if different < TOGETHER or not all(x.is_contiguous() for x in given):
            return
        starts: list[int] = []
        for x in given:
            starts.append(self.total)
            self.total += triton.cdiv(x.numel(), APART) * APART
        self.views = [(x.shape, x.stride(), start) for x, start in zip(given, starts, strict=True)]
        sizes, missing = [x.numel() for x in given], [0] * self.missing
        grid = triton.cdiv(max(sizes), CAST_BLOCK), len(sizes)
        integers = (*sizes, *missing, *starts[1:], *missing)
        self.launch = Launch(kernels_linear.cast_kernel, grid, integers, dict(BLOCK=CAST_BLOCK))


def cast(given: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Up to four parameters in ``dtype``: themselves, or parts of one buffer that one launch fills.

    Args:
        given: Tensors of any shapes and dtypes, at least one.
        dtype: The wanted dtype.

    Returns:
        As many tensors, in the same order.
    """
    if len(given) < TOGETHER:
        return [x if x.dtype == dtype else x.to(dtype) for x in given]
    key = dtype, given[0].device, *[(x.shape, x.stride(), x.dtype) for x in given]
    plan = _casts.get(key) or _casts.keep(key, _Cast(given, dtype))
    if plan.launch is None:
        return [x if x.dtype == dtype else x.to(dtype) for x in given]
    buffer = torch.empty(plan.total, dtype=dtype, device=given[0].device)
    plan.launch(*given, *[buffer] * plan.missing, buffer)
    return [buffer.as_strided(*view) for view in plan.views]


def _slices(C: int, tile: int) -> tuple[int, dict[str, Any]]:
    """Slices of the columns, and columns and rows of a program's tile; slices that come out even need no mask."""
    block = slice_width(C)
    return triton.cdiv(C, block), dict(C=C, ROWS=tile // block, BLOCK_C=block)


class _Plan:
    """How the rows of one or two maps are summed: by so many programs a slice, then in one launch for both.

    Args:
        sizes: Rows of the maps and columns of each, the first one's sums first.
        distance: From one row of the first map to the next.
    """

    def __init__(self, sizes: tuple[int, ...], distance: int):
        N, *widths = sizes
        width, slices = sum(widths), max(_slices(C, TILE)[0] for C in widths)
        self.programs = max(1, min(triton.cdiv(N, 32), PROGRAMS // slices))
        self.shape, self.widths = (self.programs, width), widths
        slices, constants = _slices(widths[0], TILE)
        integers = distance, N, width, 0
        self.sum = Launch(kernels_linear.column_sum_kernel, (slices, self.programs), integers, constants)
        self.gelu = _gelu(N, widths[-1], self.programs, width, width - widths[-1])
        self.fold = fold_plan(*self.shape)


def _gelu(N: int, C: int, programs: int = 0, width: int = 0, first: int = 0) -> Launch:
    """Launch of the gradient of GELU, with sums over the rows if ``width`` is given."""
    slices, constants = _slices(C, GELU_TILE)
    grid = slices, programs or max(1, min(triton.cdiv(N, constants["ROWS"]), PROGRAMS // slices))
    return Launch(kernels_linear.gelu_grad_kernel, grid, (N, width, first), dict(constants, PARTIAL=width > 0))


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the rows of ``x [N, C]``, whose columns lie side by side, as ``[C]`` in ``dtype``.

    The order of summation is always the same.
    """
    key = x.shape, x.stride(0), x.dtype, dtype, x.device
    plan = _plans.get(key) or _plans.keep(key, _Plan(tuple(x.shape), x.stride(0)))
    partial = torch.empty(plan.shape, dtype=torch.float32, device=x.device)
    plan.sum(x, partial)
    out = torch.empty(x.shape[1], dtype=dtype, device=x.device)
    plan.fold(partial, out, out)
    return out


def gelu_grad(
    pre: Tensor, inner: Tensor, outer: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient before an MLP's activation, in the memory of the one behind it, and the gradients of the biases.

    Args:
        pre: What went into the activation, ``[N, D]``, contiguous.
        inner: Gradient of what came out, the same; overwritten.
        outer: Gradient of the MLP's output ``[N, E]`` if that of the second bias is wanted.
        dtype: Dtype of the biases' gradients if that of the first bias is wanted.

    Returns:
        Gradients of the first and of the second bias: with both ``outer`` and ``dtype`` both, with ``dtype`` the first.
    """
    if dtype is None:
        key: Any = pre.shape, pre.dtype, inner.dtype, pre.device
        run = _plans.get(key) or _plans.keep(key, _gelu(*pre.shape))
        run(pre, inner, inner, inner)
        return None, None
    if outer is None:
        key = pre.shape, pre.dtype, inner.dtype, dtype, pre.device
        plan = _plans.get(key) or _plans.keep(key, _Plan(tuple(pre.shape), 0))
        partial = torch.empty(plan.shape, dtype=torch.float32, device=pre.device)
    else:
        key = pre.shape, outer.shape, outer.stride(0), pre.dtype, inner.dtype, outer.dtype, dtype, pre.device
        plan = _plans.get(key)
        if plan is None:
            plan = _plans.keep(key, _Plan((*outer.shape, pre.shape[1]), outer.stride(0)))
        partial = torch.empty(plan.shape, dtype=torch.float32, device=pre.device)
        plan.sum(outer, partial)
    plan.gelu(pre, inner, inner, partial)
    out = torch.empty(plan.shape[1], dtype=dtype, device=pre.device)
    plan.fold(partial, out, out)
    if outer is None:
        return out, None
    second, first = out.split(plan.widths)
    return first, second
