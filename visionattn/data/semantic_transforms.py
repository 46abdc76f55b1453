"""Augmentation of scenes: crops in which no class takes nearly all, and photometric distortion.

The recipe of mmsegmentation for ADE20K, Cityscapes and COCO-Stuff (github.com/open-mmlab/mmsegmentation), on
``torchvision.transforms.v2``. Departures: the crop is cut out of the original image and then resized, which draws the
same boxes up to rounding and never holds an image of 4096 x 2048 pixels; saturation is blended with grey.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from visionattn.data.segmentation import IGNORE, Sample

_LONGEST = 4  # the long side is at most that many times the wanted short side
_TRIES = 10


def fitted(height: int, width: int, short_side: float) -> tuple[int, int]:
    """Height and width with that short side, or less where the long side would be more than four times as long."""
    factor = min(short_side / min(height, width), _LONGEST * short_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def random_crop(
    sample: Sample, size: Sequence[int], short_side: int | None, scale: Sequence[float], cat_max_ratio: float
) -> tuple[Sample, list[int]]:
    """A random part of a sample that, resized, is a crop of the randomly scaled image.

    Args:
        sample: With a mask.
        size: Height and width of the crop, pixels.
        short_side: Short side of the image at scale 1; None: its own.
        scale: Least and largest scale.
        cat_max_ratio: Another box is drawn, up to ten times, while one class takes that share of the crop's counted
            pixels or more; 1 takes the first box.

    Returns:
        The part at its original resolution, and height and width to resize it to: ``size``, or less where the scaled
        image is smaller.
    """
    assert sample.mask is not None
    height, width = sample.mask.shape
    factor = scale[0] + (scale[1] - scale[0]) * float(torch.rand(()))
    tall, wide = fitted(height, width, (short_side or min(height, width)) * factor)
    sides = [min(size[0], tall), min(size[1], wide)]
    steps = height / tall, width / wide  # original pixels of a pixel
    for _ in range(_TRIES + 1):
        spans = []
        for whole, scaled, side, step in zip((height, width), (tall, wide), sides, steps, strict=True):
            length = min(max(round(side * step), 1), whole)
            first = round(int(torch.randint(scaled - side + 1, ())) * step)
            spans.append(slice(min(first, whole - length), min(first, whole - length) + length))
        mask = sample.mask[spans[0], spans[1]]
        counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]
        if cat_max_ratio >= 1 or counts.max() < cat_max_ratio * counts.sum():
            break
    return dataclasses.replace(sample, image=sample.image[spans[0], spans[1]], mask=mask, field=None), sides


class PhotometricDistortion(nn.Module):
    """Each with probability 1/2: brightness by +- 32/255, contrast and saturation by U(0.5, 1.5), hue by +- 18 degrees.

    Contrast is changed first or, with probability 1/2, last. As in SSD (Liu et al., ECCV 2016, arXiv:1512.02325).

    Shape:
        image: ``[C, H, W]`` in [0, 1]; values beyond are cut off. Saturation and hue of grey images stay.
    """

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        chance, draws = torch.rand(5).tolist(), (2 * torch.rand(4) - 1).tolist()
        x = image.as_subclass(Tensor)
        if chance[0] < 0.5:
            x = (x + draws[0] * 32 / 255).clamp(0, 1)
        contrast, last = chance[1] < 0.5, chance[4] < 0.5
        if contrast and not last:
            x = (x * (1 + draws[1] / 2)).clamp(0, 1)
        if chance[2] < 0.5:
            x = F.adjust_saturation(x, 1 + draws[2] / 2)
        if chance[3] < 0.5:
            x = F.adjust_hue(x, draws[3] * 18 / 360)
        if contrast and last:
            x = (x * (1 + draws[1] / 2)).clamp(0, 1)
        return tv_tensors.Image(x), mask


def padded(image: Tensor, mask: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both completed at the bottom and right to ``size``: a normalised image with 0, the mask with ``IGNORE``."""
    down, right = size[0] - image.shape[-2], size[1] - image.shape[-1]
    if not down and not right:
        return image, mask
    pad = (0, right, 0, down)
    return nn.functional.pad(image, pad), nn.functional.pad(mask, pad, value=IGNORE)
