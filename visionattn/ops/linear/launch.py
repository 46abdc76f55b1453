"""Launching the Triton kernels around linear layers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops import kernels_sums
from visionattn.ops._launch import Launch, Plans
from visionattn.ops.linear import kernels_linear

TILE = 4096  # values that a program sums at once
GELU_TILE = 2048  # and of which it finds the gradient
PROGRAMS = 792  # of a sum at most, all slices of the widest layer together: six for each of 132 processors
CAST_BLOCK = 2048
APART = 128  # cast tensors start at multiples of so many values, or matrix products would take slower kernels

_casts, _sums, _gelu, _folds = Plans(), Plans(), Plans(), Plans()


def _plan_cast(given: Sequence[Tensor], dtype: torch.dtype) -> tuple[Launch, int, list[tuple[Any, ...]]]:
    sizes, starts, total = [x.numel() for x in given], [], 0
    for n in sizes:
        starts.append(total)
        total += triton.cdiv(n, APART) * APART
    views = [(x.shape, x.stride(), start) for x, start in zip(given, starts, strict=True)]
    missing = [0] * (4 - len(sizes))
    integers = (*sizes, *missing, *starts[1:], *missing)
    grid = triton.cdiv(max(sizes), CAST_BLOCK), len(sizes)
    return Launch(kernels_linear.cast_kernel, grid, integers, dict(BLOCK=CAST_BLOCK)), total, views


def cast(given: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Up to four parameters in ``dtype``: themselves, or parts of one buffer that one launch fills.

    Args:
        given: Tensors of any shapes and dtypes, at least one.
        dtype: The wanted dtype.

    Returns:
        As many tensors, in the same order.
    """
    if all(x.dtype == dtype for x in given):
        return list(given)
    if not all(x.is_contiguous() for x in given):
        return [x.to(dtype) for x in given]
    key = dtype, given[0].device, *[(x.shape, x.dtype) for x in given]
    launch, total, views = _casts.get(key) or _casts.keep(key, _plan_cast(given, dtype))
    first = given[0]
    buffer = torch.empty(total, dtype=dtype, device=first.device)
    launch(*given, *[first] * (4 - len(given)), buffer)
    return [buffer.as_strided(*view) for view in views]


def _block(C: int, tile: int) -> dict[str, int]:
    """Columns and rows of a program's tile; a slice that divides the columns needs no mask."""
    block = math.gcd(C, 128)
    if block < 32:
        block = min(128, triton.next_power_of_2(C))
    return dict(ROWS=tile // block, BLOCK_C=block)


class Sums:
    """Sums over the rows of one or two maps, for the gradients of biases: programs first, then one launch for both.

    Args:
        rows: Rows of each map.
        widths: Columns of each map.
        like: A tensor on the device.
    """

    def __init__(self, rows: int, widths: tuple[int, ...], like: Tensor):
        slices = max(triton.cdiv(C, _block(C, TILE)["BLOCK_C"]) for C in widths)
        least = min(_block(C, GELU_TILE)["ROWS"] for C in widths)
        self.programs = max(1, min(triton.cdiv(rows, least), PROGRAMS // slices))
        self.widths, self.width = widths, sum(widths)
        self.partial = torch.empty((self.programs, self.width), dtype=torch.float32, device=like.device)

    def add(self, x: Tensor, first: int) -> None:
        """Sum ``x [N, C]``, any distance between rows, into the columns from ``first`` on."""
        N, C = x.shape
        distance = x.stride(0)
        key = N, C, distance, self.programs, self.width, first, x.dtype, x.device
        launch = _sums.get(key)
        if launch is None:
            constants = dict(C=C, **_block(C, TILE))
            grid = triton.cdiv(C, constants["BLOCK_C"]), self.programs
            integers = distance, N, self.width, first
            launch = _sums.keep(key, Launch(kernels_linear.column_sum_kernel, grid, integers, constants))
        launch(x, self.partial)

    def fold(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The sums of each map, ``[C]`` in ``dtype``. The order of summation is always the same."""
        key = self.programs, self.width, dtype, self.partial.device
        launch = _folds.get(key)
        if launch is None:
            constants = dict(TAPS=0, BIAS=True, BLOCK_N=128, BLOCK_C=32)
            grid = 1, triton.cdiv(self.width, 32)
            launch = _folds.keep(key, Launch(kernels_sums.sum_kernel, grid, (self.programs, self.width), constants))
        out = torch.empty(self.width, dtype=dtype, device=self.partial.device)
        launch(self.partial, out, out)
        return (out,) if len(self.widths) == 1 else out.split(self.widths)


def gelu_grad(pre: Tensor, grad: Tensor, sums: Sums | None, first: int) -> Tensor:
    """Gradient before the activation, in the memory of the one behind it.

    Args:
        pre: What went into the activation, ``[N, C]``, contiguous.
        grad: Gradient of what came out, the same; overwritten.
        sums: Where the sums over the rows go, if they are wanted.
        first: First column there.

    Returns:
        ``grad``.
    """
    N, C = pre.shape
    programs, width = (0, 0) if sums is None else (sums.programs, sums.width)
    key = N, C, programs, width, first, pre.dtype, grad.dtype, pre.device
    launch = _gelu.get(key)
    if launch is None:
        block, slices = _block(C, GELU_TILE), triton.cdiv(C, _block(C, GELU_TILE)["BLOCK_C"])
        programs = programs or min(triton.cdiv(N, block["ROWS"]), max(1, PROGRAMS // slices))
        constants = dict(C=C, PARTIAL=sums is not None, **block)
        launch = Launch(kernels_linear.gelu_grad_kernel, (slices, programs), (N, width, first), constants)
        _gelu.keep(key, launch)
    launch(pre, grad, grad, grad if sums is None else sums.partial)
    return grad
