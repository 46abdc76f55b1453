"""Ordinary modules of PyTorch and timm on channels-last maps, by our operators where those do the same for less.

A model keeps ``nn.Conv2d``, ``nn.Linear``, ``LayerNorm`` and ``Mlp`` modules, with all that tools do to them, and calls
them through these functions. One that was replaced by another class, or that has hooks, is called as a module. So is
every one under a tracer, whose graph then names the modules. TorchScript cannot pass modules to functions: it needs a
branch of its own.
"""

from typing import TypeGuard

import timm.layers
import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from visionattn.ops import add_layer_norm, depthwise_conv, layer_norm, linear, mlp
from visionattn.ops._dispatch import launches, use_triton


def _unhooked(module: nn.Module) -> bool:
    """Whether nothing of its own hangs on a module's call."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def bare(module: nn.Module, x: Tensor) -> bool:
    """Whether calling ``module`` would run its ``forward`` and nothing else, on an ordinary tensor."""
    return type(x) is Tensor and _unhooked(module) and not _has_any_global_hook()


_ROW_NORMS, _MAP_NORMS = (nn.LayerNorm, timm.layers.LayerNorm), (timm.layers.LayerNorm2d,)


def _is_layer_norm(
    module: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...] = _ROW_NORMS
) -> TypeGuard[nn.LayerNorm]:
    return (
        isinstance(module, nn.LayerNorm)
        and type(module) in kinds
        and not getattr(module, "_fast_norm", False)  # asks for other numbers
        and module.bias is not None
        and len(module.normalized_shape) == 1
        and bare(module, x)
    )


def is_depthwise(module: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether calling ``module`` on ``x`` would do what ``visionattn.ops.depthwise_conv`` does with its parameters."""
    return (
        type(module) is nn.Conv2d
        and module.groups == module.in_channels == module.out_channels
        and module.stride == (1, 1)
        and module.dilation[0] == module.dilation[1]
        and module.padding_mode == "zeros"
        and module.padding == tuple(side // 2 * module.dilation[0] for side in module.kernel_size)
        and module.kernel_size[0] % 2 == module.kernel_size[1] % 2 == 1
        and bare(module, x)
    )


def is_pointwise(module: nn.Module, x: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether calling ``module`` on ``x`` would map every pixel linearly, with all channels in one group."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid", "same")
        and bare(module, x)
    )


_MLP_PARTS = dict(fc1=nn.Linear, act=nn.GELU, drop1=nn.Dropout, norm=nn.Identity, fc2=nn.Linear, drop2=nn.Dropout)


def _is_mlp(module: nn.Module, x: Tensor) -> TypeGuard[timm.layers.Mlp]:
    """Whether it is timm's MLP with the exact GELU and nothing else between and behind its layers."""
    if type(module) is not timm.layers.Mlp or not bare(module, x) or len(module._modules) != len(_MLP_PARTS):
        return False
    for name, part in module._modules.items():
        if part is None or type(part) is not _MLP_PARTS.get(name) or not _unhooked(part):
            return False
        if type(part) is nn.Dropout and part.training and part.p > 0:
            return False
    return module.act.approximate == "none"


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``.

    Args:
        norm: A layer norm, or any module over ``[..., C]``.
        x: ``[..., C]``.

    Returns:
        ``[..., C]``; under autocast on a GPU in its dtype, see ``visionattn.ops.layer_norm``.
    """
    if _is_layer_norm(norm, x):
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)


def add_normalize(norm: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """``x + delta`` and ``norm(x + delta)``.

    Args:
        norm: A layer norm, or any module over ``[..., C]``.
        x: ``[..., C]``.
        delta: Shape of ``x``.

    Returns:
        The sum and its norm.
    """
    if _is_layer_norm(norm, x):
        return add_layer_norm(x, delta, norm.weight, norm.bias, norm.eps)
    x = x + delta
    return x, norm(x)


def convolve(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + conv(x)`` for a module that takes ``[B, C, H, W]``.

    Args:
        conv: A depthwise convolution, or any module ``[B, C, H, W]`` to the same.
        x: Map, ``[B, H, W, C]``.
        residual: Shape of ``x``, perhaps ``x`` itself.

    Returns:
        ``[B, H, W, C]``.
    """
    if is_depthwise(conv, x):
        return depthwise_conv(x, conv.weight, conv.bias, residual, conv.dilation[0])
    return residual + conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def channels_innermost(x: Tensor) -> bool:
    """Whether ``x`` is a map ``[B, C, H, W]`` whose channels lie side by side, where kernels for those run."""
    return type(x) is Tensor and x.dim() == 4 and use_triton(x) and x.stride(1) == 1


def on_map(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, of some modules by our operators where channels lie side by side on a GPU.

    They are depthwise and 1 x 1 convolutions and layer norms.

    Args:
        module: Any module.
        x: What it takes; ``[B, C, H, W]`` for a convolution or timm's ``LayerNorm2d``.

    Returns:
        What the module gives; of a norm under autocast in its dtype, see ``visionattn.ops.layer_norm``.
    """
    if channels_innermost(x):
        if is_depthwise(module, x):
            rows = x.permute(0, 2, 3, 1)
            return depthwise_conv(rows, module.weight, module.bias, None, module.dilation[0]).permute(0, 3, 1, 2)
        if _is_layer_norm(module, x, _MAP_NORMS):
            return layer_norm(x.permute(0, 2, 3, 1), module.weight, module.bias, module.eps).permute(0, 3, 1, 2)
        if launches(x) and is_pointwise(module, x):
            return linear(x.permute(0, 2, 3, 1), module.weight, module.bias).permute(0, 3, 1, 2)
    return module(x)


class MapSequential(nn.Sequential):
    """Modules in a row, each called by ``on_map``.

    Shape:
        x: ``[B, C, H, W]``.
        returns: What the last module gives.
    """

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x) if torch.jit.is_scripting() else on_map(module, x)
        return x


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``.

    Args:
        layer: A linear layer, or any module over ``[..., C]``.
        x: ``[..., C]``.

    Returns:
        What the module gives, for a linear layer ``[..., D]``.
    """
    if type(layer) is nn.Linear and bare(layer, x):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def transform(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``.

    Args:
        block: timm's ``Mlp``, or any module over ``[..., C]``.
        x: ``[..., C]``.

    Returns:
        What the module gives, for an MLP ``[..., D]``.
    """
    if _is_mlp(block, x):
        first, second = block.fc1, block.fc2
        return mlp(x, first.weight, first.bias, second.weight, second.bias)
    return block(x)


@register_notrace_function  # a leaf for torch.fx, which cannot ask for the device
def channels_last_on_gpu(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` with the channels innermost in memory if it is on a GPU, else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x


class ChannelsLast(nn.Sequential):
    """Modules in a row, of which a GPU's convolutions work channels-last, whatever the memory format of the input.

    For a stem: it is cheaper to rearrange the image than the map that comes out.

    Shape:
        x: ``[B, C, H, W]``.
        returns: What the last module gives.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last_on_gpu(x)
        for module in self:
            x = module(x) if torch.jit.is_scripting() else on_map(module, x)
        return x
