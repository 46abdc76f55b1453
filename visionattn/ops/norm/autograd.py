"""Layer norm by Triton kernels, with its gradient.

No operator is registered with PyTorch: where a compiler or an exporter looks on, the interface takes ``F.layer_norm``,
which they fuse with its neighbours, and here a call past the dispatcher saves half of its host time.
"""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import differentiable_once, launcher


class _LayerNorm(torch.autograd.Function):
    """``(x, delta, weight, bias)`` to the norm of ``x``, or with a ``delta`` to the sum and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor | tuple[Tensor, Tensor]:
        total, out, saved = launcher("norm").forward(x, delta, weight, bias, eps, dtype, save=True)
        ctx.save_for_backward(total, saved, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, None if delta is None else delta.dtype
        return out if delta is None else (total, out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, stats, weight, bias = ctx.saved_tensors
        grad, grad_sum, wanted = grads[-1], grads[0] if len(grads) == 2 else None, ctx.needs_input_grad
        dx, dweight, dbias = grad_sum, None, None
        if grad is not None:
            partial = wanted[2] or wanted[3]
            dx, dweight, dbias = launcher("norm").backward(grad, grad_sum, rows, stats, weight, bias, partial)
        if dx is None:
            return None, None, dweight, dbias, None, None
        x_dtype, delta_dtype = ctx.dtypes
        ddelta = None if delta_dtype is None else dx if dx.dtype == delta_dtype else dx.to(delta_dtype)
        return dx if dx.dtype == x_dtype else dx.to(x_dtype), ddelta, dweight, dbias, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Norm of ``x [..., C]`` in ``dtype``."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _LayerNorm.apply(x, None, weight, bias, eps, dtype)
    return launcher("norm").forward(x, None, weight, bias, eps, dtype, save=False)[1]


def add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``x + delta`` and its norm in ``dtype``."""
    wanted = x.requires_grad or delta.requires_grad or weight.requires_grad or bias.requires_grad
    if torch.is_grad_enabled() and wanted:
        return _LayerNorm.apply(x, delta, weight, bias, eps, dtype)
    return launcher("norm").forward(x, delta, weight, bias, eps, dtype, save=False)[:2]
