"""Launching the Triton kernels of layer norm."""

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, rows_apart, sum_programs
from visionattn.ops.norm import kernels_norm

TILE = 2048  # values that a program holds at once
PROGRAMS = 512  # of the backward kernel at most: all of them run at the same time


_forward, _backward = Plans(), Plans()


def _blocks(C: int) -> dict[str, int]:
    block = triton.next_power_of_2(C)
    return dict(ROWS=max(1, TILE // block), BLOCK_C=block)


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Norm of ``x``, or of ``x + delta``.

    Returns:
        The sum (``x`` as rows without ``delta``), its norm in ``dtype``, and with ``save`` means and reciprocal
        deviations of the rows, ``[2, N]``, for the backward pass.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    shape, C, device, add = x.shape, x.shape[-1], x.device, delta is not None
    N = x.numel() // C
    x, distance = rows_apart(x)
    other, other_distance = (x, distance) if delta is None else rows_apart(delta)
    total = torch.empty(shape, dtype=torch.promote_types(x.dtype, other.dtype), device=device) if add else x
    out = torch.empty(shape, dtype=dtype, device=device)
    stats = torch.empty((2, N), dtype=torch.float32, device=device) if save else None
    key = N, C, distance, other_distance, x.dtype, other.dtype, weight.dtype, bias.dtype, dtype, add, save, device
    launch = _forward.get(key)
    if launch is None:
        constants = dict(C=C, ADD=add, SAVE=save, **_blocks(C))
        grid = (triton.cdiv(N, constants["ROWS"]),)
        integers = distance, other_distance, N
        launch = _forward.keep(key, Launch(kernels_norm.forward_kernel, grid, integers, constants))
    launch(x, other, weight, bias, total, out, out if stats is None else stats, eps)
    return total, out, stats


def backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, partial: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the normalised rows, and with ``partial`` those of weight and bias.

    Args:
        grad: Gradient of the norm.
        grad_sum: Gradient that reaches the rows past the norm.
        x: The rows that were normalised, from the forward pass.
        stats: Their means and reciprocal deviations.
        weight: Weight ``[C]``.
        bias: Bias ``[C]``.
        partial: Whether the gradients of weight and bias are wanted.

    Returns:
        The gradients; that of the rows has the shape of ``grad`` and the dtype of the rows.
    """
    shape, dtype, device, add = grad.shape, x.dtype, x.device, grad_sum is not None
    C, N, weight = shape[-1], stats.shape[1], weight.contiguous()
    dx = torch.empty(shape, dtype=dtype, device=device)
    grad, distance = rows_apart(grad)
    other, other_distance = (grad, distance) if grad_sum is None else rows_apart(grad_sum)
    x, x_distance = rows_apart(x)
    distances = distance, other_distance, x_distance
    key = N, C, distances, dtype, grad.dtype, other.dtype, weight.dtype, add, partial, device
    launch, programs = _backward.get(key) or (None, 0)
    if launch is None:
        constants = dict(C=C, ADD=add, PARTIAL=partial, **_blocks(C))
        programs = min(PROGRAMS, triton.cdiv(N, constants["ROWS"]))
        launch = Launch(kernels_norm.backward_kernel, (programs,), (*distances, N), constants)
        _backward.keep(key, (launch, programs))
    sums = torch.empty((programs, 2, C), dtype=torch.float32, device=device) if partial else dx
    launch(grad, other, x, weight, stats, dx, sums)
    return (dx, *sum_programs(sums, weight, bias)) if partial else (dx, None, None)
