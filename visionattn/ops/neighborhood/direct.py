"""Neighbourhood attention launched without PyTorch's dispatcher, for eager calls on a GPU, where host time counts.

Where something has to see the calls (a compiler, an exporter, a dispatch mode) the registered operator runs instead;
both launch the same kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches, learns


class _NeighborhoodAttention(torch.autograd.Function):
    """``visionattn::neighborhood_attention`` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        kernel: Sequence[int],
        dilation: Sequence[int],
        scale: float,
        stride: Sequence[int],
    ) -> Tensor:
        out, lse = launcher("neighborhood").forward(query, key, value, bias, kernel, dilation, scale, stride)
        ctx.save_for_backward(query, key, value, bias, out, lse)
        ctx.rest = kernel, dilation, scale, stride
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        run, saved = launcher("neighborhood").backward, ctx.saved_tensors
        grads = run(grad_out, None, *saved, *ctx.rest, bias_grad=ctx.needs_input_grad[3])
        return (*grads, None, None, None, None)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int],
) -> Tensor | None:
    """Output of checked arguments, or None where this way is not open."""
    if not launches(query):
        return None
    dtype = autocast_dtype(query)
    if dtype != query.dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not launcher("neighborhood").serves(query, key, value, bias, kernel):
        return None
    inputs = query, key, value, bias
    if learns(*inputs):
        return _NeighborhoodAttention.apply(*inputs, kernel, dilation, scale, stride)
    return launcher("neighborhood").forward(*inputs, kernel, dilation, scale, stride)[0]
