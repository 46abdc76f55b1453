"""FSG-Net, a full-scale guided network for thin structures such as retinal vessels, and its decoder on any backbone.

Paper: arXiv:2501.18921 (its abstract was read). Code: ZombaSY/FSG-Net-pytorch, ``models/backbones/FSGNet.py``.
Departures: logits instead of probabilities; the filter normalises its attention per image unless told otherwise; an
output's 1x1 convolution runs before its enlargement, which commutes with it; DropBlock on maps below its block works.
``FSGNetDecoder`` is this package's own: the paper says that its guided half may follow other encoders, not how.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.heads._backbones import create_backbone
from visionattn.heads._published import fill, read_published
from visionattn.heads.guided_decoder import ConvNormAct, GuidedDecoder, PlainDecoder
from visionattn.layers.channels_last import channels_innermost, on_map
from visionattn.layers.guided_filter import resize, window_sum

Maps = tuple[list[Tensor], Tensor]


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


class DropBlock(nn.Module):
    """Drops squares of every channel in training.

    As published ``gamma = (1 - p) / block^2 * W^2 / (W - block + 1)^2`` is the chance that a pixel is the middle of a
    square: it takes ``1 - p`` where DropBlock (arXiv:1810.12890) takes ``p``, the same at 0.5, and the width for both
    sides. What stays is divided by its share. On maps smaller than the block, where the published code fails, the block
    shrinks.

    Args:
        p: Rate, in (0, 1).
        block_size: Side of a square, odd, pixels.

    Shape:
        x: ``[B, C, H, W]``; returns the same.
    """

    def __init__(self, p: float = 0.5, block_size: int = 7):
        super().__init__()
        if not 0 < p < 1 or block_size < 1 or block_size % 2 == 0:
            raise ValueError(f"p={p}, block_size={block_size}: p must lie in (0, 1), block_size be odd")
        self.p, self.block_size = p, block_size

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor(x) if self.training else x

    @torch.no_grad()
    def factor(self, x: Tensor) -> Tensor:
        """What ``x`` is multiplied by: 0 in dropped squares, elsewhere the reciprocal of the share that stays."""
        H, W = x.shape[2:]
        block = min(self.block_size, (min(H, W) - 1) // 2 * 2 + 1)
        rim = block // 2
        gamma = (1 - self.p) / block**2 * W**2 / (W - block + 1) ** 2
        seeds = torch.empty_like(x[:, :, rim : H - rim, rim : W - rim]).bernoulli_(min(gamma, 1.0))
        seeds = F.pad(seeds, (rim, rim, rim, rim))
        if channels_innermost(seeds):
            seeds = window_sum(seeds, block)
        else:  # a window without a seed has mean 0; the mean stores no indices, as a maximum would
            seeds = F.avg_pool2d(seeds, (block, 1), 1, (rim, 0))
            seeds = F.avg_pool2d(seeds, (1, block), 1, (0, rim))
        keep = seeds == 0
        # in float32: a half-precision count of many pixels is none; at least one pixel, or 0 / 0
        share = keep.mean(dtype=torch.float32).clamp(min=1 / keep.numel())
        return keep.to(x.dtype) / share

    def extra_repr(self) -> str:
        return f"p={self.p}, block_size={self.block_size}"


class Block(nn.Module):
    """``x + dropblock(gamma * mlp(BN(depthwise(x))))`` with 1x1 convolutions and ReLU; ``[B, C, H, W]`` to the same."""

    def __init__(self, dim: int, kernel_size: int = 3, drop: float = 0.5):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.conv1 = nn.Conv2d(dim, 4 * dim, 1)
        self.conv2 = nn.Conv2d(4 * dim, dim, 1)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.dropblock = DropBlock(drop) if drop else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        # our operators spare the bias a pass of its own; with gradients their calls cost the host more than that
        call = on_map if not torch.is_grad_enabled() else _call
        branch = call(self.conv2, call(self.conv1, self.norm(call(self.dwconv, x))).relu())
        # a factor in float32 would make autocast widen the whole map
        return torch.addcmul(x, self.dropblock(branch), self.gamma.to(branch.dtype)[:, None, None])


class FSGNetEncoder(nn.Module):
    """The published encoder: every scale also sees the image itself, resized.

    Args and raised errors as ``FSGNet``.

    Shape:
        x: ``[B, in_chans, H, W]``.
        returns: Skips ``[B, 2b, H, W]``, ``[B, 4b, H // 2, W // 2]``, ``[B, 8b, H // 4, W // 4]``, and the bottom
            ``[B, 8b, H // 8, W // 8]``.
    """

    def __init__(self, in_chans: int, base_c: int, depths: tuple[int, ...], kernel_size: int, drop: float):
        super().__init__()
        b = base_c

        def blocks(i: int, dim: int) -> list[nn.Module]:
            return [Block(dim, kernel_size, drop) for _ in range(depths[i])]

        self.input_layer = nn.Sequential(ConvNormAct(in_chans, b, kernel_size), *blocks(0, b))
        self.input_skip = nn.Sequential(ConvNormAct(in_chans, b, kernel_size))
        self.conv1 = ConvNormAct(in_chans, b)
        self.down_conv_2 = nn.Sequential(nn.Conv2d(2 * b, 2 * b, 2, stride=2), *blocks(1, 2 * b))
        self.conv2 = ConvNormAct(in_chans, 2 * b)
        self.down_conv_3 = nn.Sequential(nn.Conv2d(4 * b, 4 * b, 2, stride=2), *blocks(2, 4 * b))
        self.conv3 = ConvNormAct(in_chans, 4 * b)
        self.down_conv_4 = nn.Sequential(nn.Conv2d(8 * b, 8 * b, 2, stride=2), *blocks(3, 8 * b))

    def forward(self, x: Tensor) -> Maps:
        H, W = x.shape[2:]
        skip1 = torch.cat((self.conv1(x), self.input_layer(x) + self.input_skip(x)), dim=1)
        skip2 = torch.cat((self.conv2(resize(x, (H // 2, W // 2))), self.down_conv_2(skip1)), dim=1)
        skip3 = torch.cat((self.conv3(resize(x, (H // 4, W // 4))), self.down_conv_3(skip2)), dim=1)
        return [skip1, skip2, skip3], self.down_conv_4(skip3)


class BackboneEncoder(nn.Module):
    """Skips and bottom for the guided decoder from any timm backbone.

    At strides 1, 2 and 4 half of a skip's channels come from the image, as in FSG-Net (a 3x3 convolution of it,
    resized); the other half at stride 1 from a second 3x3 convolution, at strides 2 and 4 from a 1x1 convolution of the
    backbone's map of that stride. The bottom is the sum of 1x1 convolutions of all deeper maps. Maps of another size
    than wanted are resized; where a backbone begins at a larger stride its first map serves.

    Args:
        backbone: A name in timm.
        base_c: Channels b of the decoder.
        in_chans: Channels of the image.
        pretrained: Load the backbone's weights.
        **kwargs: For ``timm.create_model``.

    Shape:
        As ``FSGNetEncoder``.

    Raises:
        ValueError: timm has no such backbone.
    """

    def __init__(self, backbone: str, base_c: int, in_chans: int = 3, pretrained: bool = False, **kwargs: Any):
        super().__init__()
        network = create_backbone(backbone, pretrained=pretrained, features_only=True, in_chans=in_chans, **kwargs)
        self.backbone = network
        strides, dims = network.feature_info.reduction(), network.feature_info.channels()
        # for each stride the deepest map that is not coarser, or else the first
        self.sources = [max([i for i, s in enumerate(strides) if s <= stride], default=0) for stride in (2, 4)]
        self.deep = [i for i, stride in enumerate(strides) if stride >= 8] or [len(strides) - 1]
        b = base_c
        self.stem = nn.ModuleList([ConvNormAct(in_chans, dim) for dim in (b, 2 * b, 4 * b)])
        self.full = ConvNormAct(in_chans, b)
        self.lateral = nn.ModuleList(
            [ConvNormAct(dims[i], dim, 1) for i, dim in zip(self.sources, (2 * b, 4 * b), strict=True)]
        )
        self.bottom = nn.ModuleList([nn.Conv2d(dims[i], 8 * b, 1, bias=False) for i in self.deep])
        self.norm = nn.BatchNorm2d(8 * b)

    def forward(self, x: Tensor) -> Maps:
        H, W = x.shape[2:]
        maps = self.backbone(x)
        skips = [torch.cat((self.stem[0](x), self.full(x)), dim=1)]
        for stride, source, stem, lateral in zip((2, 4), self.sources, self.stem[1:], self.lateral, strict=True):
            size = H // stride, W // stride
            skips.append(torch.cat((stem(resize(x, size)), resize(lateral(maps[source]), size)), dim=1))
        size = H // 8, W // 8
        bottom = sum(resize(conv(maps[i]), size) for i, conv in zip(self.deep, self.bottom, strict=True))
        return skips, self.norm(bottom).relu()


class _VesselNet(nn.Module):
    """An encoder and a decoder, the check of sizes, and which outputs are returned."""

    encoder: nn.Module
    decoder: nn.Module
    min_size: int

    def forward(self, x: Tensor, all_scales: bool | None = None) -> Tensor | tuple[Tensor, ...]:
        if min(x.shape[2:]) < self.min_size:
            raise ValueError(
                f"the image is {x.shape[2]} x {x.shape[3]} pixels: {type(self).__name__} needs at least "
                f"{self.min_size} a side, for the filter's window must fit the map at stride 8; pad or enlarge it"
            )
        skips, bottom = self.encoder(x)
        return self.decoder(skips, bottom, self.training if all_scales is None else all_scales)


class FSGNet(_VesselNet):
    """FSG-Net, or with ``guided=False`` the published ablation without the guided module.

    Args:
        in_chans: Channels of the image.
        num_classes: Channels of every output.
        base_c: Channels at full scale, b.
        depths: Blocks at strides 1, 2, 4 and 8.
        guided: With the guided decoder.
        kernel_size: Of the blocks and the first convolutions, odd.
        drop: DropBlock's p; 0 for none.
        **kwargs: For ``GuidedDecoder``: ``radius``, ``eps``, ``per``, ``filter_dtype``, ``attention``.

    Shape:
        x: ``[B, in_chans, H, W]``, sides of at least 48 pixels (``8 * (2 * radius + 2)``; 8 for the ablation), not
            necessarily multiples of 8.
        returns: Logits ``[B, num_classes, H, W]``; in training, or with ``all_scales=True``, three of them, from scales
            1, 1/2 and 1/4.

    Raises:
        ValueError: Arguments outside the ranges above, or an image that is too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        base_c: int = 64,
        depths: tuple[int, int, int, int] = (3, 3, 9, 3),
        guided: bool = True,
        kernel_size: int = 3,
        drop: float = 0.5,
        **kwargs: Any,
    ):
        super().__init__()
        if len(depths) != 4 or kernel_size % 2 == 0 or base_c < 1:
            raise ValueError(
                f"base_c={base_c}, depths={depths}, kernel_size={kernel_size}: four depths, an odd kernel and at least "
                "one channel are needed"
            )
        if kwargs and not guided:
            raise ValueError(f"{sorted(kwargs)} are of the guided decoder; leave them out with guided=False")
        self.encoder = FSGNetEncoder(in_chans, base_c, tuple(depths), kernel_size, drop)
        self.decoder = GuidedDecoder(base_c, num_classes, **kwargs) if guided else PlainDecoder(base_c, num_classes)
        self.min_size = 8 * (2 * kwargs.get("radius", 2) + 2) if guided else 8

    def load_published(self, path: str | Path) -> None:
        """Load a checkpoint with the published names.

        Args:
            path: ``.pth`` or ``.safetensors``: a state dict, or under ``model_state_dict``, ``state_dict``, ``model``.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, holds more than tensors and plain values, or is of another network.
        """
        parts = {name for name, _ in self.decoder.named_children()}
        weights = {
            ("decoder." if key.split(".")[0] in parts else "encoder.") + key: tensor
            for key, tensor in read_published(path).items()
        }
        fill(self, weights, path, "base_c, depths and guided")


