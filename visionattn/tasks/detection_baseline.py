"""What boxes that look at no image achieve: the baseline that a detector must leave behind."""

from collections import Counter
from typing import Any

import numpy as np

from visionattn.tasks.detection_metrics import NAMES, CocoScores


def baseline(train: Any, scores: CocoScores) -> dict[str, Any]:
    """A grid of boxes of each class's median size, the commonest classes first.

    Args:
        train: Source of the training split.
        scores: Of the detector, whose images are measured.

    Returns:
        ``NAMES`` of the boxes, and ``boxes``, their mean number an image.

    Raises:
        ValueError: The training split has no object.
    """
    sides: dict[int, list[np.ndarray]] = {}
    for i in range(len(train)):
        scene = train[i]
        for label, box in zip(scene.labels[~scene.crowd], scene.boxes[~scene.crowd], strict=True):
            sides.setdefault(int(label), []).append(box[2:] - box[:2])
    if not sides:
        raise ValueError("baseline=true needs training images with objects")
    sizes = {label: np.median(found, axis=0) for label, found in sides.items()}
    total = sum(map(len, sides.values()))
    shares = Counter({label: len(found) / total for label, found in sides.items()})
    other, count = CocoScores(scores.classes), 0
    for image, (truth, _) in scores.found.items():
        found = _grid(*truth["size"], sizes, shares)
        count += len(found["boxes"])
        other.found[image] = (truth, found)
    result = other.compute()["bbox"]
    return dict(**{name: result[name] for name in NAMES}, boxes=round(count / len(scores.found)))


def _grid(height: int, width: int, sizes: dict[int, np.ndarray], shares: Counter[int]) -> dict[str, Any]:
    """Boxes side by side that fill the image, at most 100, those in its middle and of the commonest class first."""
    rows = []
    for label, share in shares.most_common():
        w, h = (float(side) for side in sizes[label])
        for y in np.arange(0, max(height - h / 2, 1), h):
            for x in np.arange(0, max(width - w / 2, 1), w):
                off = abs((x + w / 2) / width - 0.5) + abs((y + h / 2) / height - 0.5)
                rows.append((share - off * 1e-6, label, [float(x), float(y), w, h]))
    rows = sorted(rows, key=lambda row: -row[0])[:100]
    return dict(boxes=[r[2] for r in rows], labels=[r[1] for r in rows], scores=[r[0] for r in rows])
