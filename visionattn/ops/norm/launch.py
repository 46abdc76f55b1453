"""Launching the Triton kernels of layer norm."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, sum_programs
from visionattn.ops.norm import kernels_norm

TILE = 2048  # values that a program holds at once
PROGRAMS = 512  # of the backward kernel at most: all of them run at the same time


class Saved(NamedTuple):
    """What the backward pass needs: the rows that were normalised, their means and reciprocal deviations."""

    rows: Tensor
    mean: Tensor
    rstd: Tensor


_forward, _backward = Plans(), Plans()


def _rows(x: Tensor) -> Tensor:
    """``x`` itself, or as ``[N, C]``: a view where its rows are equally far apart, else a copy."""
    if x.is_contiguous():
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _distance(x: Tensor) -> int:
    """From one row to the next."""
    return x.shape[-1] if x.is_contiguous() else x.stride(0)


def _blocks(C: int) -> dict[str, int]:
    block = triton.next_power_of_2(C)
    return dict(ROWS=max(1, TILE // block), BLOCK_C=block)


def forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Saved | None]:
    """Norm of ``x``, or of ``x + delta``.

    Returns:
        The sum (``x`` itself without ``delta``), its norm in ``dtype``, and with ``save`` what a backward pass needs.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    shape, C, add = x.shape, x.shape[-1], delta is not None
    x, N = _rows(x), x.numel() // C
    other = x if delta is None else _rows(delta)
    total = torch.empty(shape, dtype=torch.promote_types(x.dtype, other.dtype), device=x.device) if add else x
    out = torch.empty(shape, dtype=dtype, device=x.device)
    stats = torch.empty((2, N), dtype=torch.float32, device=x.device).unbind(0) if save else (out, out)
    distances = _distance(x), _distance(other)
    key = N, C, distances, x.dtype, other.dtype, weight.dtype, bias.dtype, dtype, add, save, x.device
    launch = _forward.get(key)
    if launch is None:
        constants = dict(C=C, ADD=add, SAVE=save, **_blocks(C))
        grid = (triton.cdiv(N, constants["ROWS"]),)
        launch = _forward.keep(key, Launch(kernels_norm.forward_kernel, grid, (*distances, N), constants))
    launch(x, other, weight, bias, total, out, *stats, eps)
    return total, out, Saved(total, *stats) if save else None


def backward(
    grad: Tensor, grad_sum: Tensor | None, saved: Saved, weight: Tensor, bias: Tensor, partial: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the normalised rows, and with ``partial`` those of weight and bias.

    Args:
        grad: Gradient of the norm.
        grad_sum: Gradient that reaches the rows past the norm.
        saved: From the forward pass.
        weight: Weight ``[C]``.
        bias: Bias ``[C]``.
        partial: Whether the gradients of weight and bias are wanted.

    Returns:
        The gradients; that of the rows has the shape of ``grad`` and the dtype of the rows.
    """
    x, C, weight = saved.rows, grad.shape[-1], weight.contiguous()
    dx = torch.empty(grad.shape, dtype=x.dtype, device=x.device)
    grad, N = _rows(grad), grad.numel() // C
    other = grad if grad_sum is None else _rows(grad_sum)
    distances = _distance(grad), _distance(other), _distance(x)
    key = N, C, distances, x.dtype, grad.dtype, other.dtype, weight.dtype, grad_sum is None, partial, x.device
    launch, programs = _backward.get(key) or (None, 0)
    if launch is None:
        constants = dict(C=C, ADD=grad_sum is not None, PARTIAL=partial, **_blocks(C))
        programs = min(PROGRAMS, triton.cdiv(N, constants["ROWS"]))
        launch = Launch(kernels_norm.backward_kernel, (programs,), (*distances, N), constants)
        _backward.keep(key, (launch, programs))
    sums = torch.empty((programs, 2, C), dtype=torch.float32, device=x.device) if partial else dx
    launch(grad, other, x, weight, saved.mean, saved.rstd, dx, sums)
    return (dx, *sum_programs(sums, weight, bias)) if partial else (dx, None, None)
