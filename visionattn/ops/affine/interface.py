"""Public operators of channel factors: check the arguments, pick an implementation, nothing else."""

import torch
from torch import Tensor

from visionattn.ops._dispatch import KERNEL_DTYPES, launches, result_dtype
from visionattn.ops.affine import autograd, reference


def _served(x: Tensor, y: Tensor, *parameters: Tensor) -> bool:
    if not launches(x) or x.numel() == 0 or x.dtype not in KERNEL_DTYPES:
        return False
    if type(y) is not Tensor or y.dtype not in KERNEL_DTYPES or y.device != x.device:
        return False
    dtype = parameters[0].dtype
    return dtype in KERNEL_DTYPES and all(p.dtype == dtype and p.device == x.device for p in parameters)


def affine_add(
    x: Tensor, weight: Tensor, bias: Tensor, delta: Tensor, keep: Tensor | None = None, gain: float = 1.0
) -> Tensor:
    """Scale the channels of the main path, and add a branch of which stochastic depth may drop images.

    Args:
        x: ``[B, ..., C]``, any float dtype; channels-last maps and slices of wider ones go in as they are.
        weight: Factors, ``[C]``.
        bias: Offsets, ``[C]``.
        delta: Shape of ``x``.
        keep: ``[B]``, 1 for images whose ``delta`` is kept and 0 for others; all are without it.
        gain: Factor on what is kept.

    Returns:
        ``x * weight + bias + delta * keep * gain``. The kernels (float32, float16 and bfloat16 on a GPU) compute in
        float32, round once and give a contiguous result, under autocast in its dtype: PyTorch gives float32 there
        because the factors are. Elsewhere it is what PyTorch gives.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    if not torch.compiler.is_compiling() and (
        x.dim() < 2
        or weight.shape != x.shape[-1:]
        or bias.shape != weight.shape
        or delta.shape != x.shape
        or (keep is not None and keep.shape != x.shape[:1])
    ):
        given = [None if t is None else tuple(t.shape) for t in (x, delta, weight, bias, keep)]
        raise ValueError(f"affine_add wants x and delta [B, ..., C], weight and bias [C] and keep [B], got {given}")
    if _served(x, delta, weight, bias) and (keep is None or (keep.dtype in KERNEL_DTYPES and keep.device == x.device)):
        dtype = result_dtype(x, delta, weight, bias)
        return autograd.affine(x, delta, weight, bias, None, None, keep, gain, dtype)
    return reference.affine_add(x, weight, bias, delta, keep, gain)


def affine_join(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor, y_bias: Tensor) -> Tensor:
    """Update the last channels of a map by another one, both scaled.

    Args:
        x: ``[..., C + K]``, any float dtype.
        y: ``[..., K]``.
        weight: Factors of the last channels of ``x``, ``[K]``.
        bias: Their offsets, ``[K]``.
        y_weight: Factors of ``y``, ``[K]``.
        y_bias: Its offsets, ``[K]``.

    Returns:
        The first ``C`` channels of ``x``, and behind them ``x * weight + bias + y * y_weight + y_bias``; dtype as
        ``affine_add`` gives it.

    Raises:
        ValueError: Shapes that do not fit together.
    """
    if not torch.compiler.is_compiling():
        K, fits = y.shape[-1:], x.dim() == y.dim() > 0 and x.shape[:-1] == y.shape[:-1] and x.shape[-1] >= y.shape[-1]
        if not fits or not weight.shape == bias.shape == y_weight.shape == y_bias.shape == K:
            given = [tuple(t.shape) for t in (x, y, weight, bias, y_weight, y_bias)]
            raise ValueError(f"affine_join wants x [..., C + K], y [..., K] and four parameters [K], got {given}")
    if _served(x, y, weight, bias, y_weight, y_bias) and y.numel() > 0:
        dtype = result_dtype(x, y, weight)
        return autograd.affine(x, y, weight, bias, y_weight, y_bias, None, 1.0, dtype)
    return reference.affine_join(x, y, weight, bias, y_weight, y_bias)
