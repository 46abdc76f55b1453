"""Images with objects in COCO's format: https://cocodataset.org/#format-data."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.detection import Scene
from visionattn.data.images import check_channels, read_image

ANNOTATIONS = (
    "annotations/instances_{split}2017.json",
    "annotations/instances_{split}.json",
    "annotations/{split}.json",
    "{split}/_annotations.coco.json",
    "{split}.json",
)
"""Where the list of a split is looked for below the root."""
IMAGES = ("{split}2017", "images/{split}2017", "images/{split}", "{split}", "images", ".")
"""Where the images are."""
_EDGE = 1.0  # pixels by which rounding may carry a box over the image's edge


class CocoFolder:
    """A folder of images and a list of objects for each split.

    ``ROOT/annotations/instances_SPLIT2017.json`` with ``ROOT/SPLIT2017/``, as COCO comes, or own data: ``ANNOTATIONS``
    and ``IMAGES`` say what else is found. The list is checked as a whole before anything is trained.

    Args:
        root: The folder.
        split: Name of the split, what ``{split}`` stands for.
        in_chans: Channels that images are read with, 1 or 3.
        annotations: File of the list below the root, with ``{split}``; None looks for ``ANNOTATIONS``.
        images: Folder of the images below the root, with ``{split}``; None looks for ``IMAGES``.
        masks: Objects must have masks.
        bad_boxes: ``"raise"``, or ``"drop"`` to leave out objects whose box has no area or lies outside the image, as
            the usual loaders do: COCO itself has some.
        keep_empty: Keep images without objects; COCO's scores count them.

    Raises:
        FileNotFoundError: The root, the list or images are missing.
        ValueError: A list that is damaged, empty, or wrong in a way that the message names.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        in_chans: int = 3,
        annotations: str | None = None,
        images: str | None = None,
        masks: bool = False,
        bad_boxes: str = "raise",
        keep_empty: bool = True,
    ):
        check_channels(in_chans)
        if bad_boxes not in ("raise", "drop"):
            raise ValueError(f"bad_boxes={bad_boxes!r} must be raise or drop")
        self.in_chans, self.masks = in_chans, masks
        self.path = _find(Path(root), split, (annotations,) if annotations else ANNOTATIONS, "data.annotations", True)
        content = read_list(self.path)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.classes = [str(category["name"]) for category in categories]
        self.category_ids = [int(category["id"]) for category in categories]
        objects, self.dropped = check_objects(content, self.path, masks, bad_boxes == "drop")
        entries = [entry for entry in content["images"] if keep_empty or objects[entry["id"]]]
        if not entries:
            raise ValueError(f"{self.path} has no image with an object; set data.source.keep_empty=true")
        folder = _find(Path(root), split, (images,) if images else IMAGES, "data.images", False)
        self.entries = [(entry, objects[entry["id"]]) for entry in entries]
        self.files = [folder / str(entry["file_name"]) for entry in entries]
        missing = [path for path in self.files if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.path} names {len(self.files)} images, {len(missing)} of them missing, first {missing[0]}; "
                "correct data.images or the list"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Scene:
        entry, objects = self.entries[i]
        image = np.asarray(read_image(self.files[i], self.in_chans))
        height, width = image.shape[:2]
        if (height, width) != (entry["height"], entry["width"]):
            raise ValueError(
                f"{self.files[i]} has {width} x {height} pixels, {self.path} says {entry['width']} x {entry['height']}"
            )
        corners = np.array([item["bbox"] for item in objects], np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        number = {category: k for k, category in enumerate(self.category_ids, 1)}
        return Scene(
            image.reshape(height, width, self.in_chans),
            corners.clip(0, [width, height, width, height]),
            np.array([number[item["category_id"]] for item in objects], np.int64),
            str(entry["file_name"]),
            np.array([bool(item.get("iscrowd", 0)) for item in objects], bool),
            [encode_mask(item["segmentation"], height, width) for item in objects] if self.masks else None,
            np.array([item.get("area", item["bbox"][2] * item["bbox"][3]) for item in objects], np.float32),
        )


def _find(root: Path, split: str, patterns: Iterable[str], key: str, file: bool) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is no folder; expected annotations and images in COCO's format")
    places = [root / pattern.format(split=split) for pattern in patterns]
    found = next((path for path in places if (path.is_file() if file else path.is_dir())), None)
    if found is None:
        what = "list of objects" if file else "folder of images"
        tried = ", ".join(str(path.relative_to(root)) for path in places)
        raise FileNotFoundError(f"{root} has no {what} for split {split!r}; looked for {tried}; set {key}")
    return found


def read_list(path: Path) -> dict[str, Any]:
    """A list of objects with its images and categories, each number and name checked to occur once.

    Raises:
        ValueError: The file is no such list, is empty, or has numbers or names that occur twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({path.stat().st_size} bytes): {error}; load or write it anew") from error
    keys = dict(images=("id", "file_name", "width", "height"), categories=("id", "name"))
    keys["annotations"] = ("id", "image_id", "category_id", "bbox")
    for key, fields in keys.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path} has no list {key!r}; expected COCO's images, annotations and categories")
        if not content[key]:
            hint = "; a test set without published objects cannot be evaluated" if key == "annotations" else ""
            raise ValueError(f"{path}: the list {key!r} is empty{hint}")
        for item in content[key]:
            if not isinstance(item, dict) or (lacking := [name for name in fields if name not in item]):
                raise ValueError(f"{path}: an entry of {key!r} lacks {lacking or fields}: {str(item)[:120]}")
        for name in ("id", "name") if key == "categories" else ("id",):
            twice = [value for value, count in Counter(str(item[name]) for item in content[key]).items() if count > 1]
            if twice:
                raise ValueError(f"{path}: {len(twice)} {name}s occur twice in {key!r}, first {twice[0]!r}")
    for item in content["images"]:
        parts = Path(str(item["file_name"]))
        if parts.is_absolute() or ".." in parts.parts:
            raise ValueError(f"{path}: file_name={str(parts)!r} leads out of the folder of images")
    return content


def check_objects(content: dict[str, Any], path: Path, masks: bool, drop: bool) -> tuple[dict[int, list[Any]], int]:
    """Objects by the number of their image.

    Args:
        content: Of ``read_list``.
        path: Its file, for errors.
        masks: Every object must have a mask.
        drop: Leave out objects with boxes that cannot be used.

    Returns:
        Lists of objects, and how many were left out.

    Raises:
        ValueError: An object of an unknown image or category, without a mask, or an unusable box (unless ``drop``).
    """
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
    known = {category["id"]: category["name"] for category in content["categories"]}
    objects: dict[int, list[Any]] = defaultdict(list)
    dropped = 0
    for item in content["annotations"]:
        where = f"{path}: annotation {item['id']}"
        if item["image_id"] not in sizes:
            raise ValueError(f"{where} is of image {item['image_id']!r}, which the list does not have")
        if item["category_id"] not in known:
            some = ", ".join(f"{key} ({name})" for key, name in list(known.items())[:5])
            raise ValueError(f"{where} has the unknown category {item['category_id']!r}; known: {some}")
        if wrong := _wrong_box(item["bbox"], *sizes[item["image_id"]]):
            if not drop:
                raise ValueError(f"{where}: bbox={item['bbox']} {wrong}; correct it, or set data.bad_boxes=drop")
            dropped += 1
            continue
        if masks and (wrong := _wrong_mask(item.get("segmentation"), *sizes[item["image_id"]])):
            raise ValueError(f"{where}: segmentation {wrong}; correct it, or train boxes alone (data.masks=false)")
        objects[item["image_id"]].append(item)
    return objects, dropped


def _wrong_box(box: Any, width: int, height: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return "is not [left, top, width, height]"
    x, y, w, h = box
    if not all(map(math.isfinite, box)):
        return "is not finite"
    if w <= 0 or h <= 0:
        return "has no area"
    if x < -_EDGE or y < -_EDGE or x + w > width + _EDGE or y + h > height + _EDGE:
        return f"lies outside the image of {width} x {height} pixels"
    return None


def _wrong_mask(mask: Any, width: int, height: int) -> str | None:
    if isinstance(mask, dict):
        if "counts" not in mask or list(mask.get("size", [])) != [height, width]:
            return f"is a run-length encoding of size {mask.get('size')}, the image has {[height, width]}"
        if isinstance(mask["counts"], list) and sum(mask["counts"]) != width * height:
            return f"has runs over {sum(mask['counts'])} pixels, the image has {width * height}"
        return None
    if not isinstance(mask, list) or not mask:
        return "is missing; expected polygons or a run-length encoding"
    odd = [part for part in mask if not isinstance(part, list) or len(part) < 6 or len(part) % 2]
    return "has a polygon that is no list of three or more points x, y" if odd else None


def encode_mask(mask: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons or a run-length encoding to COCO's compressed one.

    Raises:
        ImportError: The package pycocotools is missing.
    """
    coder = _coder()
    if isinstance(mask, list):
        return coder.merge(coder.frPyObjects(mask, height, width))
    return coder.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask


def decode_mask(mask: dict[str, Any]) -> np.ndarray:
    """COCO's compressed encoding to ``[H, W]`` uint8.

    Raises:
        ImportError: The package pycocotools is missing.
    """
    return _coder().decode(mask)


def _coder() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError('masks need the package pycocotools: pip install "visionattn[det]"') from error
    return mask
