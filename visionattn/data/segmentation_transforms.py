"""Augmentation of images together with their masks, on ``torchvision.transforms.v2``.

Recipes:

- ``default``: scaled by U(0.75, 1.33), crop, both flips, turns by 90 degrees, colour jitter, optionally elastic
  deformation. Structures keep about the size that they have when evaluating.
- ``fsgnet``: FSG-Net, the full-scale guided network for retinal vessels (arXiv 2501.18921,
  github.com/ZombaSY/FSG-Net-pytorch): cut-mix with another training image, each side scaled by U(0.5, 2), crop,
  flip, colour jitter, blur, perspective. Pixels that scaling or perspective bring in are black background, as there.
- ``herseg``: HER-Seg, efficient segmentation of medical images at 1024 x 1024 (arXiv 2504.06205,
  github.com/xq141839/HER-Seg): the whole image resized, flips with p = 0.1. It resizes when evaluating too.
- ``none``: the whole image resized, nothing random.
- ``semantic``: scenes, see ``semantic_transforms``: scaled by U(0.5, 2), crop in which no class takes three quarters,
  flip from left to right, photometric distortion. When evaluating, the short side of the image is resized.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.semantic_transforms import PhotometricDistortion, fitted, padded, random_crop

RECIPES = ("default", "fsgnet", "herseg", "none", "semantic")
INTENSITIES = ("range", "percentile")
_SIZES = {"default": 224, "fsgnet": 288, "herseg": 1024, "none": 224, "semantic": 512}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pair = tuple[tv_tensors.Image, tv_tensors.Mask]


def to_unit(pixels: np.ndarray, intensity: str = "range") -> Tensor:
    """Image as float32 ``[C, H, W]``; no depth is lost on the way.

    Args:
        pixels: ``[H, W, C]``, uint8, uint16 or float32.
        intensity: ``"range"``: divided by what its type can hold (255, 65535; floats stay as they are).
            ``"percentile"``: 1st and 99.8th percentile of the image become 0 and 1, values beyond are cut off.

    Raises:
        ValueError: Another type, or values that are not finite.
    """
    if pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"image has dtype {pixels.dtype}, expected uint8, uint16 or float32")
    values = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))
    if not bool(torch.isfinite(values).all()):
        raise ValueError("image has values that are not finite; repair or remove it")
    if intensity == "percentile":
        low, high = np.percentile(values.numpy(), (1, 99.8))
        return ((values - float(low)) / max(float(high - low), 1e-6)).clamp(0, 1)
    return values if pixels.dtype == np.float32 else values / float(np.iinfo(pixels.dtype).max)


class SegmentationTransform:
    """Sample to tensors.

    Returns a dict of ``image`` float32 ``[C, h, w]``, normalised; ``mask`` int64 ``[h, w]``; ``name``, ``group`` and
    ``spacing`` (millimetres per pixel of the mask when evaluating, None when training). When evaluating, the mask is
    ``IGNORE`` outside the field of view, and everywhere where the source has no truth; images keep their size but for
    the recipes that resize (``herseg``, ``none``, ``semantic`` with a ``short_side``), whose masks keep it:
    probabilities are to be enlarged to the mask. When training, what lies outside the field of view is background and
    is learnt as such.

    Args:
        recipe: One of ``RECIPES``.
        size: Side of training crops, or of the resized image, in pixels: one number or ``[height, width]``.
            None takes the recipe's: 224, 288 (fsgnet), 1024 (herseg), 512 (semantic).
        mean: Mean of each channel in [0, 1]; by default ImageNet's, for grey images 0.5.
        std: Standard deviation of each channel; by default ImageNet's, for grey images 0.5.
        train: Augment; otherwise prepare for evaluation.
        intensity: ``"range"`` or ``"percentile"``, see ``to_unit``.
        elastic: Probability of an elastic deformation in ``default``.
        short_side: Of ``semantic``: the image's short side when evaluating and, before it is scaled, when training;
            None: its own. The long side is at most four times as long.
        scale: Of ``semantic``: least and largest scale.
        cat_max_ratio: Of ``semantic``: share of a crop that one class should not reach.

    Raises:
        ValueError: An unknown recipe or intensity, a size below 1, a probability outside [0, 1],
            ``short_side`` with another recipe; from a call, a
            sample without mask when training, or a mean of another length than the channels.
    """

    def __init__(
        self,
        recipe: str = "default",
        size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train: bool = True,
        intensity: str = "range",
        elastic: float = 0.0,
        short_side: int | None = None,
        scale: Sequence[float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
    ):
        if recipe not in RECIPES:
            raise ValueError(f"recipe={recipe!r} must be one of {', '.join(RECIPES)}")
        if intensity not in INTENSITIES:
            raise ValueError(f"intensity={intensity!r} must be one of {', '.join(INTENSITIES)}")
        if not 0 <= elastic <= 1:
            raise ValueError(f"elastic={elastic} is a probability and must be in [0, 1]")
        if short_side is not None and (recipe != "semantic" or short_side < 1):
            raise ValueError(f"short_side={short_side} is for recipe='semantic', at least 1 pixel; got {recipe!r}")
        if not 0 < scale[0] <= scale[1] or not 0 < cat_max_ratio <= 1:
            raise ValueError(
                f"scale={list(scale)} must be two growing numbers above 0, cat_max_ratio={cat_max_ratio} lie in (0, 1]"
            )
        sides = _SIZES[recipe] if size is None else size
        self.size = [sides, sides] if isinstance(sides, int) else [int(side) for side in sides]
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size={size} must be a number of pixels or [height, width], at least 1")
        self.recipe, self.mean, self.std, self.train, self.intensity = recipe, mean, std, train, intensity
        self.short_side, self.scale, self.cat_max_ratio = short_side, tuple(scale), cat_max_ratio
        self.resizes = recipe in ("herseg", "none") or short_side is not None
        self.mixes = train and recipe == "fsgnet"
        self.augment = _augmentation(recipe, self.size, elastic) if train else v2.Identity()

    def __call__(self, sample: Sample, partner: Sample | None = None) -> dict[str, Any]:
        if self.train and sample.mask is None:
            raise ValueError(f"{sample.name} has no mask, so it cannot be trained on; choose another split")
        sides = self.size
        if self.train and self.recipe == "semantic":
            sample, sides = random_crop(sample, self.size, self.short_side, self.scale, self.cat_max_ratio)
        image, mask = self._pair(sample)
        if self.train:
            if self.mixes and partner is not None:
                image, mask = cut_mix((image, mask), self._pair(partner))
            if self.recipe == "fsgnet":
                image, mask = rescale_sides(image, mask)
            elif self.recipe == "default":
                image, mask = rescale_sides(image, mask, 1.0, (0.75, 1.33), together=True)
            elif self.recipe == "semantic":
                image, mask = v2.Resize(sides, antialias=True)(image, mask)
            image, mask = self.augment(image, mask)
        else:
            if sample.field is not None:
                field = torch.from_numpy(np.ascontiguousarray(sample.field, dtype=bool))
                mask = tv_tensors.Mask(torch.where(field, mask.as_subclass(Tensor), IGNORE))
            if self.resizes:
                sides = self.size if self.short_side is None else list(fitted(*image.shape[-2:], self.short_side))
                image = v2.Resize(sides, antialias=True)(image)
        pixels, labels = self._normalize(image.as_subclass(Tensor), sample.name), mask.as_subclass(Tensor)
        if self.train and self.recipe == "semantic":
            pixels, labels = padded(pixels, labels, self.size)
        return dict(
            image=pixels,
            mask=labels.contiguous(),
            name=sample.name,
            group=sample.group,
            spacing=None if self.train else sample.spacing,
        )

    def _pair(self, sample: Sample) -> Pair:
        try:
            image = tv_tensors.Image(to_unit(sample.image, self.intensity))
        except ValueError as error:
            raise ValueError(f"{sample.name}: {error}") from error
        labels = np.full(sample.image.shape[:2], IGNORE) if sample.mask is None else sample.mask
        return image, tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)))

    def statistics(self, chans: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation by which images of so many channels are normalised."""
        mean = list(self.mean if self.mean is not None else _MEAN if chans == 3 else [0.5] * chans)
        std = list(self.std if self.std is not None else _STD if chans == 3 else [0.5] * chans)
        return mean, std

    def _normalize(self, image: Tensor, name: str) -> Tensor:
        chans = image.shape[0]
        mean, std = self.statistics(chans)
        if {len(mean), len(std)} - {1, chans}:
            raise ValueError(
                f"{name} has {chans} channels, but mean has {len(mean)} and std {len(std)} values; "
                f"give 1 or {chans} of each in data.transform"
            )
        return F.normalize(image, mean * (chans // len(mean)), std * (chans // len(std)))


class QuarterTurns(nn.Module):
    """Turn by a random multiple of 90 degrees; a square crop keeps its size, another one turns by 0 or 180."""

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Pair:
        step = 1 if image.shape[-1] == image.shape[-2] else 2
        turns = step * int(torch.randint(4 // step, ()))
        return (
            tv_tensors.wrap(torch.rot90(image, turns, (-2, -1)), like=image),
            tv_tensors.wrap(torch.rot90(mask, turns, (-2, -1)), like=mask),
        )


def _augmentation(recipe: str, size: list[int], elastic: float) -> nn.Module:
    outside: Any = {tv_tensors.Image: 0.0, tv_tensors.Mask: IGNORE}
    if recipe == "default":
        steps: list[nn.Module] = [
            v2.RandomCrop(size, pad_if_needed=True, fill=outside),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            QuarterTurns(),
        ]
        if elastic:
            steps.append(v2.RandomApply([v2.ElasticTransform(alpha=50.0, sigma=5.0, fill=outside)], elastic))
        return v2.Compose([*steps, v2.RandomApply([Jitter(0.05)], 0.8)])
    if recipe == "semantic":
        return v2.Compose([v2.RandomHorizontalFlip(), PhotometricDistortion()])
    if recipe == "fsgnet":
        return v2.Compose(
            [
                v2.RandomCrop(size, pad_if_needed=True, fill=0),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([Jitter(0.1)], 0.8),
                v2.RandomApply([RandomBlur()], 0.5),
                v2.RandomPerspective(distortion_scale=0.5, p=0.3, fill=0),
            ]
        )
    resize = v2.Resize(size, antialias=True)
    return v2.Compose([resize, v2.RandomHorizontalFlip(0.1)]) if recipe == "herseg" else v2.Compose([resize])


class Jitter(nn.Module):
    """Brightness, contrast and saturation by up to 20 %, hue by up to ``hue``, of images of any range.

    torchvision cuts floats off at 0 and 1, so an image that goes beyond is brought into that range and back.
    """

    def __init__(self, hue: float):
        super().__init__()
        self.jitter = v2.ColorJitter(0.2, 0.2, 0.2, hue)

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Pair:
        low, high = min(float(image.min()), 0.0), max(float(image.max()), 1.0)
        unit = tv_tensors.Image((image.as_subclass(Tensor) - low) / (high - low))
        return tv_tensors.Image(self.jitter(unit).as_subclass(Tensor) * (high - low) + low), mask


class RandomBlur(nn.Module):
    """Gaussian blur of the image with an odd kernel of 3 to 11 pixels, shorter where the image is smaller."""

    def forward(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> Pair:
        side = 3 + 2 * int(torch.randint(5, ()))
        side = min(side, (min(image.shape[-2:]) - 1) // 2 * 2 + 1)
        return (F.gaussian_blur(image, [side, side]) if side > 1 else image), mask


def cut_mix(target: Pair, partner: Pair, p: float = 0.8) -> Pair:
    """With probability ``p``, put the same relative box of a second image and mask into the first ones.

    The box begins at U(0, 0.75) of height and width and is U(0.25, 0.75) of them long, cut off at the border.
    """
    draws = torch.rand(5).tolist()
    if draws[0] >= p:
        return target
    image, mask = target
    spans, sources = [], []
    for axis in (0, 1):
        begin = 0.75 * draws[1 + axis]
        end = min(begin + 0.25 + 0.5 * draws[3 + axis], 1.0)
        for sizes, into in ((image.shape[-2:], spans), (partner[0].shape[-2:], sources)):
            first = min(int(begin * sizes[axis]), sizes[axis] - 1)
            into.append(slice(first, max(int(end * sizes[axis]), first + 1)))
    patch = tv_tensors.Image(partner[0][:, sources[0], sources[1]])
    labels = tv_tensors.Mask(partner[1][None, sources[0], sources[1]])
    box = [spans[0].stop - spans[0].start, spans[1].stop - spans[1].start]
    image, mask = image.clone(), mask.clone()
    image[:, spans[0], spans[1]] = F.resize(patch, box, antialias=True)
    mask[spans[0], spans[1]] = F.resize(labels, box)[0]
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def rescale_sides(
    image: tv_tensors.Image,
    mask: tv_tensors.Mask,
    p: float = 0.8,
    span: tuple[float, float] = (0.5, 2.0),
    together: bool = False,
) -> Pair:
    """With probability ``p``, scale height and width each by its own U(span), or both by the same."""
    chance, *draws = torch.rand(3).tolist()
    if chance >= p:
        return image, mask
    scales = [span[0] + (span[1] - span[0]) * draw for draw in (draws[:1] * 2 if together else draws)]
    sides = [max(1, round(side * scale)) for side, scale in zip(image.shape[-2:], scales, strict=True)]
    return v2.Resize(sides, antialias=True)(image, mask)