class FSGNetDecoder(_VesselNet):
    """FSG-Net's guided decoder on any timm backbone; see ``BackboneEncoder`` for how the two are joined.

    Args:
        backbone: A name in timm.
        num_classes: Channels of every output.
        in_chans: Channels of the image.
        base_c: Channels b of the decoder at full scale.
        pretrained: Load the backbone's weights.
        attention: ``"routed"``, ``"neighborhood"`` or None: a block of this attention at the bottom.
        radius: Of the filter, pixels.
        eps: Of the filter.
        per: What the filter normalises its attention over, ``"image"`` or ``"batch"``.
        filter_dtype: Precision of the filter, see ``AttentionGuidedFilter``.
        **kwargs: For ``timm.create_model``.

    Shape:
        As ``FSGNet``; a backbone may ask for larger images or for certain sizes.

    Raises:
        ValueError: As ``FSGNet``, or timm has no such backbone.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 1,
        in_chans: int = 3,
        base_c: int = 32,
        pretrained: bool = False,
        attention: str | None = None,
        radius: int = 2,
        eps: float = 0.01,
        per: str = "image",
        filter_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.decoder = GuidedDecoder(base_c, num_classes, radius, eps, per, filter_dtype, attention)
        self.encoder = BackboneEncoder(backbone, base_c, in_chans, pretrained, **kwargs)
        self.min_size = 8 * (2 * radius + 2)


def multiscale_dice_bce(outputs: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
    """FSG-Net's loss: the mean over the outputs of binary cross-entropy plus the Dice loss of the whole batch.

    ``BCE + 1 - (2 sum(p y) + 1) / (sum p + sum y + 1)``, ``p = sigmoid(logits)``, sums over the whole batch.

    Args:
        outputs: Logits ``[B, C, H, W]``, one or several.
        target: ``[B, C, H, W]`` or, for one channel, ``[B, H, W]``; 0 or 1, any dtype.

    Returns:
        A scalar, at least float32.

    Raises:
        ImportError: MONAI is not installed.
        ValueError: Shapes that do not fit.
    """
    try:
        from monai.losses import DiceLoss
    except ImportError as error:
        raise ImportError('FSG-Net\'s loss needs the package monai: pip install "visionattn[seg]"') from error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    target = target[:, None] if target.ndim == 3 else target
    if any(x.shape != target.shape for x in outputs):
        raise ValueError(f"target is {list(target.shape)}, expected the logits' shape {list(outputs[0].shape)}")
    dice = DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1, batch=True)
    total = target.new_zeros((), dtype=torch.float32)
    for x in outputs:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = total + dice(x, target.to(x.dtype)) + F.binary_cross_entropy_with_logits(x, target.to(x.dtype))
    return total / len(outputs)
