"""Neighbourhood attention as a module."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionattn.layers.channels_last import project
from visionattn.ops import crop, neighborhood_attention, pad_to_at_least
from visionattn.ops.neighborhood.packed import packed_attention


@register_notrace_module  # a leaf for torch.fx: the operators' argument checks are not traceable
class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every pixel to the window around it, with a relative position bias.

    A map that is smaller than ``kernel_size * dilation`` is padded with zeros at the bottom and right before the
    projection. As in the published module these pixels are ordinary ones that carry the projection's bias and are
    attended to; the output is cropped.

    Args:
        dim: Channels ``C``.
        num_heads: Attention heads; must divide ``dim``.
        kernel_size: Side of the window, odd.
        dilation: Distance between the neighbouring pixels of a window.
        qkv_bias: With biases in the input projection.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, H, W, C]``, any ``H`` and ``W``.
        returns: ``[B, H, W, C]``.

    Raises:
        ValueError: Heads that do not divide the channels, an even kernel, or a dilation below 1.

    Reference: NAT, arXiv:2204.07143, and DiNAT, arXiv:2209.15001.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        qkv_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, for example {kernel_size + 1}")
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, side, side, device=device, dtype=dtype))
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width, span = x.shape[1], x.shape[2], self.kernel_size * self.dilation
        x = pad_to_at_least(x, span, span)
        B, H, W, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        out = None if torch.jit.is_scripting() else self._packed(qkv)
        if out is None:
            qkv = qkv.view(B, H, W, 3, self.num_heads, C // self.num_heads)
            q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
            out = neighborhood_attention(q, k, v, self.kernel_size, self.dilation, self.rpb).view(B, H, W, C)
        out = crop(out, height, width)
        return self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)

    @torch.jit.unused
    def _packed(self, qkv: Tensor) -> Tensor | None:
        """Attention with one gradient for the whole projection, where that is open."""
        sides = [self.kernel_size] * 2, [self.dilation] * 2
        scale = float(qkv.shape[3] // (3 * self.num_heads)) ** -0.5
        return packed_attention(qkv, self.rpb, self.num_heads, *sides, scale)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"
