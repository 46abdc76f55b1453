"""Patches whose pixels are sampled at learned positions."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn


@register_notrace_module  # a leaf for torch.fx: the forward computes with sizes
class DeformablePatches(nn.Conv2d):
    """A deformable convolution over patches that do not overlap.

    A convolution of the input gives two offsets, rows first, for each pixel of a patch. The pixel is then read at its
    displaced position, bilinear between its neighbours, and zero outside the map.

    With a stride as large as the kernel every pixel belongs to one patch. So it is an ordinary convolution of the map
    with its pixels displaced, which needs no operator beyond PyTorch's own: it is faster on CPUs than
    ``torchvision.ops.deform_conv2d``, has every dtype, and is known to ONNX. Results are the same; gradients too, but
    for offsets that lead to whole positions: the derivative jumps there, and rounding decides about the side.

    Args:
        in_dim: Channels of the map.
        dim: Channels of the patches.
        side: Side of a patch in pixels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, in_dim, H, W]``; rows and columns that fill no patch are dropped.
        returns: ``[B, dim, H // side, W // side]``.

    Raises:
        ValueError: A map smaller than a patch.

    Reference: Deformable Convolutional Networks, arXiv:1703.06211.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        side: int = 2,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_dim, dim, side, stride=side, device=device, dtype=dtype)
        self.side = side
        self.conv_offset = nn.Conv2d(in_dim, 2 * side * side, side, stride=side, device=device, dtype=dtype)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        height, width, side = x.shape[2], x.shape[3], self.side
        if height < side or width < side:
            raise ValueError(f"a map of {height}x{width} holds no patch of {side}x{side}; use a larger image")
        precise = torch.promote_types(x.dtype, torch.float32)  # bfloat16 knows no fractions of large positions
        offset = self.conv_offset(x).to(precise).unflatten(1, (side * side, 2)).transpose(1, 2).flatten(1, 2)
        offset = F.pixel_shuffle(offset, side)  # [B, (row, column), H', W'] with H', W' multiples of side
        row = torch.arange(offset.shape[2], device=x.device, dtype=precise).unsqueeze(1) + offset[:, 0]
        column = torch.arange(offset.shape[3], device=x.device, dtype=precise) + offset[:, 1]
        # without aligned corners -1 and 1 are the outer edges of the map, so pixels lie at odd multiples of 1 / size
        grid = torch.stack(((2 * column + 1) / width - 1, (2 * row + 1) / height - 1), dim=-1)
        displaced = F.grid_sample(x.to(precise), grid, padding_mode="zeros", align_corners=False)
        return F.conv2d(displaced.to(x.dtype), self.weight, self.bias, stride=self.stride)
