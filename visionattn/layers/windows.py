"""Attention in windows without overlap, and other small modules that several backbones share."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionattn.layers.channels_last import channels_innermost, project
from visionattn.ops import (
    crop,
    depthwise_conv,
    join_windows,
    neighborhood_attention,
    pad_to_multiple,
    split_windows,
)
from visionattn.ops._dispatch import use_triton
from visionattn.ops.neighborhood.packed import packed_attention


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """Softmax attention along the axis before the last; heads are slices of the channels, scale ``head_dim ** -0.5``.

    Args:
        query: ``[..., N, C]``.
        key: ``[..., M, C]``.
        value: ``[..., M, C]``.
        num_heads: Heads.

    Returns:
        ``[..., N, C]``.
    """
    # PyTorch has fused kernels for four axes only
    q, k, v = (x.flatten(0, -3).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(query.shape)


@register_notrace_module  # a leaf for torch.fx: the operators' argument checks are not traceable
class WindowAttention(nn.Module):
    """Multi-head attention within windows that do not overlap.

    The map is padded with zeros at the bottom and right until ``window_size`` divides it, before the projection: such
    pixels carry the projection's bias and are attended to. The output is cropped.

    Args:
        dim: Channels ``C``.
        num_heads: Attention heads; must divide ``dim``.
        window_size: Side of a window in pixels.
        qkv_bias: With biases in the input projection.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, H, W, C]``, any ``H`` and ``W``.
        returns: ``[B, H, W, C]``.

    Raises:
        ValueError: Heads that do not divide the channels, or a window below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        qkv_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads or window_size < 1:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}, and window_size={window_size} be positive")
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.window_size)
        B, H, W = x.shape[:3]
        if not torch.jit.is_scripting():  # noqa: SIM102 - what TorchScript must not see has to be a block of its own
            if use_triton(x):
                return project(self.proj, crop(self._in_place(x), height, width))
        q, k, v = self.qkv(split_windows(x, self.window_size)).chunk(3, dim=-1)
        out = join_windows(multi_head_attention(q, k, v, self.num_heads), self.window_size, B, H, W)
        return self.proj(crop(out, height, width))

    @torch.jit.unused
    def _in_place(self, x: Tensor) -> Tensor:
        """Attention by kernels that read windows where they lie in the map: no cutting, no joining."""
        side, (B, H, W, C) = self.window_size, x.shape
        qkv, head_dim = project(self.qkv, x), C // self.num_heads
        whole: tuple[list[int], list[int]] = ([side, side], [1, 1])
        out = packed_attention(qkv, None, self.num_heads, *whole, float(head_dim) ** -0.5, [side, side])
        if out is None:
            q, k, v = qkv.view(B, H, W, 3, self.num_heads, head_dim).unbind(3)
            out = neighborhood_attention(q, k, v, side, stride=side).view(B, H, W, C)
        return out

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"


class ResidualDepthwiseConv(nn.Conv2d):
    """A depthwise 3 x 3 convolution added to its input, ``[B, C, H, W]``: position from the zeros at the borders.

    Args:
        dim: Channels.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - what TorchScript must not see has to be a block of its own
            if channels_innermost(x):
                x = x.permute(0, 2, 3, 1)
                return depthwise_conv(x, self.weight, self.bias, x).permute(0, 3, 1, 2)
        return x + F.conv2d(x, self.weight, self.bias, padding=1, groups=self.groups)
