"""ADE20K, Cityscapes and COCO-Stuff as sources of images with a label for every pixel."""

from pathlib import Path

import numpy as np
from PIL import Image

from visionattn.data.images import check_channels
from visionattn.data.masks import READ_ERRORS, check_sizes, read_pixels
from visionattn.data.prepared import read_info
from visionattn.data.segmentation import Sample
from visionattn.data.semantic_layouts import LAYOUTS, UNKNOWN
from visionattn.data.splits import check_split

KEYS = {"format", "name", "suffix", "splits", "counts", "pixels"}
"""Of ``dataset.json``."""


def open_label(path: Path) -> Image.Image:
    """A label file, not decoded yet.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image of one channel of 8 bits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no label file at {path}; prepare the set anew")
    try:
        file = Image.open(path)
    except READ_ERRORS as error:
        raise ValueError(f"cannot read label file {path}: {error}; take it from the archive anew") from error
    if file.mode not in ("L", "P"):
        raise ValueError(f"label file {path} has mode {file.mode}, expected one channel of 8 bits (L or P)")
    return file


def read_labels(path: Path, table: np.ndarray) -> np.ndarray:
    """Read a label file.

    Args:
        path: File of one channel of 8 bits; of palette images the index counts.
        table: Label of every value, ``[256]``, see ``SemanticLayout.table``.

    Returns:
        ``[H, W]`` int64, labels and ``IGNORE``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or has values that the set does not have.
    """
    with open_label(path) as file:
        try:
            values = np.asarray(file)
        except READ_ERRORS as error:
            raise ValueError(f"cannot read label file {path}: {error}; take it from the archive anew") from error
    found = table[values]
    if (found == UNKNOWN).any():
        raise ValueError(wrong_values(path, np.bincount(values.ravel(), minlength=256), table))
    return found.astype(np.int64)


def wrong_values(path: Path, counts: np.ndarray, table: np.ndarray) -> str:
    """What is wrong with a label file whose values occur ``counts`` (``[256]``) times."""
    wrong = np.flatnonzero((counts > 0) & (table == UNKNOWN))
    return (
        f"label file {path} has {counts[wrong].sum()} pixels of values that the set does not have: "
        f"{wrong[:5].tolist()}; take it from the set's own archive"
    )


class SemanticDataset:
    """A folder that ``visionattn.data.semantic_prepare.prepare`` wrote.

    ``classes`` has no background: every class counts alike. ``palette`` has their colours.

    Args:
        root: The folder with ``dataset.json``.
        split: ``"train"`` or ``"val"``; the truth of the test images is not public.
        in_chans: Channels that the images are read with, 1 or 3.
        name: Set that the folder must hold.

    Raises:
        FileNotFoundError: The folder or files of it are missing.
        ValueError: ``dataset.json`` is damaged or of another set, or there is no such split.
    """

    background = False

    def __init__(self, root: str | Path, split: str = "train", in_chans: int = 3, name: str | None = None):
        check_split(split)
        check_channels(in_chans)
        self.root, self.split, self.in_chans = Path(root), split, in_chans
        info = read_info(self.root, KEYS)
        if info["name"] not in LAYOUTS or name not in (None, info["name"]):
            raise ValueError(f"{root} holds the set {info['name']!r}, expected {name!r}; correct data.root")
        if not info["splits"].get(split):
            raise ValueError(f"{info['name']} has no split {split!r} with public labels; take train or val")
        layout = LAYOUTS[info["name"]]
        self.classes, self.palette, self.table = list(layout.classes), layout.palette, layout.table()
        self.suffix, self.names = info["suffix"], info["splits"][split]
        for kind, suffix in (("images", self.suffix), ("labels", ".png")):
            folder = self.root / kind / split
            there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            if missing := [item for item in self.names if item + suffix not in there]:
                first = folder / (missing[0] + suffix)
                raise FileNotFoundError(f"{len(missing)} files are missing, first {first}; prepare the set anew")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        item = self.names[i]
        path = self.root / "images" / self.split / (item + self.suffix)
        image = read_pixels(path, self.in_chans)
        mask = read_labels(self.root / "labels" / self.split / f"{item}.png", self.table)
        check_sizes(image, mask, path)
        return Sample(image, mask, item)
