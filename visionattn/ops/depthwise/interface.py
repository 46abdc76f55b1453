"""Public depthwise convolution: checks the arguments, picks an implementation, nothing else."""

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, launches, use_reference, use_triton
from visionattn.ops.depthwise import eager, reference


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[0] != x.shape[3] or weight.shape[1] != 1:
        raise ValueError(
            "depthwise_conv wants x [B, H, W, C] and weight [C, 1, kh, kw], "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"depthwise_conv wants a kernel with odd sides, got {weight.shape[2]} x {weight.shape[3]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"depthwise_conv wants bias [{weight.shape[0]}], got {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"depthwise_conv wants residual in the shape of x, got {tuple(residual.shape)} and {tuple(x.shape)}"
        )
    device = x.device
    if (
        weight.device != device
        or (bias is not None and bias.device != device)
        or (residual is not None and residual.device != device)
    ):
        devices = {y.device for y in (x, weight, bias, residual) if y is not None}
        raise ValueError(f"depthwise_conv wants all tensors on one device, got {sorted(map(str, devices))}")


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, dilation: int = 1
) -> Tensor:
    """Depthwise convolution of a channels-last map with zero padding, plus a bias and a residual.

    Args:
        x: Map, ``[B, H, W, C]``, any float dtype; any strides, so slices of a packed projection go in as they are.
        weight: ``[C, 1, kh, kw]``, the parameter of a depthwise ``nn.Conv2d``, with odd sides; its dtype may be another
            than that of ``x`` where a kernel runs.
        bias: ``[C]``.
        residual: Added to the result, shape of ``x``, any strides; it may be ``x`` itself.
        dilation: Distance of the kernel's values on the map, in both directions.

    Returns:
        ``[B, H, W, C]`` in the dtype of ``x`` (under autocast its dtype), promoted with that of the residual. The
        kernels (float32, float16 and bfloat16 on a GPU, sides up to 19) sum in float32, round once and give a
        contiguous map.

    Raises:
        ValueError: Shapes that do not fit together, or an even side of the kernel, or a dilation below 1.
    """
    if torch.compiler.is_compiling():
        if not use_reference() and use_triton(x) and eager.serves(x, weight, bias, residual):
            return torch.ops.visionattn.depthwise_conv(x.to(autocast_dtype(x)), weight, bias, residual, dilation)
        return reference.depthwise_conv(x, weight, bias, residual, dilation)
    _check(x, weight, bias, residual)
    if dilation < 1:
        raise ValueError(f"depthwise_conv wants a dilation of at least 1, got {dilation}")
    if launches(x) and eager.serves(x, weight, bias, residual) and x.numel() > 0:
        return eager.direct(x.to(autocast_dtype(x)), weight, bias, residual, dilation)
    return reference.depthwise_conv(x, weight, bias, residual, dilation)
