"""Points in the unit square with their convex hulls, the task that Pointer Networks were shown on
(arXiv:1506.03134)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from visionattn.data.pipeline import Batch
from visionattn.data.splits import SPLITS, check_split


def convex_hull(points: np.ndarray) -> list[int]:
    """Corners of the hull, counter-clockwise from the one with the lowest index.

    Args:
        points: ``[n, 2]``, n at least 3, not all on a line.

    Raises:
        ValueError: Fewer points, or points on a line.
    """
    from scipy.spatial import ConvexHull, QhullError

    try:
        corners = ConvexHull(points).vertices.tolist()  # counter-clockwise in two dimensions
    except (QhullError, ValueError) as error:
        raise ValueError(
            f"{len(points)} points have no hull with an area; give three or more, not on a line"
        ) from error
    first = corners.index(min(corners))
    return corners[first:] + corners[:first]


class RandomHulls:
    """Uniform points and their hulls; item ``i`` is always the same.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``, of different numbers.
        count: Items of the training split (250,000 take half a minute to make); the others have 1,000.
        sizes: Numbers of points, in turn.
        seed: Of everything.

    Raises:
        ValueError: Another split, or sizes below 3.
    """

    classes = ["point"]

    def __init__(self, split: str = "train", count: int = 20000, sizes: Sequence[int] = (5,), seed: int = 0):
        check_split(split)
        if not sizes or min(sizes) < 3 or count < 1:
            raise ValueError(f"sizes={list(sizes)}, count={count}: expected sizes from 3 and a count from 1 on")
        rng = np.random.default_rng([seed, SPLITS.index(split)])
        total = count if split == "train" else 1000
        self.points = [rng.random((sizes[i % len(sizes)], 2)) for i in range(total)]
        self.paths = [convex_hull(points) for points in self.points]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        """Item of a key of ``EpochSampler``."""
        return dict(image=torch.from_numpy(self.points[key[2]]).float(), path=self.paths[key[2]])


def collate_points(items: list[Batch]) -> dict[str, Any]:
    """``image`` (the points) ``[B, N, 2]``, ``counts`` ``[B]``, ``path`` ``[B, T]`` with -1 behind its end."""
    most, longest = (max(len(item[key]) for item in items) for key in ("image", "path"))
    return dict(
        image=torch.stack([F.pad(item["image"], (0, 0, 0, most - len(item["image"]))) for item in items]),
        counts=torch.tensor([len(item["image"]) for item in items]),
        path=torch.tensor([item["path"] + [-1] * (longest - len(item["path"])) for item in items]),
        skipped=[],
    )
