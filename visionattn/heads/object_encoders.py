"""Features of the objects of a scene: a small CNN on crops as published, or any timm backbone on crops or image."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from visionattn.heads._backbones import create_backbone


class Scenes(NamedTuple):
    """A batch of scenes with up to N objects.

    Args:
        image: Crops ``[B, N, C, h, w]`` or whole images ``[B, C, H, W]``, whichever the network takes.
        boxes: ``[B, N, 4]``: x1, y1, x2, y2 in pixels of ``image``; only read for whole images.
        places: ``[B, N, 2]``: row and column of each object, whole numbers on a grid, else between them.
        target: ``[B]``, the object looked for, -1 for none.
        mask: ``[B, N]`` bool, False for objects that only fill up the batch, which stand last.
    """

    image: Tensor
    boxes: Tensor
    places: Tensor
    target: Tensor
    mask: Tensor


class CropCNN(nn.Module):
    """OAT's encoder of crops: two convolutions and a linear layer.

    Args:
        dim: Channels of the result.
        in_chans: Channels of the crops.
        crop: Height and width of the crops, pixels; of no account with ``spp``.
        spp: 0 for the published pooling, or 2, 3, 4: spatial pyramid pooling with that many levels of 1, 2, 4, 8
            cells a side, for crops of any size.

    Shape:
        x: ``[K, in_chans, h, w]``; returns ``[K, dim]``.

    Raises:
        ValueError: Another ``spp``, or crops too small for the pooling.
    """

    def __init__(self, dim: int = 256, in_chans: int = 3, crop: tuple[int, int] = (150, 93), spp: int = 0):
        super().__init__()
        if spp not in (0, 2, 3, 4):
            raise ValueError(f"spp={spp} must be 0, 2, 3 or 4")
        sides = [((side - 4) // 5 - 2) // 3 for side in crop]
        if not spp and min(sides) < 1:
            raise ValueError(f"crop={tuple(crop)} is too small for the published pooling, 29 pixels a side; set spp=2")
        if spp and min(crop) < 19:
            raise ValueError(f"crop={tuple(crop)} is too small for the convolutions, 19 pixels a side are needed")
        self.levels = tuple(2**i for i in range(spp))
        self.cnn1 = nn.Sequential(nn.Conv2d(in_chans, 16, 5), nn.ReLU(), nn.MaxPool2d(5))
        self.cnn2 = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Identity() if spp else nn.MaxPool2d(3))
        cells = sum(n * n for n in self.levels) if spp else sides[0] * sides[1]
        self.fc = nn.Linear(32 * cells, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn2(self.cnn1(x))
        if self.levels:
            x = torch.cat([F.adaptive_max_pool2d(x, n).flatten(1) for n in self.levels], 1)
        return self.fc(x.flatten(1))


class _Backbone(nn.Module):
    """A timm classifier without its classes, and a linear layer; ``[K, C, h, w]`` to ``[K, dim]``."""

    def __init__(self, backbone: str, dim: int, in_chans: int, **kwargs: Any):
        super().__init__()
        self.backbone = create_backbone(backbone, num_classes=0, in_chans=in_chans, **kwargs)
        self.fc = nn.Linear(self.backbone.num_features, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


class CropFeatures(nn.Module):
    """Features of crops; begin, end and padding have the features of a crop of ones, as published.

    Args:
        encoder: ``[K, C, h, w]`` to ``[K, dim]``.

    Shape:
        Scenes with crops to features ``[B, N, dim]``, zero outside the mask, and the blank feature ``[dim]``.

    Raises:
        ValueError: Whole images.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        if scenes.image.dim() != 5:
            raise ValueError(
                f"the network takes crops [B, N, C, h, w], got {list(scenes.image.shape)}; set objects='image'"
            )
        crops = scenes.image[scenes.mask]
        found = self.encoder(torch.cat([crops, torch.ones_like(scenes.image[:1, 0])]))
        features = found.new_zeros(*scenes.mask.shape, found.shape[-1])
        features[scenes.mask] = found[:-1]
        return features, found[-1]


class ImageFeatures(nn.Module):
    """One pass of a backbone over the image, its map read in every box by ``roi_align``, and a linear layer.

    Args:
        backbone: A name in timm.
        dim: Channels of the result.
        in_chans: Channels of the image.
        level: Which of the backbone's maps, -1 the deepest.
        cells: Cells a side of each box.
        **kwargs: For ``timm.create_model``.

    Shape:
        Scenes with images to features ``[B, N, dim]``, zero outside the mask, and the blank feature ``[dim]``, learned.

    Raises:
        ValueError: Crops, or timm knows no such backbone.
    """

    def __init__(self, backbone: str, dim: int, in_chans: int = 3, level: int = -1, cells: int = 2, **kwargs: Any):
        super().__init__()
        self.backbone = create_backbone(backbone, features_only=True, in_chans=in_chans, **kwargs)
        self.level, self.cells = level, cells
        self.stride = self.backbone.feature_info.reduction()[level]
        self.fc = nn.Linear(self.backbone.feature_info.channels()[level] * cells**2, dim)
        self.blank = nn.Parameter(torch.randn(dim) * 0.02)

    def forward(self, scenes: Scenes) -> tuple[Tensor, Tensor]:
        if scenes.image.dim() != 4:
            raise ValueError(
                f"the network takes images [B, C, H, W], got {list(scenes.image.shape)}; set objects='crops' for crops"
            )
        maps = self.backbone(scenes.image)[self.level]
        boxes = [box[inside].to(maps.dtype) for box, inside in zip(scenes.boxes, scenes.mask, strict=True)]
        regions = roi_align(maps, boxes, self.cells, 1 / self.stride, sampling_ratio=2, aligned=True)
        found = self.fc(regions.flatten(1))
        features = found.new_zeros(*scenes.mask.shape, found.shape[-1])
        features[scenes.mask] = found
        return features, self.blank.to(found.dtype)


def object_features(
    objects: str, backbone: str | None, dim: int, in_chans: int, crop: tuple[int, int], spp: int, kwargs: dict[str, Any]
) -> nn.Module:
    """The encoder of objects by name.

    Args:
        objects: ``"crops"`` or ``"image"``.
        backbone: A name in timm; None with crops: the published CNN.
        dim: Channels of the features.
        in_chans: Channels of the image.
        crop: For ``CropCNN``.
        spp: For ``CropCNN``.
        kwargs: For the backbone, and ``level`` and ``cells`` of ``ImageFeatures``.

    Raises:
        ValueError: Another name, images without a backbone, or arguments of a backbone without one.
    """
    if objects == "crops" and backbone is None:
        if kwargs:
            raise ValueError(f"backbone_kwargs={kwargs} need a backbone; set backbone to a name in timm")
        return CropFeatures(CropCNN(dim, in_chans, crop, spp))
    if objects == "crops":
        return CropFeatures(_Backbone(str(backbone), dim, in_chans, **kwargs))
    if objects == "image" and backbone is not None:
        return ImageFeatures(backbone, dim, in_chans, **kwargs)
    raise ValueError(
        f"objects={objects!r}, backbone={backbone!r}: expected objects='crops', or 'image' with a backbone"
    )
