"""Layer norm by Triton kernels, with its gradient.

No operator is registered with PyTorch: where a compiler or an exporter looks on, the interface takes ``F.layer_norm``,
which they fuse with its neighbours, and here a call past the dispatcher saves half of its host time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionattn.ops._dispatch import launcher


class _LayerNorm(torch.autograd.Function):
    """``(x, delta, weight, bias)`` to the norm of ``x``, or with a ``delta`` to the sum and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor | tuple[Tensor, Tensor]:
        total, out, saved = launcher("norm").forward(x, delta, weight, bias, eps, dtype, save=True)
        ctx.save_for_backward(*saved, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.x_dtype, ctx.delta_dtype = x.dtype, None if delta is None else delta.dtype
        return out if delta is None else (total, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, weight, bias = ctx.saved_tensors
        grad, grad_sum = grads[-1], grads[0] if len(grads) == 2 else None
        dx, dweight, dbias = grad_sum, None, None
        if grad is not None:
            launch, partial = launcher("norm"), ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
            dx, dweight, dbias = launch.backward(grad, grad_sum, launch.Saved(*saved), weight, bias, partial)
        if dx is None:
            return None, None, dweight, dbias, None, None
        # .to() hands the same tensor back where the dtype is that of the sum
        return dx.to(ctx.x_dtype), dx.to(ctx.delta_dtype) if ctx.delta_dtype else None, dweight, dbias, None, None


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
