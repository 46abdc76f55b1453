"""Images with boxes: what sources of objects give, and how they become tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np


@dataclass
class Scene:
    """An image and its objects.

    Args:
        image: ``[H, W, C]`` uint8.
        boxes: ``[N, 4]`` float32: left, top, right and bottom in pixels, inside the image.
        labels: ``[N]`` int64, from 1; 0 is the background.
        name: What errors and tables call the image.
        crowd: ``[N]`` bool: regions to leave out of training, where detections count neither as right nor as wrong.
        masks: For each object COCO's run-length encoding, with ``counts`` and ``size``; None where there are none.
        areas: ``[N]`` float32, pixels of the objects, by which evaluation calls them small, medium or large; by default
            those of the boxes.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    name: str
    crowd: Any = None
    masks: list[dict[str, Any]] | None = None
    areas: Any = None

    def __post_init__(self) -> None:
        self.boxes = np.asarray(self.boxes, np.float32).reshape(-1, 4)
        self.labels = np.asarray(self.labels, np.int64)
        if self.crowd is None:
            self.crowd = np.zeros(len(self.boxes), bool)
        if self.areas is None:
            self.areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)


class DetectionSource(Protocol):
    """What a source of objects is: a sequence of scenes.

    ``classes`` are the names of the labels from 1 on, ``category_ids`` the numbers that result files call them by.
    """

    classes: list[str]
    category_ids: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Scene: ...


def clip_boxes(boxes: np.ndarray, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as seen through a window.

    Args:
        boxes: ``[N, 4]``, left, top, right, bottom.
        left: First column of the window.
        top: First row.
        width: Columns.
        height: Rows.

    Returns:
        Boxes cut by the window, in its coordinates, and the share of each one's area that is left, ``[N]``.
    """
    moved = boxes - np.array([left, top, left, top], boxes.dtype)
    cut = moved.clip(0, np.array([width, height, width, height], boxes.dtype))
    area = (moved[:, 2:] - moved[:, :2]).prod(1)
    return cut, (cut[:, 2:] - cut[:, :2]).prod(1) / np.maximum(area, 1e-9)


def tiles(first: int, last: int, side: int) -> list[tuple[int, int]]:
    """Cut ``first`` to ``last`` into the fewest nearly equal pieces of at most ``side`` pixels: start and length."""
    count = -(-(last - first) // side)
    edges: Sequence[int] = [first + round(i * (last - first) / count) for i in range(count + 1)]
    return [(a, b - a) for a, b in pairwise(edges)]
