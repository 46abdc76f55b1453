"""COVIDx, chest X-rays with the diagnosis, as the label files of lindawangg/COVID-Net list them (arXiv:2003.09871)."""

import os
from pathlib import Path

from visionattn.data.datasets import ListedImages

CLASSES = {"A": ["normal", "pneumonia", "COVID-19"], "B": ["negative", "positive"]}
SPLITS = ("train", "test")


def parse_line(line: str, classes: list[str], files: set[str]) -> tuple[str, str, str] | None:
    """Patient, file name and label of one line ``PATIENT FILE LABEL [SOURCE]``.

    Patients and file names may hold spaces, so a line is read from its end: the last word is the source unless it is a
    label, the word before it the label. Of the rest the file name is the shortest ending that is in ``files``, or where
    none is the last word.

    Args:
        line: Without a line break.
        classes: The labels.
        files: Names of the images that are there.

    Returns:
        None where neither of the last two words is a label, or patient and file name are not both there.
    """
    words = line.split(" ")
    # a source may be called like a label, never the other way round; so the place with a source is tried first
    at = next((i for i in (len(words) - 2, len(words) - 1) if i >= 2 and words[i] in classes), None)
    if at is None:
        return None
    rest = words[:at]
    starts = [i for i in range(len(rest) - 1, 0, -1) if " ".join(rest[i:]) in files] or [len(rest) - 1]
    return " ".join(rest[: starts[0]]), " ".join(rest[starts[0] :]), words[at]


class COVIDx(ListedImages):
    """A split of COVIDx: images in ``ROOT/data/SPLIT``, labels in ``ROOT/labels/SPLIT_COVIDxVERSION.txt``.

    Versions that end in A have the classes normal, pneumonia and COVID-19, those in B negative and positive.

    Args:
        root: Dataset folder.
        split: ``"train"`` or ``"test"``; there is no other, so ``"val"`` reads the test split.
        version: For example ``"8B"`` or ``"9A"``.
        in_chans: Channels that the images are read with, 1 or 3.
        classes: Class names in label order; by default those of the version.

    Raises:
        FileNotFoundError: No label file, or images that it lists are missing.
        ValueError: Another split or version, a line that cannot be read, or an empty file.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        version: str = "8B",
        in_chans: int = 3,
        classes: list[str] | None = None,
    ):
        split = "test" if split == "val" else split
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: COVIDx has the splits {SPLITS}")
        if version[-1:] not in CLASSES:
            raise ValueError(f"version={version!r} must end in A (three classes) or B (two), for example '8B'")
        self.classes = list(classes or CLASSES[version[-1]])
        labels, folder = Path(root, "labels", f"{split}_COVIDx{version}.txt"), Path(root, "data", split)
        if not labels.is_file():
            raise FileNotFoundError(
                f"no label file {labels}; get the folder labels of lindawangg/COVID-Net, or set another version"
            )
        files = set(os.listdir(folder)) if folder.is_dir() else set()
        self.in_chans, self.patients = in_chans, []
        self.samples: list[tuple[str, int]] = []
        for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            found = parse_line(line.strip(), self.classes, files)
            if found is None:
                raise ValueError(
                    f"{labels}, line {number}: {line!r} is not PATIENT FILE LABEL [SOURCE] with one of the labels "
                    f"{self.classes}"
                )
            patient, name, label = found
            self.patients.append(patient)
            self.samples.append((str(folder / name), self.classes.index(label)))
        if not self.samples:
            raise ValueError(f"{labels} lists no images; get it again")
        missing = [path for path, _ in self.samples if os.path.basename(path) not in files]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self.samples)} images that {labels} lists are missing, first "
                f"{missing[0]}; build the data set with the scripts of lindawangg/COVID-Net, or correct root"
            )
