"""Samples with masks to batches: random crops and flips in training, whole images otherwise."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from visionattn.data.pipeline import ON_ERROR, Batch
from visionattn.data.randomness import seed_from, seeded
from visionattn.data.segmentation import IGNORE, Sample, SegmentationSource


class SegmentationTransform:
    """Sample to a dict: image float32 ``[C, h, w]``, mask int64 ``[h, w]``, field, name, group, spacing.

    Args:
        recipe: ``"default"``: random crops and flips; ``"none"``: whole images.
        size: Side of a training crop, pixels.
        mean: Mean of each channel in [0, 1]; by default 0.5.
        std: Standard deviation of each channel; by default 0.5.
        train: Augment.

    Raises:
        ValueError: An unknown recipe, a size below 1, or a training sample without mask.
    """

    def __init__(self, recipe: str = "default", size: int = 224, mean: Any = None, std: Any = None, train: bool = True):
        if recipe not in ("default", "none"):
            raise ValueError(f"recipe={recipe!r} must be default or none")
        if size < 1:
            raise ValueError(f"size={size} must be at least 1 pixel")
        self.recipe, self.size, self.mean, self.std, self.train = recipe, size, mean, std, train

    def __call__(self, sample: Sample) -> Batch:
        pixels = torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1))).float()
        if sample.image.dtype != np.float32:
            pixels = pixels / float(np.iinfo(sample.image.dtype).max)
        mean, std = (torch.tensor(v if v is not None else [0.5])[:, None, None] for v in (self.mean, self.std))
        image = (pixels - mean) / std
        if sample.mask is None and self.train:
            raise ValueError(f"{sample.name} has no mask; a training sample needs one")
        mask = np.full(sample.image.shape[:2], IGNORE) if sample.mask is None else sample.mask
        mask = torch.from_numpy(mask.astype(np.int64))
        field = torch.ones_like(mask, dtype=torch.bool)
        if sample.field is not None:
            field = torch.from_numpy(sample.field)
        if self.train and self.recipe == "default":
            image, mask, field = self._crop(image, mask, field)
        else:
            mask = mask.masked_fill(~field, IGNORE)
        spacing = None if self.train else sample.spacing
        return dict(image=image, mask=mask, field=field, name=sample.name, group=sample.group, spacing=spacing)

    def _crop(self, image: torch.Tensor, mask: torch.Tensor, field: torch.Tensor) -> tuple[torch.Tensor, ...]:
        down, right = (max(self.size - side, 0) for side in mask.shape)
        image, field = F.pad(image, (0, right, 0, down)), F.pad(field, (0, right, 0, down))
        mask = F.pad(mask, (0, right, 0, down), value=IGNORE)
        top, left = (int(torch.randint(side - self.size + 1, ())) for side in mask.shape)
        parts = [x[..., top : top + self.size, left : left + self.size] for x in (image, mask, field)]
        axes = [axis for axis in (-1, -2) if torch.rand(()) < 0.5]
        return tuple(x.flip(axes) for x in parts)


class SegmentationSamples(Dataset):
    """Transformed samples, each under generators seeded by its key ``(epoch, position, i)``.

    Args:
        source: Images with masks.
        transform: What is done with a sample.
        seed: Seed of the run.
        on_error: What an unreadable sample does: ``"raise"`` or ``"skip"``.
        replace: Whether the next readable sample replaces a skipped one.

    Raises:
        ValueError: Another ``on_error``; from iteration, an unreadable sample with ``"raise"``.
    """

    def __init__(
        self,
        source: SegmentationSource,
        transform: SegmentationTransform,
        seed: int = 0,
        on_error: str = "raise",
        replace: bool = True,
    ):
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error={on_error!r} must be one of {', '.join(ON_ERROR)}")
        self.source, self.transform, self.seed, self.on_error, self.replace = source, transform, seed, on_error, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, i = key
        skipped: list[str] = []
        for step in range(len(self) if self.replace else 1):
            try:
                sample = self.source[(i + step) % len(self)]
                with seeded(seed_from(self.seed, epoch, position)):
                    return dict(**self.transform(sample), skipped=skipped)
            except (ValueError, FileNotFoundError) as error:
                if self.on_error == "raise":
                    raise ValueError(f"{error} (or set data.on_error=skip)") from error
                skipped.append(str(error))
        if self.replace:
            raise ValueError(f"none of the {len(self)} samples can be read; the first error: {skipped[0]}")
        return dict(skipped=skipped)


def collate_samples(items: list[Batch]) -> Batch:
    """Join samples of one size; tensors of no element where every sample was skipped."""
    kept = [item for item in items if "image" in item]
    tensors = {k: torch.stack([x[k] for x in kept]) if kept else torch.empty(0) for k in ("image", "mask", "field")}
    lists = {key: [item[key] for item in kept] for key in ("name", "group", "spacing")}
    return dict(**tensors, **lists, skipped=[note for item in items for note in item["skipped"]])
