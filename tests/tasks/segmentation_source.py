"""A source of small images with bright squares, for tests."""

from typing import Any

import numpy as np

from visionattn.data.segmentation import Sample


class Squares:
    """Noise with one bright square each."""

    classes = ["background", "square"]

    def __init__(self, split: str = "train", in_chans: int = 3, count: int = 4, side: int = 48, root: Any = None):
        self.split, self.in_chans, self.count, self.side = split, in_chans, count, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Sample:
        rng = np.random.default_rng([i, len(self.split)])
        image = rng.integers(0, 60, (self.side, self.side + 5, self.in_chans), dtype=np.uint8)
        mask = np.zeros(image.shape[:2], np.int64)
        top, left = rng.integers(0, self.side // 2, 2)
        mask[top : top + 20, left : left + 20] = 1
        image[mask == 1] += 150
        field = np.ones(mask.shape, bool)
        field[:2] = False
        return Sample(image, mask, f"{self.split}_{i}", f"patient {i // 2}", field, (0.5, 0.5))
