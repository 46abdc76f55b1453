"""The routing operators launched without PyTorch's dispatcher, for eager calls on a GPU, where host time counts.

Where something has to see the calls (a compiler, an exporter, a dispatch mode) the registered operators run instead;
both launch the same kernels.
"""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches


class _RoutedAttention(torch.autograd.Function):
    """``visionattn::routed_attention`` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        index: Tensor,
        q_region: tuple[int, int],
        kv_region: tuple[int, int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = launcher("routing").forward(query, key, value, index, q_region, kv_region, scale)
        ctx.save_for_backward(query, key, value, index, out, lse)
        ctx.rest = q_region, kv_region, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 7
            grad_out = torch.zeros_like(ctx.saved_tensors[4])
        return (
            *launcher("routing").backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest),
            None,
            None,
            None,
            None,
        )


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: tuple[int, int],
    kv_region: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp, or None where this way is not open."""
    if not launches(query) or not query.dim() == key.dim() == value.dim() == 5 or index.dim() != 4:
        return None
    if not query.dtype == key.dtype == value.dtype or len(kv_region) != 2:
        return None
    dtype = autocast_dtype(query)
    if dtype != query.dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not launcher("routing").serves(query, key, value, index, kv_region):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _RoutedAttention.apply(query, key, value, index, q_region, kv_region, scale)
    return launcher("routing").forward(query, key, value, index, q_region, kv_region, scale)


def region_mean(x: Tensor, region: tuple[int, int]) -> Tensor | None:
    """Means, or None where this way is not open."""
    if not launches(x) or x.dtype == torch.float64 or x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        return None
    return launcher("routing").region_mean(x, region)


def topk_regions(query: Tensor, key: Tensor, topk: int) -> Tensor | None:
    """The region table, or None where this way is not open."""
    if not launches(query) or not launcher("routing").serves_topk(query, key):
        return None
    return launcher("routing").topk_regions(query, key, topk)
