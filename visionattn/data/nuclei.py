"""The fluorescence image of cell nuclei that travels in the package stardist, cut into tiles."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from visionattn.data.images import check_channels
from visionattn.data.segmentation import Sample
from visionattn.data.splits import check_split

SIDE = 512


class Nuclei:
    """Tiles of one 512 x 512 image; every pixel of a labelled instance is a nucleus.

    Splits are bands of rows that do not touch each other's pixels: rows 384 to 511 are the test, rows 256 to 383
    the validation, rows 0 to 255 the training split. A nucleus on a border between bands is cut by it. All splits
    are of one image, so figures on them prove the training and not how a model fares on other images.

    Intensities are scaled so that the 1st and 99.8th percentile of the training rows become 0 and 1.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        in_chans: Channels, 1 or 3 (the grey image repeated).
        tile: Side of a tile in pixels, 32, 64 or 128.

    Raises:
        ImportError: The package stardist is not installed.
        FileNotFoundError: The package lacks the image.
        ValueError: Another split, tile or number of channels.
    """

    classes = ["background", "nucleus"]

    def __init__(self, split: str = "train", in_chans: int = 3, tile: int = 128):
        check_split(split)
        check_channels(in_chans)
        if tile not in (32, 64, 128):
            raise ValueError(f"tile={tile} must be 32, 64 or 128, so that tiles fill the bands of 128 rows")
        image, labels = _read()
        low, high = np.percentile(image[:256], (1, 99.8))
        self.image = ((image.astype(np.float32) - low) / max(high - low, 1e-6)).astype(np.float32)
        self.mask = (labels > 0).astype(np.int64)
        first, last = {"train": (0, 256), "val": (256, 384), "test": (384, 512)}[split]
        self.places = [(row, column) for row in range(first, last, tile) for column in range(0, SIDE, tile)]
        self.split, self.in_chans, self.tile = split, in_chans, tile

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Sample:
        row, column = self.places[i]
        window = slice(row, row + self.tile), slice(column, column + self.tile)
        image = np.repeat(self.image[window][..., None], self.in_chans, axis=2)
        return Sample(image, self.mask[window].copy(), f"nuclei_{row}_{column}", group=self.split)


def _read() -> tuple[np.ndarray, np.ndarray]:
    # the package is only a place of files: importing it would import a compiled extension
    spec = find_spec("stardist")
    if spec is None or not spec.origin:
        raise ImportError('data=nuclei needs the package stardist: pip install "visionattn[seg]"')
    try:
        import tifffile
    except ImportError as error:
        raise ImportError('data=nuclei needs the package tifffile: pip install "visionattn[seg]"') from error
    folder = Path(spec.origin).parent / "data" / "images"
    arrays = []
    for name in ("img2d.tif", "mask2d.tif"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"stardist at {folder.parent.parent} lacks data/images/{name}; install it anew")
        arrays.append(tifffile.imread(folder / name))
        if arrays[-1].shape != (SIDE, SIDE):
            raise ValueError(f"{folder / name} has shape {arrays[-1].shape}, expected ({SIDE}, {SIDE})")
    return arrays[0], arrays[1]
