"""``visionattn::depthwise_conv``: registered operator, its gradient, and the short way past PyTorch's dispatcher."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from visionattn.ops._dispatch import KERNEL_DTYPES, differentiable_once, launcher, use_triton
from visionattn.ops.depthwise import reference

MAX_KERNEL = 19


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    """Whether there is a kernel for these dtypes and this size of the kernel."""
    if x.dtype not in KERNEL_DTYPES or weight.dtype not in KERNEL_DTYPES or max(weight.shape[2:]) > MAX_KERNEL:
        return False
    return (bias is None or bias.dtype in KERNEL_DTYPES) and (residual is None or residual.dtype in KERNEL_DTYPES)


def _runs_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> bool:
    return use_triton(x) and serves(x, weight, bias, residual) and x.numel() > 0


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int = 1) -> Tensor:
    if _runs_kernel(x, weight, bias, residual):
        return launcher("depthwise").forward(x, weight, bias, residual, dilation=dilation)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(x.dtype)
        out = reference.depthwise_conv(x, weight.to(x.dtype), bias, residual, dilation)
    return out.clone(memory_format=torch.contiguous_format)


def _input_grad(grad: Tensor, weight: Tensor, add: bool, dilation: int = 1) -> Tensor:
    residual = grad if add else None
    if _runs_kernel(grad, weight, None, None):
        return launcher("depthwise").forward(grad, weight, None, residual, flip=True, dilation=dilation)
    return _forward(grad, weight.flip(2, 3), None, residual, dilation)


def _weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1
) -> tuple[Tensor, Tensor]:
    if _runs_kernel(x, weight, bias, grad):
        dweight, dbias = launcher("depthwise").weight_grad(grad, x, weight, bias, dilation)
        return dweight, weight.new_empty(0) if dbias is None else dbias
    grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2).to(grad.dtype)
    padding = (weight.shape[2] // 2 * dilation, weight.shape[3] // 2 * dilation)
    options: dict[str, Any] = dict(padding=padding, dilation=dilation, groups=weight.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        dweight = conv2d_weight(x, list(weight.shape), grad, **options)
    dbias = weight.new_empty(0) if bias is None else grad.sum((0, 2, 3)).to(bias.dtype)
    return dweight.to(weight.dtype).contiguous(), dbias


# PyTorch's custom_op does the same with three times the host time of a call
_LIBRARY = torch.library.Library("visionattn", "FRAGMENT")
_MAP, _KERNEL = "Tensor x, Tensor weight, Tensor? bias", "int dilation=1"
_LIBRARY.define(f"depthwise_conv({_MAP}, Tensor? residual, {_KERNEL}) -> Tensor")
_LIBRARY.define(f"depthwise_conv_input_grad(Tensor grad, Tensor weight, bool add, {_KERNEL}) -> Tensor")
_LIBRARY.define(f"depthwise_conv_weight_grad(Tensor grad, {_MAP}, {_KERNEL}) -> (Tensor, Tensor)")
_OPS = torch.ops.visionattn


class _DepthwiseConv(torch.autograd.Function):
    """The operator with its gradient; ``direct`` launches the kernels without a detour over the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        direct: bool,
        dilation: int,
    ) -> Tensor:
        arranged = launcher("depthwise").arrange(weight) if direct else None
        ctx.save_for_backward(x, weight, bias, arranged)
        ctx.residual = None if residual is None else residual.dtype
        ctx.on_itself, ctx.direct, ctx.dilation = residual is x, direct, dilation
        if direct:
            return launcher("depthwise").forward(x, weight, bias, residual, arranged=arranged, dilation=dilation)
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.depthwise_conv.default(x, weight, bias, residual, dilation)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, arranged = ctx.saved_tensors
        wanted, on_itself = ctx.needs_input_grad, ctx.on_itself
        dx = dweight = dbias = dresidual = None
        if wanted[0]:  # where the map is the residual too, both shares are added in one pass
            if ctx.direct:
                dx = launcher("depthwise").forward(
                    grad, weight, None, grad if on_itself else None, True, arranged, dilation=ctx.dilation
                )
            else:
                dx = _OPS.depthwise_conv_input_grad.default(grad, weight, on_itself, ctx.dilation)
            dx = dx if dx.dtype == x.dtype else dx.to(x.dtype)
        if wanted[1] or wanted[2]:
            if ctx.direct:
                dweight, dbias = launcher("depthwise").weight_grad(grad, x, weight, bias, ctx.dilation)
            else:
                dweight, dbias = _OPS.depthwise_conv_weight_grad.default(grad, x, weight, bias, ctx.dilation)
        if wanted[3] and not on_itself:
            dresidual = grad if grad.dtype == ctx.residual else grad.to(ctx.residual)
        return dx, dweight, None if bias is None else dbias, dresidual, None, None


def _differentiable(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int = 1
) -> Tensor:
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias, residual)):
        return _DepthwiseConv.apply(x, weight, bias, residual, False, dilation)
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.depthwise_conv.default(x, weight, bias, residual, dilation)


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int = 1) -> Tensor:
    """The operator where a kernel serves it and nothing has to see the call."""
    wanted = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and (wanted or (residual is not None and residual.requires_grad)):
        return _DepthwiseConv.apply(x, weight, bias, residual, True, dilation)
    return launcher("depthwise").forward(x, weight, bias, residual, dilation=dilation)


for _name, _function in dict(
    depthwise_conv=_forward,
    depthwise_conv_input_grad=_input_grad,
    depthwise_conv_weight_grad=_weight_grad,
).items():
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
_LIBRARY.impl("depthwise_conv", _differentiable, "Autograd")


@torch.library.register_fake("visionattn::depthwise_conv", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int = 1) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("visionattn::depthwise_conv_input_grad", lib=_LIBRARY)
def _(grad: Tensor, weight: Tensor, add: bool, dilation: int = 1) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.register_fake("visionattn::depthwise_conv_weight_grad", lib=_LIBRARY)
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)


@register_flop_formula(_OPS.depthwise_conv)
def _flops(x: Any, weight: Any, *rest: Any, out_shape: Any = None) -> int:
    """A multiply-add, 2 FLOPs, for every value of the kernel and the map."""
    return 2 * math.prod(x) * math.prod(weight[2:])


@register_flop_formula(_OPS.depthwise_conv_input_grad)
def _input_grad_flops(grad: Any, weight: Any, *rest: Any, out_shape: Any = None) -> int:
    return _flops(grad, weight)


@register_flop_formula(_OPS.depthwise_conv_weight_grad)
def _weight_grad_flops(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None) -> int:
    return _flops(x, weight)
