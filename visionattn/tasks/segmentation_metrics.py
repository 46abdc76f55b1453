"""Metrics of masks, per image and per set, with confidence intervals.

Counts come from torchmetrics' confusion matrix, AUC from torchmetrics, distances from MONAI. A metric that has no
value (an empty mask, a single class) is NaN; tables leave it out and say how often. clDice: Shit et al., CVPR 2021,
arXiv:2003.07311.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from skimage.morphology import skeletonize
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_confusion_matrix

from visionattn.data.segmentation import IGNORE
from visionattn.tasks.config import write_text

COUNTED = ("dice", "iou", "f1", "sensitivity", "specificity", "accuracy", "mcc")
METRICS = (*COUNTED, "auc", "cldice", "hd95", "surface_dice")
"""Every metric of an image; the first seven also exist for one confusion matrix of a whole set."""


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def from_counts(tp: float, fp: float, fn: float, tn: float) -> dict[str, float]:
    """Metrics of one confusion matrix; NaN where the denominator is 0.

    ``dice = f1 = 2 TP / (2 TP + FP + FN)``, ``iou = TP / (TP + FP + FN)``, ``sensitivity = TP / (TP + FN)``,
    ``specificity = TN / (TN + FP)``, ``accuracy = (TP + TN) / all``,
    ``mcc = (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))``.
    """
    dice = _ratio(2 * tp, 2 * tp + fp + fn)
    return dict(
        dice=dice,
        iou=_ratio(tp, tp + fp + fn),
        f1=dice,
        sensitivity=_ratio(tp, tp + fn),
        specificity=_ratio(tn, tn + fp),
        accuracy=_ratio(tp + tn, tp + fp + fn + tn),
        mcc=_ratio(tp * tn - fp * fn, math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))),
    )


def confusion(prediction: Tensor, truth: Tensor) -> tuple[int, int, int, int]:
    """TP, FP, FN, TN of two bool tensors of one shape."""
    (tn, fp), (fn, tp) = binary_confusion_matrix(prediction.flatten().int(), truth.flatten().int()).tolist()
    return tp, fp, fn, tn


def cl_dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Harmonic mean of the shares of either mask's skeleton inside the other mask ``[H, W]``; NaN without skeleton."""
    lines, true_lines = skeletonize(prediction), skeletonize(truth)
    precision = _ratio(float((lines & truth).sum()), float(lines.sum()))
    recall = _ratio(float((true_lines & prediction).sum()), float(true_lines.sum()))
    if math.isnan(precision + recall):
        return math.nan
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def image_metrics(
    probability: Tensor,
    truth: Tensor,
    threshold: float = 0.5,
    spacing: tuple[float, float] | None = None,
    tolerance: float = 2.0,
    prediction: Tensor | None = None,
) -> dict[str, Any]:
    """Metrics of one image for one foreground class.

    Args:
        probability: ``[H, W]`` in [0, 1].
        truth: ``[H, W]``, 0, 1 or ``IGNORE``; no metric counts the latter, distances take them as background.
        threshold: A pixel is foreground above it.
        spacing: Millimetres from row to row and from column to column; without it distances are in pixels.
        tolerance: Of the surface Dice, in the unit of the distances.
        prediction: ``[H, W]`` bool instead of the threshold (the most probable class of several).

    Returns:
        ``METRICS``, the counts ``tp``, ``fp``, ``fn``, ``tn`` and ``unit`` ("mm" or "px") of the distances.

    Raises:
        ValueError: Shapes that differ, other labels, or a threshold outside (0, 1).
    """
    if probability.shape != truth.shape or probability.dim() != 2:
        raise ValueError(
            f"metrics want probability and truth [H, W], got {list(probability.shape)}, {list(truth.shape)}"
        )
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} must lie between 0 and 1")
    inside = truth != IGNORE
    if bool(((truth != 0) & (truth != 1) & inside).any()):
        raise ValueError(f"truth has labels {truth.unique().tolist()}, expected 0, 1 and {IGNORE}")
    predicted = (probability > threshold if prediction is None else prediction) & inside
    true = (truth == 1) & inside
    tp, fp, fn, tn = confusion(predicted[inside], true[inside])
    both = tp + fn > 0 and fp + tn > 0
    result: dict[str, Any] = dict(**from_counts(tp, fp, fn, tn), auc=math.nan, hd95=math.nan, surface_dice=math.nan)
    if both:
        # in float64, since ties between float32 probabilities near 1 cost AUC its last digits
        result["auc"] = float(binary_auroc(probability[inside].double(), true[inside].int()))
    result["cldice"] = cl_dice(predicted.cpu().numpy(), true.cpu().numpy())
    if tp + fp and tp + fn:
        pair = predicted[None, None].float(), true[None, None].float()
        sides = list(spacing) if spacing else None
        result["hd95"] = float(compute_hausdorff_distance(*pair, percentile=95, spacing=sides))
        result["surface_dice"] = float(compute_surface_dice(*pair, class_thresholds=[tolerance], spacing=sides))
    return dict(**result, tp=tp, fp=fp, fn=fn, tn=tn, unit="mm" if spacing else "px")


