"""Dynamic convolution whose kernels come from the likeness of every pixel to the regions of a context map."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visionattn.layers.channels_last import MapSequential
from visionattn.ops import neighborhood_sum
from visionattn.ops.padding.interface import larger, smaller

REGIONS = 7  # per side of the context map


@torch.jit.unused
def _has_size(x: Tensor, height: int, width: int) -> bool:
    """Whether the size is known, without a guard on symbols."""
    return statically_known_true(x.shape[2] == height) and statically_known_true(x.shape[3] == width)


def _legal_size(height: int, width: int, side: int) -> tuple[int, int]:
    """The size itself, or the one of the same shape whose shorter side is ``side`` if that is larger."""
    if torch.jit.is_scripting():
        short = min(height, width)
        scaled = max(short, side)
    else:
        short = smaller(height, width)
        scaled = larger(short, side)
    return height * scaled // short, width * scaled // short


def _enlarge(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear; the operator itself, since ``F.interpolate`` asks more of sizes that are symbols."""
    if not torch.jit.is_scripting() and _has_size(x, height, width):
        return x
    return torch.ops.aten.upsample_bilinear2d(x, [height, width], False)


def _shrink(x: Tensor, height: int, width: int) -> Tensor:
    """Means of (nearly) equal parts; the operator itself, as above."""
    if not torch.jit.is_scripting() and _has_size(x, height, width):
        return x
    return torch.ops.aten._adaptive_avg_pool2d(x, [height, width])


@register_notrace_module  # a leaf for torch.fx: it computes with sizes
class ContextMixing(nn.Module):
    """Depthwise convolution of every pixel with kernels of its own, half the heads a small and half a large one.

    The scores of a pixel's query with the means of 7 x 7 regions of the context are mapped linearly to the logits of
    its kernels, which a table of relative positions is added to and a softmax normalises. Windows are moved inward at
    the borders.

    A map whose shorter side is below the large kernel is enlarged to that side, and the result averaged back; the
    longer side is rounded down to whole pixels.

    Args:
        dim: Channels ``C``.
        context_dim: Channels ``K`` of the context.
        num_heads: Kernels of each size are shared by the channels of ``2 * num_heads`` heads; ``4 * num_heads`` must
            divide ``dim``.
        kernel_size: Side of the large kernels, odd.
        small_kernel: Side of the small kernels, odd, at most ``kernel_size``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        value: ``[B, C, H, W]``, any ``H`` and ``W``.
        query: ``[B, C, H, W]``.
        context: ``[B, K, H, W]``.
        returns: ``[B, C, H, W]``.

    Raises:
        ValueError: Heads that do not divide the channels, or an even kernel.

    Reference: ContMix of OverLoCK, arXiv:2502.20087.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        kernel_size: int,
        small_kernel: int = 5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % (4 * num_heads):
            raise ValueError(f"num_heads={num_heads}: 4 * num_heads must divide dim={dim}")
        for side in (small_kernel, kernel_size):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"small_kernel={small_kernel} and kernel_size={kernel_size} must be odd")
        if small_kernel > kernel_size:
            raise ValueError(f"small_kernel={small_kernel} must be at most kernel_size={kernel_size}")
        self.groups, self.kernel_size, self.small_kernel = 2 * num_heads, kernel_size, small_kernel
        self.scale = (dim // self.groups) ** -0.5  # of all channels over the groups, though queries have half
        self.query = MapSequential(
            nn.Conv2d(dim, dim // 2, 1, bias=False, device=device, dtype=dtype),
            nn.BatchNorm2d(dim // 2, device=device, dtype=dtype),
        )
        self.key = MapSequential(
            nn.AdaptiveAvgPool2d(REGIONS),
            nn.Conv2d(context_dim, dim // 2, 1, bias=False, device=device, dtype=dtype),
            nn.BatchNorm2d(dim // 2, device=device, dtype=dtype),
        )
        self.taps = nn.Linear(REGIONS**2, small_kernel**2 + kernel_size**2, device=device, dtype=dtype)
        self.bias_small, self.bias_large = (
            nn.Parameter(torch.zeros(self.groups, 2 * side - 1, 2 * side - 1, device=device, dtype=dtype))
            for side in (small_kernel, kernel_size)
        )

    def forward(self, value: Tensor, query: Tensor, context: Tensor) -> Tensor:
        height, width = value.shape[2], value.shape[3]
        H, W = _legal_size(height, width, self.kernel_size)
        value, query, context = _enlarge(value, H, W), _enlarge(query, H, W), _enlarge(context, H, W)
        B, C, g = value.shape[0], value.shape[1], self.groups
        q = self.query(query).reshape(B * g, C // (2 * g), H * W)
        k = self.key(context).reshape(B * g, C // (2 * g), self.taps.in_features) * self.scale
        # Taps are linear in the scores, so keys can be mapped to taps before the product with the queries: that is a
        # third of the work, and logits come with the pixels innermost, as the operator reads them.
        mixed = nn.functional.linear(k, self.taps.weight).transpose(1, 2)  # [B*g, taps, C / 2g]
        logits = torch.baddbmm(self.taps.bias[:, None], mixed, q)
        out = neighborhood_sum(
            logits.reshape(B, g, self.taps.out_features, H, W).transpose(1, 2),
            value.permute(0, 2, 3, 1).reshape(B, H, W, 2 * g, C // (2 * g)),
            [self.small_kernel, self.kernel_size],
            [self.bias_small, self.bias_large],
        )
        out = out.flatten(3).permute(0, 3, 1, 2)
        return _shrink(out, height, width)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, kernel_size={self.kernel_size}, small_kernel={self.small_kernel}"
