"""Linear layers and MLPs for eager mode: one node of the graph each, casts of parameters included.

The matrix products are PyTorch's. What they save is host time: no nodes for casts, views and transposes, the gradient
of a float32 weight straight from the product of 16-bit maps, and those of biases from one or two launches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops._dispatch import differentiable_once, launcher

_KEYS = torch._C.DispatchKey
# autograd and autocast have nothing to do inside a function that is its own node and casts by itself; views have to
# be known as such, or a map that is changed before the backward pass would go unnoticed
_PASSED = torch._C.DispatchKeySet(_KEYS.AutogradCPU)
for _key in (_KEYS.AutogradCUDA, _KEYS.AutocastCPU, _KEYS.AutocastCUDA):
    _PASSED = _PASSED | torch._C.DispatchKeySet(_key)
_VIEWS = torch._C.DispatchKeySet(_KEYS.ADInplaceOrView)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x [..., C]`` as ``[N, C]`` in ``dtype``."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.dtype == dtype else x.to(dtype)


def _matrix(weight: Tensor) -> Tensor:
    """``weight [D, C]``, or that of a 1 x 1 convolution, as a matrix."""
    return weight if weight.dim() == 2 else weight.view(weight.shape[:2])


def _like(out: Tensor, x: Tensor) -> Tensor:
    """``out [N, D]`` as ``[..., D]`` for ``x [..., C]``, not known as a view: autograd lets nobody change those."""
    if x.dim() == 2:
        return out
    with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
        return out.view(*x.shape[:-1], -1)


def _grad_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a gradient, with the channels side by side."""
    grad = _rows(grad, dtype)
    return grad if grad.stride(1) == 1 and grad.stride(0) >= grad.shape[1] else grad.contiguous()


def _weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T x`` in ``dtype``; on a GPU the product of 16-bit maps gives float32 itself, without a rounding."""
    if dtype == x.dtype:
        return torch.mm(grad.t(), x)
    if dtype == torch.float32 and x.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x).to(dtype)


def _cast(dtype: torch.dtype, *parameters: Tensor | None) -> list[Any]:
    """The parameters that are there, in ``dtype``, and None for the others."""
    cast = iter(launcher("linear").cast([x for x in parameters if x is not None], dtype))
    return [None if x is None else next(cast) for x in parameters]


class _Linear(torch.autograd.Function):
    """``(x, weight, bias)`` to ``x weight^T + bias`` in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        wanted = ctx.needs_input_grad
        with torch._C._ExcludeDispatchKeyGuard(_PASSED):
            rows = _rows(x, dtype)
            w, b = _cast(dtype, weight, bias)
            w = _matrix(w)
            out = F.linear(rows, w, b)
            ctx.save_for_backward(rows if wanted[1] else None, w if wanted[0] else None)
            ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
            ctx.weight = None if weight.dim() == 2 else (weight.shape, weight.stride())
            return _like(out, x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, w = ctx.saved_tensors
        wanted, (x_dtype, w_dtype, b_dtype) = ctx.needs_input_grad, ctx.dtypes
        dx = dw = db = None
        with torch._C._ExcludeDispatchKeyGuard(_PASSED):
            grad = _grad_rows(grad, grad.dtype)
            if wanted[0]:
                dx = torch.mm(grad, w).view(ctx.shape)
                dx = dx if dx.dtype == x_dtype else dx.to(x_dtype)
            if wanted[1]:
                dw = _weight_grad(grad, rows, w_dtype)
                dw = dw if ctx.weight is None else dw.as_strided(*ctx.weight)  # strides as the optimizers want them
            if wanted[2]:
                db = launcher("linear").column_sums(grad, b_dtype)
        return dx, dw, db, None


class _Mlp(torch.autograd.Function):
    """Two linear layers with the exact GELU between them, in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        with torch._C._ExcludeDispatchKeyGuard(_PASSED):
            rows = _rows(x, dtype)
            w1, b1, w2, b2 = _cast(dtype, weight1, bias1, weight2, bias2)
            pre = F.linear(rows, w1, b1)
            act = F.gelu(pre)
            out = F.linear(act, w2, b2)
            inner = wanted[0] or wanted[1] or wanted[2]
            ctx.save_for_backward(
                rows if wanted[1] else None,
                pre if inner else None,
                act if wanted[3] else None,
                w1 if wanted[0] else None,
                w2 if inner else None,
            )
            ctx.shape = x.shape
            ctx.dtypes = [None if y is None else y.dtype for y in (x, weight1, bias1, weight2, bias2)]
            return _like(out, x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, pre, act, w1, w2 = ctx.saved_tensors
        need, dtypes, launch = ctx.needs_input_grad, ctx.dtypes, launcher("linear")
        dx = dw1 = db1 = dw2 = db2 = None
        with torch._C._ExcludeDispatchKeyGuard(_PASSED):
            grad = _grad_rows(grad, grad.dtype)
            if need[3]:
                dw2 = _weight_grad(grad, act, dtypes[3])
            if need[0] or need[1] or need[2]:
                inner = torch.mm(grad, w2)
                together = need[2] and dtypes[2] == dtypes[4]
                db1, db2 = launch.gelu_grad(
                    pre, inner, grad if need[4] and together else None, dtypes[2] if need[2] else None
                )
                if need[0]:
                    dx = torch.mm(inner, w1).view(ctx.shape)
                    dx = dx if dx.dtype == dtypes[0] else dx.to(dtypes[0])
                if need[1]:
                    dw1 = _weight_grad(inner, rows, dtypes[1])
            if need[4] and db2 is None:
                db2 = launch.column_sums(grad, dtypes[4])
        return dx, dw1, db1, dw2, db2, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, wanted: bool) -> Tensor:
    """``x [..., C]`` through a linear layer in ``dtype``; with a node of the graph if a gradient is ``wanted``."""
    if wanted:
        return _Linear.apply(x, weight, bias, dtype)
    with torch._C._ExcludeDispatchKeyGuard(_PASSED):
        w, b = _cast(dtype, weight, bias)
        return _like(F.linear(_rows(x, dtype), _matrix(w), b), x)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    dtype: torch.dtype,
    wanted: bool,
) -> Tensor:
    """``x [..., C]`` through two linear layers and the GELU between them in ``dtype``, as ``linear``."""
    if wanted:
        return _Mlp.apply(x, weight1, bias1, weight2, bias2, dtype)
    with torch._C._ExcludeDispatchKeyGuard(_PASSED):
        w1, b1, w2, b2 = _cast(dtype, weight1, bias1, weight2, bias2)
        return _like(F.linear(F.gelu(F.linear(_rows(x, dtype), w1, b1)), w2, b2), x)
