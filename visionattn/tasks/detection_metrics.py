"""COCO's average precision, by pycocotools, the implementation that published figures come from."""

import contextlib
import io
import math
from typing import Any

import numpy as np
from pycocotools import mask as coder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")
"""Average precision at IoU 0.50 to 0.95, 0.50 and 0.75; of objects below 32 x 32, below 96 x 96 and of more pixels;
average recall with 1, 10 and 100 detections an image."""


def encode_detections(found: dict[str, Tensor]) -> dict[str, Any]:
    """A detector's result for one image as plain numbers, masks at one half in COCO's encoding.

    Args:
        found: ``boxes [M, 4]``, ``labels [M]``, ``scores [M]`` and perhaps ``masks [M, 1, H, W]``.
    """
    boxes = found["boxes"].detach().cpu().double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    result = dict(
        boxes=boxes.tolist(), labels=found["labels"].cpu().tolist(), scores=found["scores"].detach().cpu().tolist()
    )
    if "masks" in found:
        binary = (found["masks"][:, 0] > 0.5).to("cpu").numpy().astype(np.uint8)
        result["masks"] = [_text(coder.encode(np.asfortranarray(mask))) for mask in binary]
    return result


def _text(mask: dict[str, Any]) -> dict[str, Any]:
    counts = mask["counts"]
    return dict(size=list(mask["size"]), counts=counts.decode() if isinstance(counts, bytes) else counts)


def result_rows(image: int, found: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    """Detections of one image as rows of COCO's result files.

    Args:
        image: Number of the image.
        found: Of ``encode_detections``.
        category_ids: Numbers of the labels from 1 on.
    """
    rows = [
        dict(image_id=image, category_id=category_ids[label - 1], bbox=box, score=score)
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
    ]
    for row, mask in zip(rows, found.get("masks", ()), strict=False):
        row["segmentation"] = mask
    return rows


class CocoScores:
    """Objects and detections, image by image, and their scores.

    Args:
        classes: Names of the labels from 1 on.
        masks: Whether masks are measured beside boxes.
    """

    def __init__(self, classes: list[str], masks: bool = False):
        self.classes, self.masks = classes, masks
        self.found: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def add(self, image: int, truth: dict[str, Any], found: dict[str, Any]) -> None:
        """One image: its number, truth (``visionattn.data.detection_transforms.truth_of``), encoded detections.

        An image that is added twice, as when processes share an epoch unevenly, counts once.
        """
        plain = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in truth.items()}
        self.found[image] = (plain, found)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``{"bbox": {...}}`` and, with masks, ``"segm"``: ``NAMES`` and ``classes``, AP and AP50 of each class.

        A score without an object that it could be measured on is NaN.

        Raises:
            ValueError: No image was added.
        """
        if not self.found:
            raise ValueError("there is no image to measure; the split is empty or unreadable")
        numbers = range(1, len(self.classes) + 1)
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints its progress
            truth = COCO()
            truth.dataset = dict(
                images=[self._image(i) for i in self.found],
                annotations=[row for i in self.found for row in self._objects(i)],
                categories=[dict(id=k, name=name) for k, name in zip(numbers, self.classes, strict=True)],
            )
            for number, row in enumerate(truth.dataset["annotations"], 1):
                row["id"] = number
            truth.createIndex()
            rows = [row for i, (_, found) in self.found.items() for row in result_rows(i, found, list(numbers))]
            return {kind: self._scores(truth, rows, kind) for kind in ("bbox", "segm")[: 1 + self.masks]}

    def _image(self, i: int) -> dict[str, Any]:
        height, width = self.found[i][0]["size"]
        return dict(id=i, height=int(height), width=int(width))

    def _objects(self, i: int) -> list[dict[str, Any]]:
        truth = self.found[i][0]
        rows = []
        for k, (x0, y0, x1, y1) in enumerate(truth["boxes"]):
            row = dict(image_id=i, category_id=truth["labels"][k], bbox=[x0, y0, x1 - x0, y1 - y0])
            row |= dict(iscrowd=int(truth["crowd"][k]), area=truth["areas"][k])
            if self.masks:
                row["segmentation"] = truth["masks"][k]
            rows.append(row)
        return rows

    def _scores(self, truth: COCO, rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        if not rows:  # the package refuses an empty list
            per_class = [0.0 if truth.getAnnIds(catIds=[k]) else math.nan for k in range(1, len(self.classes) + 1)]
            measured = 0.0 if any(value == 0.0 for value in per_class) else math.nan
            none = dict.fromkeys(NAMES, measured)
            return dict(**none, classes={n: dict(ap=v, ap50=v) for n, v in zip(self.classes, per_class, strict=True)})
        # masks of truth and detections are both measured where both are there; boxes alone must not carry masks
        kept = [row if kind == "segm" else {k: v for k, v in row.items() if k != "segmentation"} for row in rows]
        evaluation = COCOeval(truth, truth.loadRes(kept), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        precision = evaluation.eval["precision"]  # [IoU, recall, class, area, detections]
        classes = {
            name: dict(ap=_mean(precision[:, :, k, 0, -1]), ap50=_mean(precision[0, :, k, 0, -1]))
            for k, name in enumerate(self.classes)
        }
        scores = [math.nan if value < 0 else float(value) for value in evaluation.stats[: len(NAMES)]]
        return dict(zip(NAMES, scores, strict=True), classes=classes)


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan
