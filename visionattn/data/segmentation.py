"""What a source of images with masks gives."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE = 255
"""Label of pixels that neither a loss nor a metric counts."""


@dataclass
class Sample:
    """One image with its mask, at its own size.

    Args:
        image: ``[H, W, C]``, uint8, uint16, or float32 in units of the source (a windowed CT slice in [0, 1]).
        mask: ``[H, W]`` int64, labels in ``[0, classes)`` or ``IGNORE``; None where the source has no truth.
        name: Tells a user which image it is; unique within its source, usable as a file name's stem.
        group: Patient, eye or other unit that must not be divided between splits; by default the name.
        field: ``[H, W]`` bool, the field of view; metrics count no pixel outside it. None: the whole image.
        spacing: Millimetres from row to row and from column to column, where the source knows them.
    """

    image: np.ndarray
    mask: np.ndarray | None
    name: str
    group: str = ""
    field: np.ndarray | None = None
    spacing: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self.group = self.group or self.name


class SegmentationSource(Protocol):
    """Images with masks by number.

    ``classes`` begins with the background; two classes make a binary task. A source's constructor takes ``split``
    (``"train"``, ``"val"``, ``"test"``).
    """

    classes: list[str]
    in_chans: int

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Sample:
        """Sample ``i``; ValueError or FileNotFoundError, naming the file, where it cannot be read or is wrong."""
        ...
