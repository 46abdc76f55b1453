"""Public linear operators: pick an implementation, nothing else; PyTorch checks the shapes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from visionattn.ops._dispatch import KERNEL_DTYPES, autocast_dtype, launches, learns
from visionattn.ops.linear import autograd


def _fits(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None, cast: bool) -> bool:
    """Whether shapes and dtypes are those of a linear layer on ``x``; with ``cast`` the dtypes need not be equal."""
    for y in (weight,) if bias is None else (weight, bias):
        if type(y) is not Parameter and type(y) is not Tensor:  # quantised or distributed parameters
            return False
        if y.device != x.device or (y.dtype not in KERNEL_DTYPES if cast else y.dtype != dtype):
            return False
    return weight.numel() > 0 and (bias is None or bias.shape == weight.shape[:1])


def _dtype(x: Tensor) -> torch.dtype | None:
    """Dtype of the result for a map that the kernels serve."""
    if not launches(x) or x.dim() == 0 or x.dtype not in KERNEL_DTYPES or x.numel() == 0:
        return None
    return autocast_dtype(x)


def _casts(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, in eager training and under autocast on a GPU with less of its host time.

    Args:
        x: ``[..., C]``, any float dtype.
        weight: ``[D, C]``, the parameter of an ``nn.Linear``, or ``[D, C, 1, 1]``, that of a 1 x 1 ``nn.Conv2d``.
        bias: ``[D]``.

    Returns:
        ``[..., D]`` in the dtype that PyTorch gives, under autocast its dtype. Where a gradient is wanted on a GPU it
        is differentiable once; that of a float32 weight is not rounded to autocast's dtype on its way.

    Raises:
        RuntimeError: Shapes or dtypes that do not fit together, by PyTorch.
    """
    dtype = _dtype(x)
    if (
        dtype is not None
        and ((wanted := learns(x, weight, bias)) or _casts(x))
        and _fits(dtype, x, weight, bias, _casts(x))
        and (weight.dim() == 2 or (weight.dim() == 4 and weight.shape[2:] == (1, 1) and weight.is_contiguous()))
        and weight.shape[1] == x.shape[-1]
    ):
        return autograd.linear(x, weight, bias, dtype, wanted)
    return F.linear(x, weight.flatten(1) if weight.dim() == 4 else weight, bias)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Two linear layers with the exact GELU between them: ``linear(gelu(linear(x)))``.

    Args:
        x: ``[..., C]``, any float dtype.
        weight1: ``[D, C]``.
        bias1: ``[D]``.
        weight2: ``[E, D]``.
        bias2: ``[E]``.

    Returns:
        ``[..., E]``, as ``linear`` gives it.

    Raises:
        RuntimeError: Shapes or dtypes that do not fit together, by PyTorch.
    """
    dtype = _dtype(x)
    if (
        dtype is not None
        and ((wanted := learns(x, weight1, bias1, weight2, bias2)) or _casts(x))
        and weight1.dim() == weight2.dim() == 2
        and _fits(dtype, x, weight1, bias1, _casts(x))
        and _fits(dtype, x, weight2, bias2, _casts(x))
        and weight1.shape[1] == x.shape[-1]
        and weight2.shape[1] == weight1.shape[0]
    ):
        return autograd.mlp(x, weight1, bias1, weight2, bias2, dtype, wanted)
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
