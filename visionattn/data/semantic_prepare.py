"""From the archives of ADE20K, Cityscapes and COCO-Stuff to one folder that ``SemanticDataset`` reads.

Files stay as they are: those of archives are unpacked once and moved, those of folders that were unpacked already are
hard-linked, which takes no space.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.archives import Progress, unpacked
from visionattn.data.masks import READ_ERRORS
from visionattn.data.prepare import FORMAT
from visionattn.data.segmentation import IGNORE
from visionattn.data.semantic import open_label, wrong_values
from visionattn.data.semantic_layouts import LAYOUTS, UNKNOWN, SemanticLayout

Key = tuple[str, str]
_STEP = 1000  # files between two lines of progress


def prepare(
    name: str,
    archives: Iterable[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Unpack, check and arrange a set of labelled scenes; nothing is fetched and no image is written anew.

    Writes ``OUTPUT/images/SPLIT/ID.jpg`` (or png), ``OUTPUT/labels/SPLIT/ID.png`` with the set's own values, and
    ``dataset.json``. Every label file is decoded and its values and size are checked; of images only the size is read.
    The folder appears under its name only when all is well.

    Args:
        name: ade20k, cityscapes or coco_stuff.
        archives: The files as downloaded, or folders of their contents; the set's other files are left alone.
        output: Folder to write, which must not exist yet; best on the file system of the folders, for else they are
            copied.
        progress: Told in words what is being done.
        complete: Refuse other numbers of images than the published ones.

    Returns:
        What ``dataset.json`` holds; ``pixels`` counts those of every class, and of ``ignored``, by split.

    Raises:
        FileNotFoundError: An archive is missing, or none of them holds images or labels of the set.
        FileExistsError: There is something at ``output``.
        ValueError: An unknown name, damaged archives, images without labels, other numbers of images, label files of
            another size or with other values than the set's, each named and counted.
    """
    if name not in LAYOUTS:
        raise ValueError(f"no set of labelled scenes {name!r}, expected one of {', '.join(LAYOUTS)}")
    layout, paths = LAYOUTS[name], [Path(archive) for archive in archives]
    with unpacked(paths, output, progress) as (folders, target, sources):
        images, labels = _match(name, layout, folders)
        _check_pairs(name, layout, images, labels, complete)
        pixels = _check_files(name, layout, images, labels, progress)
        own = [folder for folder, path in zip(folders, paths, strict=True) if path.is_dir()]
        suffix = next(iter(images.values())).suffix.lower()
        for kind, files, ending in (("images", images, suffix), ("labels", labels, ".png")):
            _arrange(files, target / kind, ending, own, progress)
        names = {split: sorted(item for part, item in images if part == split) for split in layout.counts}
        info = dict(
            format=FORMAT,
            name=name,
            suffix=suffix,
            splits=names,
            counts={split: len(items) for split, items in names.items()},
            pixels=pixels,
            sources=sources,
        )
        (target / "dataset.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return info


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Path below the folder, with its name, and the file."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__MACOSX")
        place = Path(folder.name, Path(parent).relative_to(folder)).as_posix()
        yield from ((f"{place}/{name}", Path(parent, name)) for name in files if not name.startswith("."))


def _match(name: str, layout: SemanticLayout, folders: Sequence[Path]) -> tuple[dict[Key, Path], dict[Key, Path]]:
    """Images and label files by split and identifier."""
    patterns = [re.compile(rf"(?:^|.*/){pattern}$") for pattern in (layout.image, layout.label)]
    found: tuple[dict[Key, Path], dict[Key, Path]] = ({}, {})
    for folder in folders:
        for place, path in _files(folder):
            for pattern, files in zip(patterns, found, strict=True):
                match = pattern.match(place.lower())
                if match is None:
                    continue
                key = layout.parts[match["split"]], place[slice(*match.span("id"))]
                if key in files:
                    raise ValueError(f"{name}: {key[1]} occurs twice, in {files[key]} and {path}; keep one of them")
                files[key] = path
    for files, what, form in zip(found, ("image", "label file"), (layout.image, layout.label), strict=True):
        if not files:
            raise FileNotFoundError(
                f"the archives hold no {what} of {name} (paths like {form}); expected {layout.archives}"
            )
    return found


