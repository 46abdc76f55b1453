"""The guided decoder of FSG-Net for any maps at strides 1, 2, 4 and 8, and the parts that its encoder shares.

Paper: arXiv:2501.18921. Code: ZombaSY/FSG-Net-pytorch, ``models/backbones/FSGNet.py``. Modules have the
published names.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionattn.heads.bottleneck import BottleneckAttention
from visionattn.layers.guided_filter import AttentionGuidedFilter, resize


def half_size(x: Tensor) -> tuple[int, int]:
    """Height and width of a map halved and rounded down."""
    return x.shape[2] // 2, x.shape[3] // 2


class ConvNormAct(nn.Module):
    """Convolution, batch norm, ReLU; ``[B, in_chans, H, W]`` to ``[B, dim, H, W]``."""

    def __init__(self, in_chans: int, dim: int, kernel_size: int = 3):
        super().__init__()
        convolution = nn.Conv2d(in_chans, dim, kernel_size, padding=kernel_size // 2)
        self.conv = nn.Sequential(convolution, nn.BatchNorm2d(dim), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SpatialAttention(nn.Module):
    """``sigmoid(conv7x7([mean over channels, maximum over channels])) * x`` of ``[B, C, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        return self.conv(stacked).sigmoid() * x


class CrossAttention(nn.Module):
    """One-channel attention of a fine map, gated by the coarse map that was decoded before it.

    ``sigmoid(BN(conv(ReLU(BN(conv(fine)) + resize(BN(conv(coarse)))))))``, all convolutions 1x1.

    Shape:
        fine: ``[B, C, h, w]``.
        coarse: ``[B, C, h', w']``.
        returns: ``[B, 1, h, w]``.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.theta = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))
        self.phi = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))
        self.psi = nn.Sequential(nn.Conv2d(dim, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        size = fine.shape[2], fine.shape[3]
        return self.psi((self.theta(fine) + resize(self.phi(coarse), size)).relu())


class ResidualConv(nn.Module):
    """``[BN, ReLU, conv3x3, BN, ReLU, conv3x3](x) + [conv3x3, BN](x)``; ``[B, in_dim, H, W]`` to ``[B, dim, H, W]``."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.BatchNorm2d(in_dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_dim, dim, 3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(inplace=True),
            nn.Conv2d(dim, dim, 3, padding=1),
        )
        self.conv_skip = nn.Sequential(nn.Conv2d(in_dim, dim, 3, padding=1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_block(x) + self.conv_skip(x)


class _Decoder(nn.Module, ABC):
    """What the guided decoder and its ablation share: residual convolutions and the three output layers."""

    def __init__(self, base_c: int, num_classes: int):
        super().__init__()
        self.up_residual_conv3 = ResidualConv(8 * base_c, 4 * base_c)
        self.up_residual_conv2 = ResidualConv(4 * base_c, 2 * base_c)
        self.up_residual_conv1 = ResidualConv(2 * base_c, base_c)
        self.output_layer3 = nn.Sequential(nn.Conv2d(4 * base_c, num_classes, 1))
        self.output_layer2 = nn.Sequential(nn.Conv2d(2 * base_c, num_classes, 1))
        self.output_layer1 = nn.Sequential(nn.Conv2d(base_c, num_classes, 1))

    @abstractmethod
    def _decode(self, scale: int, skip: Tensor, full: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        """Full-scale map and decoded map of one scale, from those of the scale below."""

    def _begin(self, bottom: Tensor) -> Tensor:
        return bottom

    def forward(self, skips: Sequence[Tensor], bottom: Tensor, all_scales: bool) -> Tensor | tuple[Tensor, ...]:
        full = coarse = self._begin(bottom)
        size, outputs = (skips[0].shape[2], skips[0].shape[3]), []
        for scale in (3, 2, 1):
            full, coarse = self._decode(scale, skips[scale - 1], full, coarse)
            if all_scales or scale == 1:
                # a 1x1 convolution and bilinear resizing commute, and the convolution leaves far fewer channels
                outputs.append(resize(self.get_submodule(f"output_layer{scale}")(coarse), size))
        return tuple(reversed(outputs)) if all_scales else outputs[-1]


class PlainDecoder(_Decoder):
    """The published ablation without the guided module: resizing and residual convolutions, no skips.

    Args and shapes as ``GuidedDecoder``; of the skips only the sizes are used.
    """

    def _decode(self, scale: int, skip: Tensor, full: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        full = resize(coarse, (skip.shape[2], skip.shape[3]))
        return full, self.get_submodule(f"up_residual_conv{scale}")(full)


class GuidedDecoder(_Decoder):
    """The full-scale guided decoder.

    At every scale s = 3, 2, 1 with skip ``d_s``, full-scale map ``P`` and coarse map ``Y`` (at first both the bottom)::

        G = ReLU(BN(conv1x1([d_s, resize(P)]))),  L = resize(G) to half of its size
        A = CrossAttention(L, Y),  F = AttentionGuidedFilter(G, L, Y, A),  U_s = ResidualConv(F)
        P, Y = G, U_s for the next scale

    Args:
        base_c: Channels b; the skips have 2b, 4b and 8b, the bottom 8b.
        num_classes: Channels of every output.
        radius: Of the filter, pixels.
        eps: Of the filter.
        per: What the filter normalises its attention over, ``"image"`` or (published) ``"batch"``.
        filter_dtype: Precision of the filter, see ``AttentionGuidedFilter``.
        attention: ``"routed"`` or ``"neighborhood"``: a block of the zoo's own attention at the bottom, before the
            spatial attention; None (published) for none.

    Shape:
        skips: ``[B, 2b, H, W]``, ``[B, 4b, H // 2, W // 2]``, ``[B, 8b, H // 4, W // 4]``.
        bottom: ``[B, 8b, H // 8, W // 8]``.
        returns: Logits ``[B, num_classes, H, W]``; with ``all_scales`` three of them, of scales 1, 1/2 and 1/4.
    """

    def __init__(
        self,
        base_c: int = 64,
        num_classes: int = 1,
        radius: int = 2,
        eps: float = 0.01,
        per: str = "image",
        filter_dtype: torch.dtype | None = None,
        attention: str | None = None,
    ):
        super().__init__(base_c, num_classes)
        b = base_c
        self.bottleneck = nn.Identity() if attention is None else BottleneckAttention(8 * b, attention)
        self.attn = SpatialAttention()
        self.conv_cat_3 = ConvNormAct(16 * b, 8 * b, 1)
        self.conv_cat_2 = ConvNormAct(12 * b, 4 * b, 1)
        self.conv_cat_1 = ConvNormAct(6 * b, 2 * b, 1)
        for scale, dim in ((3, 8 * b), (2, 4 * b), (1, 2 * b)):
            self.add_module(f"attention_block{scale}", CrossAttention(dim))
            self.add_module(f"guided_filter_{scale}", AttentionGuidedFilter(radius, eps, per, filter_dtype))

    def _begin(self, bottom: Tensor) -> Tensor:
        return self.attn(self.bottleneck(bottom))

    def _decode(self, scale: int, skip: Tensor, full: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        full = resize(full, (skip.shape[2], skip.shape[3]))
        guide = self.get_submodule(f"conv_cat_{scale}")(torch.cat((skip, full), dim=1))
        small = resize(guide, half_size(guide))
        attention = self.get_submodule(f"attention_block{scale}")(small, coarse)
        filtered = self.get_submodule(f"guided_filter_{scale}")(guide, small, coarse, attention)
        return guide, self.get_submodule(f"up_residual_conv{scale}")(filtered)
