"""Metrics of answer grounding, per question and as means with intervals."""

import math
from typing import Any

from torch import Tensor

from visionattn.tasks.segmentation_metrics import confusion, from_counts, interval

LEVELS = (0.25, 0.5, 0.75)
"""A question counts as answered at these IoUs."""
OTHERS = ("pointing", "iou_shuffled", "iou_whole_image", "iou_all_objects", "iou_random_object")


def iou(prediction: Tensor, truth: Tensor) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    value = from_counts(*confusion(prediction, truth))["iou"]
    return 1.0 if math.isnan(value) else value


def question_metrics(probability: Tensor, truth: Tensor) -> dict[str, float]:
    """Metrics of one question.

    ``iou`` of the pixels above one half; ``pointing``: whether the most probable pixel (the first of several) lies in
    the truth, NaN where that is empty.

    Args:
        probability: ``[H, W]`` in [0, 1].
        truth: ``[H, W]``, 0 or 1.

    Raises:
        ValueError: Shapes that differ.
    """
    if probability.shape != truth.shape or truth.dim() != 2:
        raise ValueError(
            f"expected a probability and a truth [H, W], got {list(probability.shape)}, {list(truth.shape)}"
        )
    true = truth == 1
    hit = float(true.flatten()[probability.flatten().argmax()]) if bool(true.any()) else math.nan
    return dict(iou=iou(probability > 0.5, true), pointing=hit, area=float(true.float().mean()))


def summarize(rows: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Means over questions with 95 % bootstrap intervals, drawing whole images.

    Args:
        rows: Of ``question_metrics``, with ``group`` (the image) and, for the exchanged question, ``iou_shuffled``.
        seed: Of the draws.

    Returns:
        ``questions``, ``images`` and for ``iou``, ``iou_at_0.25`` and so on and those of ``OTHERS`` that the rows have
        their ``mean`` (None if undefined), ``ci95`` and ``undefined`` (number of questions); with ``named`` in the rows
        ``iou_by_named``, mean and number of questions of each.

    Raises:
        ValueError: No rows.
    """
    if not rows:
        raise ValueError("there is no question with a truth to measure")
    groups = [row["group"] for row in rows]
    columns = {"iou": [row["iou"] for row in rows]}
    columns |= {f"iou_at_{level}": [float(row["iou"] >= level) for row in rows] for level in LEVELS}
    columns |= {key: [row[key] for row in rows] for key in OTHERS if key in rows[0]}
    result: dict[str, Any] = dict(questions=len(rows), images=len(set(groups)))
    if "named" in rows[0]:
        kinds = {
            kind: [row["iou"] for row in rows if row["named"] == kind] for kind in sorted({r["named"] for r in rows})
        }
        result["iou_by_named"] = {kind: dict(mean=sum(v) / len(v), questions=len(v)) for kind, v in kinds.items()}
    for name, values in columns.items():
        known = [value for value in values if not math.isnan(value)]
        mean = sum(known) / len(known) if known else None
        result[name] = dict(mean=mean, ci95=interval(values, groups, seed=seed), undefined=len(values) - len(known))
    return result
