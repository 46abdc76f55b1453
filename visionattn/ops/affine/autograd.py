"""Sums of scaled maps by Triton kernels, with their gradients.

No operator is registered with PyTorch: a compiler fuses PyTorch's own with their neighbours.
"""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import differentiable_once, launcher, learns


class _Affine(torch.autograd.Function):
    """``(x, y, weight, bias, y_weight, y_bias)`` to the sum; without ``y_weight`` images of ``y`` may be dropped."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        y_weight: Tensor | None,
        y_bias: Tensor | None,
        keep: Tensor | None,
        gain: float,
        dtype: torch.dtype,
    ) -> Tensor:
        out = launcher("affine").forward(x, y, weight, bias, y_weight, y_bias, keep, gain, dtype)
        partial = any(ctx.needs_input_grad[2:6])
        # without sums for the parameters no map is read again
        ctx.save_for_backward(x if partial else None, None if y_weight is None else y, weight, y_weight, keep)
        ctx.rest = gain, partial, x.dtype, y.dtype, y.shape
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dy, sums = launcher("affine").backward(grad, *ctx.saved_tensors, *ctx.rest)
        dweight, dbias, dy_weight = sums
        wanted = ctx.needs_input_grad
        return (
            dx if wanted[0] else None,
            dy if wanted[1] else None,
            dweight if wanted[2] else None,
            dbias if wanted[3] else None,
            dy_weight if wanted[4] else None,
            dbias if wanted[5] else None,
            *[None] * 3,
        )


def affine(x: Tensor, y: Tensor, *rest: Any) -> Tensor:
    """The sum, of arguments as ``_Affine`` has them; ``y`` may have the last channels of ``x`` only."""
    if learns(x, y, *rest[:4]):
        return _Affine.apply(x, y, *rest)
    out: Tensor = launcher("affine").forward(x, y, *rest)
    return out
