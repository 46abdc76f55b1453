"""From a published set's archives to one folder of PNG files that ``PreparedDataset`` reads."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.archives import Progress, unpacked
from visionattn.data.datasets import EXTENSIONS
from visionattn.data.layouts import LAYOUTS, Layout
from visionattn.data.masks import check_sizes, read_mask, read_pixels

FORMAT = 1


def prepare(
    name: str,
    archives: Iterable[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Unpack, check and convert a published set; nothing is fetched.

    Writes ``OUTPUT/images/ID.png``, ``masks/ID.png`` (labels), ``fields/ID.png`` (0 and 255) where the set has
    fields of view, and ``dataset.json``. The folder appears under its name only when everything is in it.

    Args:
        name: One of ``LAYOUTS``: drive, chase, stare, hrf, isic2018, refuge, dsb2018, kvasir, cvc.
        archives: The files as downloaded (zip, tar, tar.gz, gz), or folders of their contents.
        output: Folder to write, which must not exist yet.
        progress: Told in words what is being done.
        complete: Refuse another number of images than the published one.

    Returns:
        What ``dataset.json`` holds.

    Raises:
        FileNotFoundError: An archive is missing, or none of them holds images of the set.
        FileExistsError: There is something at ``output``.
        ValueError: An unknown name, damaged archives, images without masks and the like, each named and counted.
    """
    if name not in LAYOUTS:
        raise ValueError(f"no published set {name!r}, expected one of {', '.join(LAYOUTS)}")
    with unpacked(archives, output, progress) as (folders, target, sources):
        info = _convert(name, LAYOUTS[name], folders, target, progress, complete)
        info["sources"] = sources
        (target / "dataset.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return info


def _convert(
    name: str, layout: Layout, folders: Sequence[Path], target: Path, progress: Progress | None, complete: bool
) -> dict[str, Any]:
    images, masks, fields = _match(name, layout, folders)
    names = sorted(images)
    _check_pairs(name, layout, images, masks, fields, complete)
    groups = _groups(layout, folders, names)
    splits = layout.split(names, groups)
    for kind in ("images", "masks", *(["fields"] if fields else [])):
        (target / kind).mkdir(parents=True)
    empty = []
    for number, item in enumerate(names):
        if progress:
            progress(f"{name}: {number + 1} of {len(names)}, {item}")
        pixels = read_pixels(images[item], 3)
        _save(pixels, target / "images" / f"{item}.png")
        if item in masks:
            mask = _labels(masks[item], layout)
            check_sizes(pixels, mask, images[item])
            _save(mask.astype(np.uint8), target / "masks" / f"{item}.png")
            empty += [] if mask.any() else [item]
        if item in fields:
            field = read_mask(fields[item][0], ("outside", "inside"))
            check_sizes(pixels, field, fields[item][0])
            _save((field * 255).astype(np.uint8), target / "fields" / f"{item}.png")
    return dict(
        format=FORMAT,
        name=name,
        classes=list(layout.classes),
        splits={split: [names[i] for i in numbers] for split, numbers in splits.items()},
        groups=dict(zip(names, groups, strict=True)),
        unlabelled=sorted(set(names) - set(masks)),
        fields=bool(fields),
        spacing=None,
        counts=dict(images=len(names), masks=len(masks), fields=len(fields), empty_masks=len(empty)),
        note=layout.note,
    )


def _match(
    name: str, layout: Layout, folders: Sequence[Path]
) -> tuple[dict[str, Path], dict[str, list[Path]], dict[str, list[Path]]]:
    """Images, masks and fields by identifier."""
    found: dict[str, dict[str, list[Path]]] = dict(image={}, mask={}, field={})
    patterns = dict(image=layout.image, mask=layout.mask, field=layout.field)
    compiled = {kind: re.compile(rf"(?:^|.*/){pattern}$") for kind, pattern in patterns.items() if pattern}
    ignored = re.compile(rf"(?:^|.*/){layout.ignored}$") if layout.ignored else None
    surplus = []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            place = path.relative_to(folder).as_posix()
            if not path.is_file() or not path.name.lower().endswith(EXTENSIONS) or path.name.startswith("."):
                continue
            if "__MACOSX" in place:
                continue
            # a field's or a mask's pattern may be a special case of an image's
            matches = [
                (kind, match)
                for kind in ("field", "mask", "image")
                if kind in compiled
                for match in [compiled[kind].match(f"{folder.name}/{place}".lower())]
                if match
            ]
            if matches:
                kind, match = matches[0]
                part = match.groupdict().get("part")
                found[kind].setdefault(f"{part}_{match['id']}" if part else match["id"], []).append(path)
            elif not (ignored and ignored.match(place.lower())):
                surplus.append(place)
    if not found["image"]:
        raise FileNotFoundError(
            f"the archives hold no image of {name} (paths like {layout.image}); {len(surplus)} other images, "
            f"first {surplus[:3]}; see docs/segmentation_data.md for the archives expected"
        )
    if surplus:
        raise ValueError(
            f"{name}: {len(surplus)} images do not belong to the set, first {surplus[:3]}; give only its own archives"
        )
    if layout.copies:
        copy = re.compile(rf"(?:^|.*/){layout.copies}$")
        for files in (*found["image"].values(), *found["mask"].values()):
            files[:] = [path for path in files if not copy.match(path.as_posix().lower())] or files
    double = {item: paths for item, paths in found["image"].items() if len(paths) > 1}
    if double:
        item, paths = next(iter(double.items()))
        raise ValueError(f"{name}: {len(double)} images occur twice, first {item!r}: {[str(p) for p in paths[:2]]}")
    return {item: paths[0] for item, paths in found["image"].items()}, found["mask"], found["field"]


def _check_pairs(
    name: str,
    layout: Layout,
    images: dict[str, Path],
    masks: dict[str, list[Path]],
    fields: dict[str, list[Path]],
    complete: bool,
) -> None:
    if complete and len(images) != layout.counts:
        raise ValueError(
            f"{name} has {layout.counts} images, the archives hold {len(images)}; give all archives of the set, or "
            "complete=False to go on with a part"
        )
    several = [] if layout.instances else [item for item, paths in masks.items() if len(paths) > 1]
    if several:
        raise ValueError(f"{name}: {len(several)} images have several masks, first {several[0]!r}; keep one of each")
    if not masks:
        raise FileNotFoundError(
            f"{name}: the archives hold {len(images)} images but no mask (paths like {layout.mask})"
        )
    names, groups = sorted(images), [layout.group(item) for item in sorted(images)]
    may_lack = {names[i] for i in layout.split(names, groups)["test"]} if layout.unlabelled else set()
    lacking = sorted(set(images) - set(masks) - may_lack)
    strange = sorted((set(masks) | set(fields)) - set(images))
    if lacking or strange:
        raise ValueError(
            f"{name}: {len(lacking)} images have no mask {lacking[:3]}, {len(strange)} masks or fields of view have "
            f"no image {strange[:3]}; give all archives of the set"
        )
    blind = sorted(set(images) - set(fields)) if fields else []
    if blind:
        raise ValueError(f"{name}: {len(blind)} images have no field of view {blind[:3]}; give all archives of the set")


def _groups(layout: Layout, folders: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The group of every image, from the set's own table if the archives hold one."""
    if layout.group_table:
        name, image, group = layout.group_table
        tables = [path for folder in folders for path in folder.rglob(name)]
        if tables:
            with tables[0].open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            if not rows or not {image, group} <= rows[0].keys():
                raise ValueError(f"{tables[0].name} has no columns {image!r} and {group!r}; repair or remove it")
            table = {Path(row[image]).stem.lower(): row[group] for row in rows}
            lacking = [item for item in names if item not in table]
            if lacking:
                raise ValueError(
                    f"{tables[0].name} names no group of {len(lacking)} images, first {lacking[:3]}; "
                    "repair or remove it"
                )
            return [table[item] for item in names]
    return [layout.group(item) for item in names]


def _labels(paths: Sequence[Path], layout: Layout) -> np.ndarray:
    if layout.values:
        values = read_pixels(paths[0], 1)[..., 0]
        strange = sorted(set(np.unique(values).tolist()) - {value for value, _ in layout.values})
        if strange:
            raise ValueError(f"mask {paths[0]} has the values {strange[:5]}, expected {[v for v, _ in layout.values]}")
        mask = np.zeros(values.shape, dtype=np.int64)
        for value, label in layout.values:
            mask[values == value] = label
        return mask
    mask = read_mask(paths[0], layout.classes, threshold=layout.threshold)
    for path in paths[1:]:
        other = read_mask(path, layout.classes, threshold=layout.threshold)
        check_sizes(mask, other, path)
        mask = np.maximum(mask, other)
    return mask


def _save(pixels: np.ndarray, path: Path) -> None:
    # PNG as PIL writes it has no 16 bits in colour
    grey = pixels.ndim == 3 and bool((pixels == pixels[..., :1]).all())
    if pixels.dtype == np.uint16 and not (pixels.ndim == 2 or grey):
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if grey else pixels).save(path)
