"""From COCO 2017's archives to one checked folder: https://cocodataset.org/#download."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visionattn.data.archives import Progress, unpacked
from visionattn.data.coco import check_objects, read_list

COUNTS = dict(train=118_287, val=5_000)
"""Published numbers of images."""
CATEGORIES = 80


def prepare(
    name: str,
    archives: Iterable[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Unpack and check COCO 2017; nothing is fetched.

    Writes ``OUTPUT/train2017``, ``val2017``, ``annotations/instances_{train,val}2017.json`` and ``dataset.json``. The
    folder appears under its name only when everything is in it. Files are hard links to those of folders that are
    given, or copies where the file system has no links.

    Args:
        name: coco.
        archives: ``train2017.zip``, ``val2017.zip`` and ``annotations_trainval2017.zip``, or folders of their contents.
        output: Folder to write, which must not exist yet.
        progress: Told in words what is being done.
        complete: Refuse other numbers of images and categories than the published; otherwise take the images that the
            lists and the archives have in common.

    Returns:
        What ``dataset.json`` holds, and ``splits``, the names of each split's images.

    Raises:
        FileNotFoundError: An archive, or what one of them should hold, is missing.
        FileExistsError: There is something at ``output``.
        ValueError: Damaged files, wrong lists, or numbers that are not the published ones.
    """
    with unpacked(archives, output, progress) as (folders, target, sources):
        splits, dropped = {}, {}
        for split in COUNTS:
            listed, images = _find(folders, split)
            if progress:
                progress(f"{name}: checking {listed.name}")
            content = read_list(listed)
            dropped[split] = check_objects(content, listed, masks=True, drop=True)[1]
            kept = _present(content, images, split, complete)
            splits[split] = [str(entry["file_name"]) for entry in content["images"] if entry["id"] in kept]
            _link(images, splits[split], target / f"{split}2017", progress)
            place = target / "annotations" / f"instances_{split}2017.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            if len(kept) == len(content["images"]):
                shutil.copyfile(listed, place)
            else:
                content["images"] = [entry for entry in content["images"] if entry["id"] in kept]
                content["annotations"] = [item for item in content["annotations"] if item["image_id"] in kept]
                place.write_text(json.dumps(content), encoding="utf-8")
        counts = {split: len(names) for split, names in splits.items()}
        info = dict(name=name, kind="detection", counts=counts, unusable_boxes=dropped, sources=sources)
        (target / "dataset.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return dict(**info, splits=splits)


def _find(folders: list[Path], split: str) -> tuple[Path, Path]:
    """The list and the folder of images of a split."""
    wanted = f"instances_{split}2017.json", f"{split}2017"
    found = []
    for pattern, kind in zip(wanted, (Path.is_file, Path.is_dir), strict=True):
        places = [folder for folder in folders if folder.name == pattern and kind(folder)]
        places += [path for folder in folders for path in sorted(folder.rglob(pattern)) if kind(path)]
        if not places:
            raise FileNotFoundError(
                f"coco: no {pattern} in the archives; give train2017.zip, val2017.zip and annotations_trainval2017.zip"
            )
        found.append(places[0])
    return found[0], found[1]


def _present(content: dict[str, Any], images: Path, split: str, complete: bool) -> set[int]:
    """Numbers of the listed images that are there."""
    files = {entry.name for entry in os.scandir(images)}
    kept = {entry["id"] for entry in content["images"] if entry["file_name"] in files}
    lacking = [str(entry["file_name"]) for entry in content["images"] if entry["id"] not in kept]
    numbers = len(content["images"]), len(content["categories"])
    if complete and (lacking or numbers != (COUNTS[split], CATEGORIES)):
        raise ValueError(
            f"coco, {split}: the list has {numbers[0]} images and {numbers[1]} categories, expected {COUNTS[split]} "
            f"and {CATEGORIES}; {len(lacking)} of its images are missing {lacking[:3]}; give all archives, or go on "
            "with what there is by --partial (complete=False)"
        )
    if not kept:
        raise FileNotFoundError(f"coco, {split}: none of the {numbers[0]} listed images is in {images}")
    return kept


def _link(source: Path, names: list[str], target: Path, progress: Progress | None) -> None:
    target.mkdir(parents=True)
    for number, name in enumerate(names):
        if progress and number % 10_000 == 0:
            progress(f"{target.name}: {number + 1} of {len(names)}")
        try:
            os.link(source / name, target / name)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source / name, target / name)
