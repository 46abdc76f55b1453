"""Routed attention of a packed projection with the local enhancement of its values, as one node of the graph.

Apart, queries, keys and values are views with nodes of their own, and the values have two gradients to be added. Here
the kernels write all three gradients into one map, and that of the convolution adds its share to that of the attention.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches
from visionattn.ops.depthwise import eager as depthwise


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[B, H, W, heads, head_dim]``, and the values as a map ``[B, H, W, C]``."""
    B, H, W, packed = qkv.shape
    C = packed // 3
    return *qkv.view(B, H, W, 3, heads, C // heads).unbind(3), qkv.narrow(3, 2 * C, C)


class _PackedAttention(torch.autograd.Function):
    """``(qkv, index, weight, bias)`` to attention plus convolution, ``[B, H, W, C]``."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        index: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: int,
        region: tuple[int, int],
        scale: float,
    ) -> Tensor:
        query, key, value, values = _parts(qkv, heads)
        out, lse = launcher("routing").forward(query, key, value, index, region, region, scale)
        arranged = launcher("depthwise").arrange(weight)
        ctx.save_for_backward(qkv, index, weight, bias, out, lse, arranged)
        ctx.rest = heads, region, scale
        return launcher("depthwise").forward(values, weight, bias, out.view(values.shape), arranged=arranged)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, index, weight, bias, out, lse, arranged = ctx.saved_tensors
        (heads, region, scale), wanted = ctx.rest, ctx.needs_input_grad
        *inputs, values = _parts(qkv, heads)
        dqkv = dweight = dbias = None
        grad = grad.contiguous()
        if wanted[0]:
            dqkv = torch.empty_like(qkv)
            *grads, dvalues = _parts(dqkv, heads)
            rest = index, out, lse, region, region, scale
            launcher("routing").backward(grad.view(out.shape), None, *inputs, *rest, grads)
            launcher("depthwise").forward(grad, weight, None, dvalues, flip=True, arranged=arranged, out=dvalues)
        if wanted[2] or wanted[3]:
            dweight, dbias = launcher("depthwise").weight_grad(grad, values, weight, bias)
        return dqkv, None, dweight, dbias, None, None, None


@lru_cache(maxsize=512)
def _served(
    qkv: torch.Size,
    index: torch.Size,
    weight: torch.Size,
    kinds: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    heads: int,
    region: tuple[int, int],
) -> bool:
    """Whether there are kernels for contiguous tensors of these shapes and dtypes (of map, weight and bias)."""
    maps, weights = (torch.empty(n, dtype=kind, device="meta") for n, kind in ((qkv, kinds[0]), (weight, kinds[1])))
    bias = None if kinds[2] is None else torch.empty(weight[0], dtype=kinds[2], device="meta")
    query, key, value, _ = _parts(maps, heads)
    table = torch.empty(index, dtype=torch.int32, device="meta")
    return launcher("routing").serves(query, key, value, table, region) and depthwise.serves(maps, weights, bias, None)


def packed_attention(
    qkv: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    region: tuple[int, int],
    scale: float,
) -> Tensor | None:
    """``routed_attention`` of the thirds of a packed projection plus ``depthwise_conv`` of the last, for training.

    Args:
        qkv: Queries, keys and values, ``[B, H, W, 3 * C]``.
        index: Region table, int32 ``[B, 1 or heads, P, K]``.
        weight: Parameter of the convolution, ``[C, 1, kh, kw]`` with odd sides.
        bias: Its bias ``[C]``.
        heads: Attention heads.
        region: Height and width of a region in pixels.
        scale: Factor on the dot products.

    Returns:
        ``[B, H, W, C]``, or None where this way is not open: no kernels, no gradient, or somebody watches the calls.
    """
    if not (torch.is_grad_enabled() and qkv.requires_grad and launches(qkv)):
        return None
    if not qkv.is_contiguous() or autocast_dtype(qkv) != qkv.dtype or weight.shape[0] * 3 != qkv.shape[3]:
        return None
    if weight.device != qkv.device or (bias is not None and bias.device != qkv.device):
        return None
    kinds = qkv.dtype, weight.dtype, None if bias is None else bias.dtype
    if not _served(qkv.shape, index.shape, weight.shape, kinds, heads, region):
        return None
    return _PackedAttention.apply(qkv, index, weight, bias, heads, region, scale)
