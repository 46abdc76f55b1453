"""From a source of questions to reproducible batches."""

from collections.abc import Sequence
from typing import Any

import torch

from visionattn.data.grounding import GroundingSource, Question
from visionattn.data.pipeline import Batch
from visionattn.data.randomness import seeded
from visionattn.data.segmentation_pipeline import SegmentationSamples, collate_samples
from visionattn.data.segmentation_transforms import SegmentationTransform

_SIDES = frozenset({"left", "right", "leftmost", "rightmost", "clockwise", "counterclockwise"})


class GroundingTransform:
    """A question's image resized whole, since a crop could cut the answer off, and in training perhaps mirrored.

    Returns what ``SegmentationTransform`` gives, and ``question`` and ``answer``. When evaluating, masks keep their
    size.

    Args:
        size: Side of the resized image, or ``[height, width]``, in pixels.
        mean: Mean of each channel in [0, 1]; by default ImageNet's, for grey images 0.5.
        std: Standard deviation of each channel; by default ImageNet's, for grey images 0.5.
        flip: Probability of mirroring left and right in training; never where the question speaks of left or right.
        train: Augment; otherwise prepare for evaluation.

    Raises:
        ValueError: A size below 1 or a probability outside [0, 1].
    """

    mixes = False

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flip: float = 0.5,
        train: bool = True,
    ):
        if not 0 <= flip <= 1:
            raise ValueError(f"flip={flip} is a probability and must be in [0, 1]")
        self.resize = SegmentationTransform("none", size, mean, std, train)
        self.flip, self.train = flip, train

    def __call__(self, sample: Question) -> dict[str, Any]:
        result = self.resize(sample)
        words = set(sample.question.lower().replace("?", " ").replace("-", " ").split())
        if self.train and not words & _SIDES and float(torch.rand(())) < self.flip:
            result = {**result, "image": result["image"].flip(-1), "mask": result["mask"].flip(-1)}
        return dict(**result, question=sample.question, answer=sample.answer)


class GroundingSamples(SegmentationSamples):
    """``Samples`` of questions; arguments as there."""

    source: GroundingSource
    transform: GroundingTransform

    def _sample(self, i: int, seed: int, skipped: list[str]) -> Batch:
        sample = self.source[i]
        with seeded(seed):
            return dict(**self.transform(sample), number=i)


def collate_questions(items: list[Batch]) -> Batch:
    """As ``collate_samples``, and the lists ``question``, ``answer`` and ``number`` (of the question in its source).

    Masks of several sizes cannot be joined: evaluate those with ``data.val_batch_size=1``.

    Raises:
        ValueError: The samples differ in size.
    """
    kept = [item for item in items if "image" in item]
    sizes = {tuple(item["mask"].shape) for item in kept}
    if len(sizes) > 1:
        raise ValueError(f"a batch holds masks of the sizes {sorted(sizes)}; set data.val_batch_size=1")
    return collate_samples(items) | {key: [item[key] for item in kept] for key in ("question", "answer", "number")}
