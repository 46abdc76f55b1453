"""Bi-level routing attention as a module."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionattn.layers.channels_last import convolve, is_depthwise, project
from visionattn.ops import crop, pad_to_multiple, region_mean, routed_attention, topk_regions
from visionattn.ops.routing.packed import packed_attention


@register_notrace_module  # a leaf for torch.fx: the operators' argument checks are not traceable
class RoutingAttention(nn.Module):
    """Bi-level routing attention (BRA) with a local enhancement of the values.

    The map is cut into ``num_regions`` x ``num_regions`` regions. Mean query and mean key of the regions rank the key
    regions for every query region; its pixels then attend to all pixels of the best ``topk``. A depthwise convolution
    of the values is added. Routing is shared by all heads and carries no gradient.

    A map that ``num_regions`` does not divide is padded with zeros at the bottom and right before the projection.
    As in the published detection and segmentation models these pixels are ordinary ones: they carry the projection's
    bias, count in the region means and are attended to; the output is cropped.

    Args:
        dim: Channels ``C``.
        num_heads: Attention heads; must divide ``dim``.
        num_regions: Regions per side, S in the paper, ``n_win`` in its code.
        topk: Regions kept per query region, in ``[1, num_regions ** 2]``.
        lepe_kernel: Side of the depthwise kernel on the values, odd.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, H, W, C]``, any ``H`` and ``W``.
        returns: ``[B, H, W, C]``.

    Raises:
        ValueError: Arguments outside the ranges above.

    Reference: BiFormer, arXiv:2303.08810, section 3.2; code rayleizhu/BiFormer, ``ops/bra_legacy.py``. As in that code
        both scales are ``dim ** -0.5``, not ``head_dim ** -0.5``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_regions: int = 7,
        topk: int = 4,
        lepe_kernel: int = 5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if num_regions < 1 or not 1 <= topk <= num_regions**2:
            raise ValueError(
                f"topk={topk} must lie in [1, {num_regions**2}], num_regions={num_regions} squared; "
                "lower topk or raise num_regions"
            )
        if lepe_kernel % 2 == 0:
            raise ValueError(f"lepe_kernel={lepe_kernel} must be odd")
        self.num_heads = num_heads
        self.num_regions = num_regions
        self.topk = topk
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.lepe = nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        x = pad_to_multiple(x, self.num_regions)
        _, H, W, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        region = (H // self.num_regions, W // self.num_regions)
        # the ranking needs no scale: a positive factor changes no order
        q_mean, k_mean = region_mean(qkv[..., : 2 * C].detach(), region).chunk(2, dim=-1)
        index = topk_regions(q_mean, k_mean, self.topk)
        # the projection works pixel by pixel, so cropping first gives the same for less
        if torch.jit.is_scripting():
            out, v = self._attend(qkv, index, region)
            out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return self.proj(crop(out, height, width))
        return project(self.proj, crop(self._enhanced(qkv, index, region), height, width))

    def _attend(self, qkv: Tensor, index: Tensor, region: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Attention of a packed projection ``[B, H, W, 3 * C]``, and its values, both ``[B, H, W, C]``."""
        q, k, v = qkv.chunk(3, dim=-1)
        B, H, W, C = v.shape
        heads = (B, H, W, self.num_heads, C // self.num_heads)
        out, _ = routed_attention(q.view(heads), k.view(heads), v.view(heads), index, region, scale=self.scale)
        return out.view(B, H, W, C), v

    @torch.jit.unused
    def _enhanced(self, qkv: Tensor, index: Tensor, region: tuple[int, int]) -> Tensor:
        """Attention and the local enhancement of the values."""
        lepe = self.lepe
        if is_depthwise(lepe, qkv) and lepe.dilation == (1, 1):
            out = packed_attention(qkv, index, lepe.weight, lepe.bias, self.num_heads, region, self.scale)
            if out is not None:
                return out
        out, v = self._attend(qkv, index, region)
        return convolve(self.lepe, v, residual=out)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_regions={self.num_regions}, topk={self.topk}"
