"""One folder of images with a file of labels, as ImageNet's validation set is handed out."""

import csv
import os
from pathlib import Path

from visionattn.data.datasets import EXTENSIONS, ListedImages

_ACCEPTED = (
    "lines 'FILE LABEL' (LABEL a number from 0 in the order of the sorted class names, or a class name), Kaggle's "
    "LOC_val_solution.csv, or one class name a line in the order of the sorted file names"
)


def read_labels(path: str | Path, names: list[str], classes: list[str]) -> dict[str, int]:
    """Labels of image files.

    Args:
        path: File of labels.
        names: File names of the images, sorted.
        classes: Class names in label order.

    Returns:
        Label by file name without ending.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Another form, an unknown class, or numbers alone: those of ImageNet's development kit are in another
            order than the sorted class names, and nothing in the file says which order is meant.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of labels at {path}; expected {_ACCEPTED}")
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if rows and rows[0][0].startswith("ImageId,"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [[row["ImageId"], *(row.get("PredictionString") or "").split()[:1]] for row in csv.DictReader(file)]
        if empty := next((row for row in rows if len(row) < 2), None):
            raise ValueError(f"{path} has no PredictionString for {empty[0]}; expected {_ACCEPTED}")
    numbers = {name: i for i, name in enumerate(classes)}
    if rows and all(len(row) == 1 for row in rows):
        if all(row[0].isdigit() for row in rows):
            raise ValueError(
                f"{path} holds numbers alone, whose order of classes is not known (the development kit's is another "
                f"than the models'); expected {_ACCEPTED}"
            )
        if len(rows) != len(names):
            raise ValueError(f"{path} has {len(rows)} lines for {len(names)} images; expected one for each")
        rows = [[name, row[0]] for name, row in zip(names, rows, strict=True)]
    labels = {}
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{path} has the line {' '.join(row)[:60]!r}; expected {_ACCEPTED}")
        label = int(row[1]) if row[1].isdigit() else numbers.get(row[1], -1)
        if not 0 <= label < len(classes):
            raise ValueError(f"{path}: {row[1]!r} is none of the {len(classes)} classes ({classes[0]}, ...)")
        labels[Path(row[0]).stem] = label
    return labels


class LabelledFolder(ListedImages):
    """Images of one folder, with their labels in a file; images that the file does not name are left out.

    Args:
        root: Folder of the images.
        labels: File, see ``read_labels``.
        classes: Class names in label order.
        in_chans: Channels that the images are read with, 1 or 3.

    Raises:
        FileNotFoundError: The folder or the file is missing, or holds no labelled image.
        ValueError: As ``read_labels``.
    """

    def __init__(self, root: str | Path, labels: str | Path, classes: list[str], in_chans: int = 3):
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of images at {folder}")
        names = sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(EXTENSIONS))
        known = read_labels(labels, names, classes)
        self.classes, self.in_chans = classes, in_chans
        self.samples = [(os.path.join(folder, n), known[Path(n).stem]) for n in names if Path(n).stem in known]
        if not self.samples:
            raise FileNotFoundError(f"{folder} holds no image that {labels} names ({', '.join(EXTENSIONS)})")
