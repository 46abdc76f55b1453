"""Tree crowns in aerial pictures that travel in the package deepforest, cut into tiles."""

import io
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from visionattn.data.detection import Scene, clip_boxes, tiles
from visionattn.data.images import as_mode, check_channels
from visionattn.data.splits import check_split

PICTURES = {"2019_YELL_2_528000_4978000_image_crop2": 574, "2019_YELL_2_541000_4977000_image_crop": 279}
"""Files of the package without their endings, and the number of crowns in them."""
_FIRST, _SECOND = PICTURES
REGIONS = {
    "train": ((_FIRST, 0, 0, 2299, 1648), (_SECOND, 0, 0, 749, 1035)),
    "val": ((_FIRST, 0, 1648, 1150, 2472),),
    "test": ((_FIRST, 1150, 1648, 2299, 2472), (_SECOND, 749, 0, 1249, 1035)),
}
"""Picture, left, top, right and bottom in pixels of the regions of each split, which share no pixel."""
GET = "pip install --no-deps deepforest==2.1.0"
_SEEN, _SLIVER = 0.4, 0.02


class Trees:
    """Tiles of two aerial pictures of Yellowstone with every tree crown boxed (NEON, 0.1 m a pixel).

    Weinstein et al., "DeepForest: A Python package for RGB deep learning tree crown delineation", 2020. The package's
    files are read and its code never imported, so it is best installed without the many packages that it requires, or
    not installed at all: ``wheel`` reads them out of the file that ``pip download --no-deps deepforest`` gives.

    Splits are regions that share no pixel. Training tiles overlap by half, those of the other splits do not. A crown at
    a tile's border is cut by it: with 40 % of its box inside it is an object, with less a crowd region, which
    counts neither way; below 2 % it is forgotten. Pictures of other places in the package are left out, for one has
    other classes and one other trees.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        in_chans: Channels, 1 or 3.
        tile: Largest side of a tile in pixels.
        wheel: File of the package; None finds the installed one.

    Raises:
        ImportError: The package is not installed, and no file given.
        FileNotFoundError: It lacks the pictures.
        ValueError: Another split, number of channels or tile, or a package with other pictures than those of 2.1.0.
    """

    classes, category_ids = ["tree"], [1]

    def __init__(self, split: str = "train", in_chans: int = 3, tile: int = 384, wheel: str | Path | None = None):
        check_split(split)
        check_channels(in_chans)
        if not 64 <= tile <= 1024:
            raise ValueError(f"tile={tile} must lie between 64 and 1024 pixels")
        folder = _data_folder(wheel)
        self.in_chans = in_chans
        self.pictures = {name: _read(folder, name) for name, *_ in REGIONS[split]}
        self.places = [(name, *place) for name, *region in REGIONS[split] for place in _places(region, tile, split)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> Scene:
        name, left, top, width, height = self.places[i]
        picture, all_boxes = self.pictures[name]
        image = picture.crop((left, top, left + width, top + height))
        boxes, share = clip_boxes(all_boxes, left, top, width, height)
        known = share >= _SLIVER
        pixels = np.asarray(as_mode(image, self.in_chans)).reshape(height, width, self.in_chans)
        label = np.ones(int(known.sum()), np.int64)
        return Scene(pixels, boxes[known], label, f"{name}_{left}_{top}", crowd=share[known] < _SEEN)


def _places(region: list[int], tile: int, split: str) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of the tiles of a region."""
    left, top, right, bottom = region
    columns, rows = tiles(left, right, tile), tiles(top, bottom, tile)
    if split == "train":
        columns, rows = (pieces + [(a + n // 2, n) for a, n in pieces[:-1]] for pieces in (columns, rows))
    return [(x, y, w, h) for y, h in rows for x, w in columns]


def _data_folder(wheel: str | Path | None) -> Any:
    """The package's folder of data, on the disk or in its file."""
    if wheel is None:
        spec = find_spec("deepforest")  # the package is only a place of files: its import wants a dozen others
        if spec is None or not spec.origin:
            raise ImportError(f"data=trees reads pictures of the package deepforest: {GET}")
        return Path(spec.origin).parent / "data"
    if not Path(wheel).is_file():
        raise FileNotFoundError(f"data.wheel={wheel}: no such file; get it by: {GET.replace('install', 'download')}")
    try:
        return zipfile.Path(wheel, "deepforest/data/")
    except zipfile.BadZipFile as error:
        raise ValueError(f"data.wheel={wheel} is no wheel: {error}; load it anew") from error


def _read(folder: Any, name: str) -> tuple[Any, np.ndarray]:
    """A picture and its boxes ``[N, 4]``; the files count pixels from 1."""
    from PIL import Image

    image_file, boxes_file = folder / f"{name}.png", folder / f"{name}.xml"
    for file in (image_file, boxes_file):
        if not file.is_file():
            raise FileNotFoundError(f"the package deepforest lacks {file}; this wants its version 2.1.0: {GET}")
    with Image.open(io.BytesIO(image_file.read_bytes())) as opened:
        picture = opened.convert("RGB")
    corners = [
        [float(box.findtext(key, "nan")) for key in ("xmin", "ymin", "xmax", "ymax")]
        for box in ElementTree.fromstring(boxes_file.read_bytes()).iter("bndbox")
    ]
    boxes = np.array(corners, np.float32).reshape(-1, 4) - np.array([1, 1, 0, 0], np.float32)
    size = np.array([*picture.size, *picture.size])
    if len(boxes) != PICTURES[name] or not ((boxes >= 0) & (boxes <= size)).all():
        raise ValueError(
            f"{boxes_file} has {len(boxes)} boxes, expected {PICTURES[name]} inside {picture.size}; "
            f"this wants the package's version 2.1.0: {GET}"
        )
    return picture, boxes