def interval(
    values: Sequence[float], groups: Sequence[str], rounds: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean, drawing whole groups (patients) with replacement.

    None with fewer than two groups that have a value.
    """
    sums: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if not math.isnan(value):
            entry = sums.setdefault(group, [0.0, 0.0])
            entry[0] += value
            entry[1] += 1
    if len(sums) < 2:
        return None
    table = np.array(list(sums.values()))
    drawn = table[np.random.default_rng(seed).integers(len(table), size=(rounds, len(table)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return float(low), float(high)


def summarize(rows: list[dict[str, Any]], rounds: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over images with intervals, and the metrics of one confusion matrix.

    Args:
        rows: Of ``image_metrics`` for one class, each with ``name`` and ``group``.
        rounds: Bootstrap draws.
        seed: Of the draws.

    Returns:
        ``images``; ``unit``; ``per_image``: for each metric its ``mean`` (None if undefined everywhere), ``ci95``,
        ``defined`` and ``undefined`` (numbers of images); ``per_set``: metrics of the summed counts.

    Raises:
        ValueError: No rows, or distances in pixels in some and in millimetres in others.
    """
    if not rows:
        raise ValueError("there is no image with a truth to measure")
    units = {row["unit"] for row in rows}
    if len(units) > 1:
        raise ValueError("some images have a spacing and others none; distances in mm and px cannot be averaged")
    per_image = {}
    for name in METRICS:
        values = [float(row[name]) for row in rows]
        known = [value for value in values if not math.isnan(value)]
        per_image[name] = dict(
            mean=sum(known) / len(known) if known else None,
            ci95=interval(values, [row["group"] for row in rows], rounds, seed),
            defined=len(known),
            undefined=len(values) - len(known),
        )
    total = from_counts(*(sum(row[key] for row in rows) for key in ("tp", "fp", "fn", "tn")))
    per_set = {name: None if math.isnan(value) else value for name, value in total.items()}
    return dict(images=len(rows), unit=units.pop(), per_image=per_image, per_set=per_set)


def write_results(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write ``metrics.json`` and ``per_image.csv`` (an undefined value is an empty field)."""
    write_text(folder / "metrics.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    write_text(folder / "per_image.csv", table.getvalue())


def class_probabilities(logits: Tensor) -> Tensor:
    """Probabilities of the foreground classes: sigmoid of one logit, else softmax without the background.

    Args:
        logits: ``[B, 1, H, W]`` or ``[B, K, H, W]``.

    Returns:
        ``[B, 1, H, W]`` or ``[B, K - 1, H, W]``, float32.
    """
    return logits.float().sigmoid() if logits.shape[1] == 1 else torch.softmax(logits.float(), 1)[:, 1:]
