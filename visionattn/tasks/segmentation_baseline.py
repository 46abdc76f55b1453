"""What one grey threshold achieves: the baseline that a network for masks must leave behind."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from visionattn.data.pipeline import Batch
from visionattn.data.segmentation import IGNORE
from visionattn.data.segmentation_pipeline import SegmentationSamples
from visionattn.tasks.segmentation_metrics import image_metrics, summarize

STEPS = 400  # thresholds between the darkest and the brightest pixel of the training split


def _grey(image: Tensor) -> Tensor:
    return image.float().mean(0)


def _readable(samples: SegmentationSamples) -> Iterator[Batch]:
    for i in range(len(samples)):
        item = samples[0, i, i]
        if "image" in item and bool((item["mask"] != IGNORE).any()):
            yield item


def choose_threshold(samples: SegmentationSamples) -> tuple[float, bool]:
    """The grey value, and whether the foreground is brighter, with the best Dice of all pixels.

    Args:
        samples: Images ``[C, H, W]``, whose mean over channels is the grey value, and binary masks ``[H, W]``.

    Raises:
        ValueError: No image has a truth, or all pixels are alike.
    """
    ends = [(float(grey.min()), float(grey.max())) for grey in (_grey(item["image"]) for item in _readable(samples))]
    low, high = min((a for a, _ in ends), default=0.0), max((b for _, b in ends), default=0.0)
    if not low < high:
        raise ValueError("baseline=true needs training images with a truth and more than one grey value")
    edges = np.linspace(low, high, STEPS + 1)
    counts = np.zeros((2, STEPS))
    for item in _readable(samples):
        grey = _grey(item["image"]).numpy()
        for k in range(2):
            counts[k] += np.histogram(grey[item["mask"].numpy() == k], edges)[0]
    above = counts[:, ::-1].cumsum(1)[:, ::-1]  # pixels at least as bright as the lower edge of each step
    sums = counts.sum(1, keepdims=True)
    best = (-1.0, low, True)
    for bright, found in ((True, above), (False, sums - above)):
        dice = 2 * found[1] / np.maximum(found.sum(0) + sums[1], 1)
        k = int(dice.argmax())
        best = max(best, (float(dice[k]), float(edges[k]), bright))
    return best[1], best[2]


def baseline(train: SegmentationSamples, samples: SegmentationSamples) -> dict[str, Any]:
    """One threshold from the training split, measured on ``samples``.

    Returns:
        ``threshold``, ``foreground`` ("brighter" or "darker"), ``dice``: mean over images, ``dice_of_all``: of one
        confusion matrix; None where it is undefined.

    Raises:
        ValueError: As ``choose_threshold``, or nothing to measure.
    """
    threshold, bright = choose_threshold(train)
    rows = []
    for item in _readable(samples):
        grey = _grey(item["image"])
        found = grey >= threshold if bright else grey < threshold
        row = image_metrics(found.float(), item["mask"], prediction=found)
        rows.append({"name": item["name"], "group": item["group"], **row})
    summary = summarize(rows)
    return dict(
        threshold=threshold,
        foreground="brighter" if bright else "darker",
        dice=summary["per_image"]["dice"]["mean"],
        dice_of_all=summary["per_set"]["dice"],
    )
