"""Neighbourhood attention of a packed projection as one node of the graph.

Apart, queries, keys and values are views with nodes of their own, each of which fills a map of zeros with its gradient
for the others to be added to. Here the kernels write all three into one map.
"""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches


def _parts(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, ``[B, H, W, heads, head_dim]``."""
    B, H, W, packed = qkv.shape
    return qkv.view(B, H, W, 3, heads, packed // (3 * heads)).unbind(3)


class _PackedAttention(torch.autograd.Function):
    """``(qkv, bias)`` to attention, ``[B, H, W, C]``."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias: Tensor | None,
        heads: int,
        kernel: list[int],
        dilation: list[int],
        scale: float,
        stride: list[int],
    ) -> Tensor:
        out, lse = launcher("neighborhood").forward(*_parts(qkv, heads), bias, kernel, dilation, scale, stride)
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):  # a result of its own, not a view, so that changes are noticed
            out = out.view(*qkv.shape[:3], qkv.shape[3] // 3)
        ctx.save_for_backward(qkv, bias, out, lse)
        ctx.rest = heads, kernel, dilation, scale, stride
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, out, lse = ctx.saved_tensors
        heads, *rest = ctx.rest
        dqkv, wanted = torch.empty_like(qkv), ctx.needs_input_grad[1]
        query, key, value = _parts(qkv, heads)
        grad, out = grad.contiguous().view(query.shape), out.view(query.shape)
        run, grads = launcher("neighborhood").backward, _parts(dqkv, heads)
        *_, dbias = run(grad, None, query, key, value, bias, out, lse, *rest, bias_grad=wanted, grads=grads)
        return dqkv, dbias, None, None, None, None, None


_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def packed_attention(
    qkv: Tensor,
    bias: Tensor | None,
    heads: int,
    kernel: list[int],
    dilation: list[int],
    scale: float,
    stride: list[int] | None = None,
) -> Tensor | None:
    """``neighborhood_attention`` of the thirds of a packed projection, for training.

    Args:
        qkv: Queries, keys and values, ``[B, H, W, 3 * C]``, a map that windows fit into.
        bias: Table of relative positions, ``[heads, 2 * kernel_h - 1, 2 * kernel_w - 1]``.
        heads: Attention heads.
        kernel: Height and width of the window.
        dilation: Distance of a window's neighbouring pixels along both axes.
        scale: Factor on the dot products.
        stride: Neighbouring pixels that share a window, along both axes; 1 by default.

    Returns:
        ``[B, H, W, C]``, or None where this way is not open: no kernels, no gradient, or somebody watches the calls.
    """
    if not (torch.is_grad_enabled() and qkv.requires_grad and launches(qkv)):
        return None
    if not qkv.is_contiguous() or autocast_dtype(qkv) != qkv.dtype:
        return None
    if bias is not None and (type(bias) not in (Tensor, torch.nn.Parameter) or bias.device != qkv.device):
        return None
    if not launcher("neighborhood").serves(*_parts(qkv, heads), bias, kernel):
        return None
    return _PackedAttention.apply(qkv, bias, heads, kernel, dilation, scale, stride or [1, 1])