def _check_pairs(
    name: str, layout: SemanticLayout, images: dict[Key, Path], labels: dict[Key, Path], complete: bool
) -> None:
    lacking, strange = sorted(set(images) - set(labels)), sorted(set(labels) - set(images))
    if lacking or strange:
        first = [[f"{split}/{item}" for split, item in keys[:3]] for keys in (lacking, strange)]
        raise ValueError(
            f"{name}: {len(lacking)} images have no label file {first[0]}, {len(strange)} label files have no image "
            f"{first[1]}; give {layout.archives}"
        )
    counts = {split: sum(part == split for part, _ in images) for split in layout.counts}
    if complete and counts != layout.counts:
        raise ValueError(
            f"{name} has {layout.counts} images, the archives hold {counts}; give {layout.archives}, or --partial "
            "(complete=False) to go on with a part"
        )


def _check_files(
    name: str, layout: SemanticLayout, images: dict[Key, Path], labels: dict[Key, Path], progress: Progress | None
) -> dict[str, dict[str, int]]:
    """Pixels of each class by split.

    Raises:
        ValueError: Files with faults, counted, the first ones named.
    """
    table, faults = layout.table(), []
    totals = {split: np.zeros(256, np.int64) for split in layout.counts}

    def survey(key: Key) -> np.ndarray | str:
        try:
            return _values(images[key], labels[key], table)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for number, (key, found) in enumerate(zip(images, pool.map(survey, images), strict=True), 1):
            if isinstance(found, str):
                faults.append(found)
            else:
                totals[key[0]] += found
            if progress and (number % _STEP == 0 or number == len(images)):
                progress(f"{name}: {number} of {len(images)} label files checked")
    if faults:
        raise ValueError(f"{name}: {len(faults)} pairs are wrong; " + "; ".join(faults[:3]))
    return {
        split: dict(
            ignored=int(counts[table == IGNORE].sum()),
            **dict(zip(layout.classes, counts[list(layout.values)].tolist(), strict=True)),
        )
        for split, counts in totals.items()
    }


def _values(image: Path, label: Path, table: np.ndarray) -> np.ndarray:
    """How often each value of a label file occurs, ``[256]``; ValueError where it is wrong."""
    try:
        with Image.open(image) as file:
            width, height = file.size
    except READ_ERRORS as error:
        raise ValueError(f"cannot read image {image}: {error}; take it from the archive anew") from error
    with open_label(label) as file:
        if file.size != (width, height):
            raise ValueError(
                f"{image} is {height} x {width} (height x width), its label file {label} {file.height} x {file.width}"
            )
        try:
            counts = np.array(file.histogram(), np.int64)
        except READ_ERRORS as error:
            raise ValueError(f"cannot read label file {label}: {error}; take it from the archive anew") from error
    if counts[table == UNKNOWN].any():
        raise ValueError(wrong_values(label, counts, table))
    return counts


def _arrange(files: dict[Key, Path], target: Path, ending: str, own: Sequence[Path], progress: Progress | None) -> None:
    """Move files to ``target/SPLIT/ID``; those of a user's own folders are linked, or copied where that fails."""
    linking = True
    for split in {split for split, _ in files}:
        (target / split).mkdir(parents=True)
    for (split, item), path in files.items():
        place = target / split / (item + ending)
        if not any(path.is_relative_to(folder) for folder in own):
            path.rename(place)
            continue
        try:
            if linking:
                os.link(path.resolve(), place)
                continue
        except OSError:
            linking = False
            if progress:
                progress(f"copying {len(files)} files, since {path.parent} and {target.parent} share no file system")
        shutil.copyfile(path, place)
