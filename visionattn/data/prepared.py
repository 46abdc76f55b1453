"""Sets with a list of their splits: folders that ``prepare`` wrote, and HER-Seg's."""

import json
from pathlib import Path
from typing import Any

from visionattn.data.images import check_channels
from visionattn.data.masks import check_sizes, read_mask, read_pixels
from visionattn.data.prepare import FORMAT
from visionattn.data.segmentation import Sample
from visionattn.data.splits import check_split, split_groups

_KEYS = {"format", "name", "classes", "splits", "groups", "unlabelled", "fields", "spacing"}


class PreparedDataset:
    """A folder that ``visionattn.data.prepare.prepare`` wrote.

    Args:
        root: The folder with ``dataset.json``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        in_chans: Channels that the images are read with, 1 or 3.
        fold: Fold of a cross-validation over all images that have masks, from 0; None takes the usual split.
        folds: Number of folds; as many as groups is leave-one-out.
        name: Set that the folder must hold; None accepts any.

    Raises:
        FileNotFoundError: The folder or files of it are missing.
        ValueError: ``dataset.json`` is damaged, of another set or format, or the split is empty.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        in_chans: int = 3,
        fold: int | None = None,
        folds: int | None = None,
        name: str | None = None,
    ):
        check_split(split)
        check_channels(in_chans)
        self.root, self.in_chans, self.info = Path(root), in_chans, read_info(Path(root), _KEYS)
        if name is not None and self.info["name"] != name:
            raise ValueError(f"{root} holds the set {self.info['name']!r}, expected {name!r}; correct data.root")
        self.classes = list(self.info["classes"])
        self.names: list[str] = self.info["splits"][split]
        if fold is not None or folds is not None:
            labelled = sorted(set(self.info["groups"]) - set(self.info["unlabelled"]))
            groups = [self.info["groups"][item] for item in labelled]
            self.names = [labelled[i] for i in split_groups(groups, fold=fold, folds=folds)[split]]
        if not self.names:
            counts = {key: len(items) for key, items in self.info["splits"].items()}
            raise ValueError(f"{root} has no image in split {split!r}, only {counts}; prepare the whole set")
        self.unlabelled = set(self.info["unlabelled"])
        _check_names(self.names, self.root)
        missing = [path for item in self.names for path in self._files(item) if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} files are missing, first {missing[0]}; prepare the set anew")

    def _files(self, item: str) -> list[Path]:
        kinds = ["images", *(["masks"] if item not in self.unlabelled else []), *["fields"] * self.info["fields"]]
        return [self.root / kind / f"{item}.png" for kind in kinds]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Sample:
        item = self.names[i]
        image_path, *others = self._files(item)
        image = read_pixels(image_path, self.in_chans)
        field = read_mask(others.pop(), ("outside", "inside")).astype(bool) if self.info["fields"] else None
        mask = None
        if others:
            mask = read_mask(others[0], self.classes, threshold=1)
            check_sizes(image, mask, image_path)
        if field is not None:
            check_sizes(image, field, image_path)
        return Sample(image, mask, item, self.info["groups"][item], field, self.info["spacing"])


def read_info(root: Path, keys: set[str]) -> dict[str, Any]:
    """What ``dataset.json`` of a prepared folder holds.

    Args:
        root: The folder.
        keys: What the file must have.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, lacks keys, or has another format.
    """
    path = root / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; write the folder with: visionattn data prepare NAME ARCHIVE... --output DIR"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the set anew") from error
    if not isinstance(info, dict) or keys - set(info):
        lacking = sorted(keys - set(info)) if isinstance(info, dict) else "everything"
        raise ValueError(f"{path} lacks {lacking}; prepare the set anew")
    if info["format"] != FORMAT:
        raise ValueError(f"{path} has format {info['format']}, expected {FORMAT}; prepare the set anew")
    return info


def _check_names(names: list[str], where: Path) -> None:
    """Refuse names that lead out of a folder."""
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{where} names {strange[0]!r}, expected the name of a file without folders")


class HERSegSplit:
    """A set as HER-Seg's repository keeps it, with its published split.

    ``ROOT/image_1024/ID.png``, ``ROOT/mask_1024/ID.png`` (any value above 0 is foreground) and
    ``ROOT/NAME_data_split.json`` with the lists ``train``, ``valid`` and ``test`` of file names; what stands before
    the first dot of a file name is the ID.

    Args:
        root: Dataset folder.
        name: NAME of the list.
        split: ``"train"``, ``"val"`` (the list ``valid``) or ``"test"``.
        in_chans: Channels that the images are read with, 1 or 3.
        images: Folder of the images.
        masks: Folder of the masks; REFUGE's two structures are ``mask_1024_c1`` and ``mask_1024_c2``.

    Raises:
        FileNotFoundError: The list or files that it names are missing.
        ValueError: The list is damaged, lacks the split, or has an image in two splits.
    """

    classes = ["background", "foreground"]

    def __init__(
        self,
        root: str | Path,
        name: str,
        split: str = "train",
        in_chans: int = 3,
        images: str = "image_1024",
        masks: str = "mask_1024",
    ):
        check_split(split)
        check_channels(in_chans)
        path = Path(root, f"{name}_data_split.json")
        if not path.is_file():
            raise FileNotFoundError(f"no list of splits {path}; expected ROOT/NAME_data_split.json, set data.name")
        try:
            lists = json.loads(path.read_text(encoding="utf-8"))
            splits = {key: [str(item).partition(".")[0] for item in lists[key]] for key in ("train", "valid", "test")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must hold the lists train, valid and test of file names: {error!r}") from error
        for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
            shared = sorted(set(splits[one]) & set(splits[other]))
            if shared:
                raise ValueError(f"{path}: {len(shared)} images are in {one} and in {other}, first {shared[0]!r}")
        names = splits["valid" if split == "val" else split]
        _check_names(names, path)
        self.in_chans = in_chans
        self.samples = [(item, Path(root, images, f"{item}.png"), Path(root, masks, f"{item}.png")) for item in names]
        missing = [file for _, *files in self.samples for file in files if not file.is_file()]
        if missing or not names:
            first = f", first {missing[0]}" if missing else ""
            raise FileNotFoundError(f"{path} names {len(names)} images of {split}; {len(missing)} files missing{first}")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        name, image_path, mask_path = self.samples[i]
        image, mask = read_pixels(image_path, self.in_chans), read_mask(mask_path, self.classes, threshold=1)
        check_sizes(image, mask, image_path)
        return Sample(image, mask, name)
