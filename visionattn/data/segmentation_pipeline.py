"""From a source of images with masks to reproducible batches."""

import torch

from visionattn.data.pipeline import Batch, Samples
from visionattn.data.randomness import seeded
from visionattn.data.segmentation import Sample, SegmentationSource
from visionattn.data.segmentation_transforms import SegmentationTransform


class SegmentationSamples(Samples):
    """``Samples`` of images with masks.

    A transform that mixes two images gets the second one from the same source, drawn under the same seed.

    Args:
        source: Images with masks.
        transform: What is done with a sample.
        seed: Seed of the run.
        on_error: As for ``Samples``.
        replace: As for ``Samples``.

    Raises:
        ValueError: As ``Samples``.
    """

    source: SegmentationSource
    transform: SegmentationTransform

    def _sample(self, i: int, seed: int, skipped: list[str]) -> Batch:
        sample = self.source[i]
        with seeded(seed):
            return self.transform(sample, self._partner(skipped) if self.transform.mixes else None)

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
        ``image [B, C, h, w]``, ``mask [B, h, w]`` and the lists ``name``, ``group``,
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
    tensors = {key: torch.stack([item[key] for item in kept]) for key in ("image", "mask") if kept}
    return dict(
        **(tensors or {key: torch.empty(0) for key in ("image", "mask")}),
        **{key: [item[key] for item in kept] for key in ("name", "group", "spacing")},
        skipped=[note for item in items for note in item["skipped"]],
    )
