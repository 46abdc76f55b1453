"""From a source of images with masks to reproducible batches."""

from typing import Any

import torch
from torch.utils.data import Dataset

from visionattn.data.pipeline import ON_ERROR
from visionattn.data.randomness import seed_from, seeded
from visionattn.data.segmentation import Sample, SegmentationSource
from visionattn.data.segmentation_transforms import SegmentationTransform

Batch = dict[str, Any]


class SegmentationSamples(Dataset):
    """Transformed samples of a source, each under generators seeded by its key ``(epoch, position, i)``.

    Keys are those of ``visionattn.data.pipeline.EpochSampler``. A transform that mixes two images gets the second
    one from the same source, drawn under the same seed.

    Args:
        source: Images with masks.
        transform: What is done with a sample.
        seed: Seed of the run.
        on_error: What an unreadable sample does: ``"raise"``, or ``"skip"`` to report it and go on. A training set
            takes the next readable sample instead; an evaluation set leaves the sample out.
        replace: Whether a skipped sample is replaced.

    Raises:
        ValueError: Another ``on_error``; and from iteration, an unreadable sample with ``"raise"``.
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
        self.source, self.transform, self.seed = source, transform, seed
        self.on_error, self.replace = on_error, replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, i = key
        skipped: list[str] = []
        for step in range(len(self) if self.replace else 1):
            j = (i + step) % len(self)
            try:
                sample = self.source[j]
                with seeded(seed_from(self.seed, epoch, position)):
                    partner = self._partner(skipped) if self.transform.mixes else None
                    return dict(**self.transform(sample, partner), skipped=skipped)
            except (ValueError, FileNotFoundError) as error:
                if self.on_error == "raise":
                    raise ValueError(f"{error} (or set data.on_error=skip)") from error
                skipped.append(str(error))
        if self.replace:
            first = skipped[0] if skipped else "the source is empty"
            raise ValueError(f"none of the {len(self)} samples can be read; the first error: {first}")
        return dict(skipped=skipped)

    def _partner(self, skipped: list[str]) -> Sample | None:
        """A random second sample, the next readable one with ``on_error="skip"``."""
        first = int(torch.randint(len(self), ()))
        for step in range(len(self)):
            try:
                return self.source[(first + step) % len(self)]
            except (ValueError, FileNotFoundError) as error:
                if self.on_error == "raise":
                    raise
                skipped.append(str(error))
        return None


def collate_samples(items: list[Batch]) -> Batch:
    """Join samples of one size.

    Returns:
        ``image [B, C, h, w]``, ``mask [B, h, w]``, ``field [B, h, w]`` and the lists ``name``, ``group``,
        ``spacing`` and ``skipped``; empty tensors where every sample was skipped.

    Raises:
        ValueError: The samples differ in size.
    """
    kept = [item for item in items if "image" in item]
    sizes = {tuple(item["image"].shape) for item in kept}
    if len(sizes) > 1:
        example = {tuple(item["image"].shape): item["name"] for item in kept}
        raise ValueError(
            f"a batch holds images of {len(sizes)} shapes, for example {example}; "
            "evaluate whole images with data.val_batch_size=1, or of one size"
        )
    tensors = {key: torch.stack([item[key] for item in kept]) for key in ("image", "mask", "field") if kept}
    return dict(
        **(tensors or {key: torch.empty(0) for key in ("image", "mask", "field")}),
        **{key: [item[key] for item in kept] for key in ("name", "group", "spacing")},
        skipped=[note for item in items for note in item["skipped"]],
    )
