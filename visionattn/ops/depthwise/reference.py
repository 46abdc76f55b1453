"""Depthwise convolution in PyTorch's own operators."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dilation: int = 1
) -> Tensor:
    """``[B, H, W, C]`` with a kernel ``[C, 1, kh, kw]`` to the same shape."""
    padding = (weight.shape[2] // 2 * dilation, weight.shape[3] // 2 * dilation)
    x = x.permute(0, 3, 1, 2)
    out = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0]).permute(0, 2, 3, 1)
    return out if residual is None else residual + out
