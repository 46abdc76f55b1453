"""Guided filter whose local linear model is weighted by an attention map.

The filter of FSG-Net (arXiv:2501.18921; code ZombaSY/FSG-Net-pytorch, ``models/backbones/FSGNet.py``), after the
guided filter of He, Sun and Tang and its fast form (arXiv:1505.00996): coefficients of ``output = K * guide + O`` are
fitted on small maps, smoothed, enlarged and applied to the large guide.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import channels_innermost
from visionattn.ops import depthwise_conv

_TINY = 1e-12  # keeps a window whose attention is zero from dividing by zero
_SCOPES = ("image", "batch")


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of ``[B, C, h, w]`` to ``[B, C, *size]``, corners on corners (``align_corners``)."""
    return x if (x.shape[2], x.shape[3]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over the window of ``2 * radius + 1`` pixels a side, clipped at the border.

    The window of a border pixel holds fewer pixels and the mean is of those, so dividing box sums by the number of
    pixels is part of it. Rows and columns are averaged in turn: the number of pixels of a clipped window is a product
    too, so the result is the same with ``2 * (2 * radius + 1)`` reads in place of ``(2 * radius + 1) ** 2``.

    Args:
        x: ``[B, C, H, W]``.
        radius: Pixels on each side of the middle.

    Returns:
        ``[B, C, H, W]``.
    """
    side = 2 * radius + 1
    if x.dtype == torch.float32 and channels_innermost(x):
        return window_sum(x, side) / window_pixels(x, radius)
    if x.is_cuda:  # PyTorch before 2.14 gives padded pools of channels-last maps a wrong gradient there (its #188344)
        x = x.clone(memory_format=torch.contiguous_format)
    x = F.avg_pool2d(x, (side, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, side), 1, (0, radius), count_include_pad=False)


def window_sum(x: Tensor, side: int) -> Tensor:
    """Sum over windows of ``side`` pixels, odd, of ``[B, C, H, W]`` with zeros around, by the kernels."""
    with torch.autocast(x.device.type, enabled=False):
        ones = x.new_ones(x.shape[1], 1, side, side)
        return depthwise_conv(x.permute(0, 2, 3, 1), ones).permute(0, 3, 1, 2)


def window_pixels(x: Tensor, radius: int) -> Tensor:
    """Pixels of each clipped window, ``[1, 1, H, W]``."""
    sides = []
    for length in (x.shape[2], x.shape[3]):
        at = torch.arange(length, device=x.device)
        ends = (at + radius).clamp(max=length - 1) - (at - radius).clamp(min=0) + 1
        sides.append(ends.to(x.dtype))
    return (sides[0][:, None] * sides[1])[None, None]


@register_notrace_module  # a leaf for torch.fx: it looks at sizes
class AttentionGuidedFilter(nn.Module):
    """Attention-guided filter: what ``coarse`` says, with the edges of ``guide``.

    With ``a = |A| + 1e-12``, ``t = a / sum(a)``, ``m(.)`` the mean of a clipped window and ``N`` its pixels, for the
    small guide ``L`` and the coarse map ``Y``::

        K = (m(a^2 L Y) - N m(t a L) m(a Y)) / (|m(a^2 L^2) - N m(t a L) m(a L)| + eps)
        O = (m(a Y) - K m(a L)) / m(a)
        F = resize(m(K)) * G + resize(m(O))

    The published code sums ``a`` over the whole batch (``per="batch"``), so what it says of one image depends on the
    others beside it. ``per="image"`` sums over each image alone; the two agree for one image.

    The published code computes in float64 whatever it is given. With ``dtype=None`` this module does so too for float32
    and float64 inputs outside autocast; under autocast, for half-precision inputs, in ONNX and where a device has no
    float64 it computes in float32, never lower. ``docs/fsgnet.md`` states the error of float32.

    Args:
        radius: Pixels on each side of a window's middle, r in the paper.
        eps: Regularisation of the slope.
        per: ``"image"`` or ``"batch"``.
        dtype: Precision inside, ``torch.float32`` or ``torch.float64``; None as above.

    Shape:
        guide: ``G``, ``[B, C, H, W]``.
        small_guide: ``L``, ``[B, C, h, w]``, both sides above ``2 * radius + 1``.
        coarse: ``Y``, ``[B, C, h, w]``.
        attention: ``A``, ``[B, 1, h, w]``.
        returns: ``[B, C, H, W]``, dtype of ``guide``.

    Raises:
        ValueError: Arguments outside the ranges above, maps too small for the window, or shapes that do not fit.
    """

    def __init__(self, radius: int = 2, eps: float = 0.01, per: str = "image", dtype: torch.dtype | None = None):
        super().__init__()
        if radius < 1:
            raise ValueError(f"radius={radius} must be at least 1")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be above 0, for a window of constant colour divides by it")
        if per not in _SCOPES:
            raise ValueError(f"per={per!r} must be one of {_SCOPES}: what the attention is normalised over")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype={dtype}: the filter computes in torch.float32 or torch.float64; None chooses")
        self.radius, self.eps, self.per, self.dtype = radius, eps, per, dtype

    def forward(self, guide: Tensor, small_guide: Tensor, coarse: Tensor, attention: Tensor) -> Tensor:
        self._check(guide, small_guide, coarse, attention)
        dtype = self.dtype or self._precision(guide)
        slope, offset = self._coefficients(small_guide.to(dtype), coarse.to(dtype), attention.to(dtype))
        size = guide.shape[2], guide.shape[3]
        # the sum stays in this precision too: slope * guide and offset often nearly cancel
        return torch.addcmul(resize(offset, size), resize(slope, size), guide.to(dtype)).to(guide.dtype)

    def _coefficients(self, guide: Tensor, coarse: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Smoothed slope and offset of the small maps."""
        a = attention.abs() + _TINY
        total = a.sum() if self.per == "batch" else a.sum(dim=(1, 2, 3), keepdim=True)
        weighted = a * guide
        weighted_coarse = a * coarse
        maps = weighted, weighted_coarse, a * weighted, weighted * weighted_coarse, weighted.square()
        means = box_mean(torch.cat(maps, dim=1), self.radius).chunk(len(maps), dim=1)
        mean_guide, mean_coarse, share, covariance, variance = means
        # t a L = (a / total) (a L); the number of pixels of a window joins the factor, both having one channel
        share = share * (window_pixels(a, self.radius) / total)
        covariance = torch.addcmul(covariance, share, mean_coarse, value=-1)
        variance = torch.addcmul(variance, share, mean_guide, value=-1)
        slope = covariance / (variance.abs() + self.eps)
        offset = torch.addcmul(mean_coarse, slope, mean_guide, value=-1) / box_mean(a, self.radius)
        slope, offset = box_mean(torch.cat((slope, offset), dim=1), self.radius).chunk(2, dim=1)
        return slope, offset

    @staticmethod
    def _precision(x: Tensor) -> torch.dtype:
        half = x.dtype in (torch.float16, torch.bfloat16)
        if half or torch.is_autocast_enabled(x.device.type) or x.device.type == "mps":
            return torch.float32
        if torch.onnx.is_in_onnx_export():  # ONNX Runtime pools and resizes no float64
            return torch.float32
        return torch.float64

    def _check(self, guide: Tensor, small_guide: Tensor, coarse: Tensor, attention: Tensor) -> None:
        B, C, h, w = small_guide.shape
        side = 2 * self.radius + 1
        if min(h, w) <= side:
            raise ValueError(f"the small maps are {h} x {w}: both sides must exceed the window of {side}; enlarge them")
        expected = {"coarse": ((B, C, h, w), coarse), "attention": ((B, 1, h, w), attention)}
        for name, (shape, tensor) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)} as small_guide has it")
        if tuple(guide.shape[:2]) != (B, C):
            raise ValueError(f"guide is {list(guide.shape)}, expected [{B}, {C}, H, W] as small_guide has it")

    def extra_repr(self) -> str:
        return f"radius={self.radius}, eps={self.eps}, per={self.per!r}, dtype={self.dtype}"
