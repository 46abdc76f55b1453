"""Public layer norm operators: check the arguments, pick an implementation, nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops._dispatch import KERNEL_DTYPES, autocast_dtype, launches
from visionattn.ops.norm import autograd

MAX_CHANNELS = 1024  # what a program can hold of a row


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:] or bias.shape != weight.shape:
        raise ValueError(
            f"{name} wants x [..., C] with weight and bias [C], "
            f"got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )


def _served(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        launches(x)
        and x.shape[-1] <= MAX_CHANNELS
        and x.numel() > 0
        and x.dtype in KERNEL_DTYPES
        and weight.dtype in KERNEL_DTYPES
        and bias.dtype in KERNEL_DTYPES
        and weight.device == x.device == bias.device
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last axis, ``torch.nn.functional.layer_norm`` with kernels for many short rows.

    Args:
        x: ``[..., C]``, any float dtype; channels-last maps and slices of a packed projection go in as they are.
        weight: ``[C]``; its dtype may be another than that of ``x`` where a kernel runs.
        bias: ``[C]``.
        eps: Added to the variance.

    Returns:
        The norm, shape of ``x``. The kernels (float32, float16 and bfloat16 on a GPU, up to 1,024 channels) compute in
        float32 and give the dtype of ``x``, but under autocast its dtype: PyTorch gives float32 there, which the layers
        behind a norm then round to the same numbers. Elsewhere it is what PyTorch gives.

    Raises:
        ValueError: Shapes that do not fit together.

    Reference: Layer Normalization, arXiv:1607.06450.
    """
    if not torch.compiler.is_compiling():  # sizes may be symbols there, and a check would fix them
        _check("layer_norm", x, weight, bias)
    if _served(x, weight, bias):
        return autograd.layer_norm(x, weight, bias, eps, autocast_dtype(x))
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Add a branch to the main path, and take the layer norm of the sum for the next branch.

    Args:
        x: ``[..., C]``, any float dtype.
        delta: Shape of ``x``.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.

    Returns:
        ``x + delta`` in the dtype that PyTorch gives it, and ``layer_norm`` of that sum, after its rounding.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    if not torch.compiler.is_compiling():
        _check("add_layer_norm", x, weight, bias)
        if delta.shape != x.shape:
            raise ValueError(
                f"add_layer_norm wants delta in the shape of x, got {tuple(delta.shape)}, {tuple(x.shape)}"
            )
    if _served(x, weight, bias) and type(delta) is Tensor and delta.dtype in KERNEL_DTYPES and delta.device == x.device:
        dtype = torch.promote_types(autocast_dtype(x), autocast_dtype(delta))
        return autograd.add_layer_norm(x, delta, weight, bias, eps, dtype)
    total = x + delta
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)
