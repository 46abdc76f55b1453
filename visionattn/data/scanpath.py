"""Scenes of objects with the scanpaths of those who looked at them, and a folder of such scenes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visionattn.data.images import check_channels, read_image
from visionattn.data.splits import check_split

FORMAT = 1
FILE = "scenes.json"


@dataclass
class Scene:
    """One image with objects.

    Args:
        name: Which scene it is.
        image: ``[H, W, 3]`` uint8.
        boxes: ``[N, 4]``: x1, y1, x2, y2 in pixels.
        places: ``[N, 2]``: row and column of each object, see ``places``.
        target: The object looked for, or None.
        paths: For each viewer the objects fixated one after the other.
        viewers: Their names.
        outside: How many fixations lay in no box.
    """

    name: str
    image: np.ndarray
    boxes: np.ndarray
    places: np.ndarray
    target: int | None
    paths: list[list[int]] = field(default_factory=list)
    viewers: list[str] = field(default_factory=list)
    outside: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        return self.image.shape[1], self.image.shape[0]

    @property
    def centres(self) -> np.ndarray:
        """Centres of the boxes ``[N, 2]``, x and y in pixels."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2


class ScanpathSource(Protocol):
    """Scenes by number, and the trials (a viewer of a scene) that training runs through."""

    classes: list[str]
    trials: list[tuple[int, int]]

    def __len__(self) -> int:
        """Number of trials."""
        ...

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        ...

    def scene(self, i: int) -> Scene:
        """Scene ``i`` with the paths of this split."""
        ...


def places(boxes: np.ndarray, size: tuple[int, int], rows: int, cols: int, regular: bool) -> np.ndarray:
    """Rows and columns of boxes.

    Args:
        boxes: ``[N, 4]`` pixels.
        size: Width and height of the image, pixels.
        rows: Rows of the grid, or that the height of the image is divided into.
        cols: Columns.
        regular: The boxes fill the grid row by row. Otherwise a box whose centre is that of a cell has that cell's
            row and column, and others lie between them.

    Returns:
        ``[N, 2]``, at least 0 and at most the last row and column.

    Raises:
        ValueError: A regular grid with another number of boxes.
    """
    if regular:
        if len(boxes) != rows * cols:
            raise ValueError(f"a grid of {rows} x {cols} has {rows * cols} objects, got {len(boxes)} boxes")
        i = np.arange(len(boxes))
        return np.stack([i // cols, i % cols], 1).astype(np.float64)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    found = centres[:, ::-1] / np.array(size[::-1]) * (rows, cols) - 0.5
    return np.clip(found, 0, (rows - 1, cols - 1))


def assign(points: np.ndarray, boxes: np.ndarray) -> tuple[list[int], int]:
    """The object of every fixation: the box around it, of several the one with the nearest centre.

    A fixation in no box belongs to the box with the nearest centre, and is counted.

    Args:
        points: ``[T, 2]`` pixels x, y.
        boxes: ``[N, 4]`` pixels.

    Returns:
        Object of each fixation, and how many lay outside every box.
    """
    x, y = points[:, :1], points[:, 1:]
    inside = (x >= boxes[:, 0]) & (x <= boxes[:, 2]) & (y >= boxes[:, 1]) & (y <= boxes[:, 3])
    distance = np.linalg.norm(points[:, None] - (boxes[:, :2] + boxes[:, 2:])[None] / 2, axis=-1)
    outside = ~inside.any(1)
    chosen = np.where(inside | outside[:, None], distance, np.inf).argmin(1)
    return chosen.tolist(), int(outside.sum())


def saliency(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How much each box stands out: the mean distance of its pixels from the image's median colour.

    Args:
        image: ``[H, W, 3]`` uint8.
        boxes: ``[N, 4]`` pixels.

    Returns:
        ``[N]`` in [0, 1].
    """
    pixels = image.astype(np.float64) / 255
    contrast = np.abs(pixels - np.median(pixels.reshape(-1, 3), 0)).mean(-1)
    return np.array([contrast[window(box, contrast.shape)].mean() for box in boxes])


def window(box: np.ndarray, shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of a box inside an image of ``shape`` (height, width, ...), at least one pixel."""
    x1, x2 = (round(float(v)) for v in np.clip(box[[0, 2]], 0, shape[1]))
    y1, y2 = (round(float(v)) for v in np.clip(box[[1, 3]], 0, shape[0]))
    x1, y1 = min(x1, shape[1] - 1), min(y1, shape[0] - 1)
    return slice(y1, max(y2, y1 + 1)), slice(x1, max(x2, x1 + 1))


def _points(given: Any, where: str) -> np.ndarray:
    try:
        found = np.array(given, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: fixations must be pairs of numbers [x, y]") from error
    if not found.size:
        raise ValueError(f"{where} has a scanpath without fixations; leave it out or give it one")
    if found.ndim != 2 or found.shape[1] != 2 or not np.isfinite(found).all():
        raise ValueError(f"{where}: fixations must be pairs of finite numbers [x, y], got an array {found.shape}")
    return found


def _boxes(entry: dict[str, Any], where: str) -> np.ndarray:
    try:
        boxes = np.array(entry.get("boxes") or np.zeros((0, 4)), dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: boxes must be lists [x1, y1, x2, y2] of numbers") from error
    if not len(boxes):
        raise ValueError(f"{where} has no objects; give at least one box [x1, y1, x2, y2]")
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"{where}: boxes must be lists [x1, y1, x2, y2] of numbers, got an array {boxes.shape}")
    wrong = np.flatnonzero((boxes[:, 2:] <= boxes[:, :2]).any(1))
    if len(wrong):
        raise ValueError(f"{where}: box {wrong[0]} is {boxes[wrong[0]].tolist()}, expected x1 < x2 and y1 < y2")
    return boxes


def check_entry(entry: Any, where: str) -> tuple[np.ndarray, int | None, dict[str, np.ndarray]]:
    """Boxes ``[N, 4]``, target and each viewer's fixations ``[T, 2]`` of a scene as JSON has it.

    Raises:
        ValueError: What is missing or wrong, with the scene's name.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise ValueError(f"{where}: expected an object with image, size, boxes, target and fixations")
    where = f"{where}, {entry['image']}"
    boxes, target = _boxes(entry, where), entry.get("target")
    if target is not None and not (type(target) is int and 0 <= target < len(boxes)):
        raise ValueError(f"{where}: the target {target!r} is none of the {len(boxes)} objects, which count from 0")
    given = entry.get("fixations", [])
    if isinstance(given, list):
        given = {str(i): points for i, points in enumerate(given)}
    if not isinstance(given, dict):
        raise ValueError(f"{where}: fixations must be a list of scanpaths, or one for each viewer's name")
    return boxes, target, {str(k): _points(v, f"{where}, viewer {k}") for k, v in given.items()}


def make_scene(entry: dict[str, Any], root: Path, rows: int, cols: int, where: str, in_chans: int = 3) -> Scene:
    """Read a scene.

    Args:
        entry: As JSON has it.
        root: Folder that its image's path starts from.
        rows: Rows of the grid.
        cols: Columns.
        where: Named in errors.
        in_chans: 3, or 1 for grey values in all three channels.

    Raises:
        FileNotFoundError: The image is missing.
        ValueError: It cannot be read or has another size than the entry says, or as ``check_entry``.
    """
    boxes, target, fixations = check_entry(entry, where)
    image = np.asarray(read_image(root / entry["image"], in_chans))
    image = image if image.ndim == 3 else np.repeat(image[..., None], 3, 2)
    size = image.shape[1], image.shape[0]
    if "size" in entry and tuple(entry["size"]) != size:
        raise ValueError(f"{where}, {entry['image']}: the image has {size} pixels, the file says {entry['size']}")
    regular = entry.get("grid") is not None
    if regular and list(entry["grid"]) != [rows, cols]:
        raise ValueError(
            f"{where}, {entry['image']} is a grid of {entry['grid']}, the network has {rows} x {cols}; set model.rows "
            "and model.cols"
        )
    found = places(boxes, size, rows, cols, regular)
    name = entry.get("name") or Path(entry["image"]).with_suffix("").as_posix()
    scene = Scene(name, image, boxes, found, target)
    for viewer, points in fixations.items():
        path, outside = assign(points, boxes)
        scene.paths.append(path)
        scene.viewers.append(viewer)
        scene.outside += outside
    return scene


def divide(count: int, seed: int) -> dict[str, list[int]]:
    """80, 10 and 10 % of ``count`` things in an order of chance: train, val and test, none of them empty from 3 on."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    tenth = max(round(count / 10), 1 if count > 2 else 0)
    return dict(
        train=order[: count - 2 * tenth], val=order[count - 2 * tenth : count - tenth], test=order[count - tenth :]
    )


class ScanpathFolder:
    """A folder with ``scenes.json`` and its images: own data, or what ``visionattn data prepare`` wrote.

    Args:
        root: The folder, or the JSON file.
        split: ``"train"``, ``"val"`` or ``"test"``.
        rows: Rows of the grid, or that the height of an image is divided into.
        cols: Columns.
        by: ``"scene"``, all viewers of an image in one split, or ``"trial"``, as OAT divides. Scenes with a
            ``split`` of their own keep it.
        seed: Of the division.
        in_chans: 3, or 1 for grey values.
        name: Set that the folder must hold; None accepts any.
        group: Only scenes whose ``group`` this is, for example one kind of shelf.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another set, or the split is empty, or as ``check_entry``.
    """

    classes = ["object"]

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        rows: int = 6,
        cols: int = 10,
        by: str = "scene",
        seed: int = 0,
        in_chans: int = 3,
        name: str | None = None,
        group: str | None = None,
    ):
        check_split(split)
        check_channels(in_chans)
        if by not in ("scene", "trial"):
            raise ValueError(f"by={by!r} must be scene or trial")
        path = Path(root, FILE) if Path(root).is_dir() else Path(root)
        self.root, self.rows, self.cols, self.in_chans = path.parent, rows, cols, in_chans
        self.path, content = path, read_scenes(path)
        if name is not None and content.get("name") != name:
            raise ValueError(f"{root} holds the set {content.get('name')!r}, expected {name!r}; correct data.root")
        entries = [e for e in content["scenes"] if group is None or (isinstance(e, dict) and e.get("group") == group)]
        viewers = [list(check_entry(entry, f"{path}, scene {i}")[2]) for i, entry in enumerate(entries)]
        trials = [(i, viewer) for i, found in enumerate(viewers) for viewer in found]
        own = [entry.get("split") for entry in entries]
        if any(own):
            kept = {(i, v) for i, v in trials if own[i] == split}
        elif by == "scene":
            chosen = set(divide(len(entries), seed)[split])
            kept = {(i, v) for i, v in trials if i in chosen}
        else:
            kept = {trials[k] for k in divide(len(trials), seed)[split]}
        if not kept:
            raise ValueError(
                f"{path} has no scanpath in split {split!r} ({len(entries)} scenes, {len(trials)} scanpaths)"
            )
        self.entries, self.viewers, self.trials = [], [], []
        for i in sorted({i for i, _ in kept}):
            names = [v for v in viewers[i] if (i, v) in kept]
            self.trials += [(len(self.entries), k) for k in range(len(names))]
            self.entries.append(entries[i])
            self.viewers.append(names)

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        return len(self.entries)

    def scene(self, i: int) -> Scene:
        """Scene ``i`` with the paths of this split."""
        found = make_scene(self.entries[i], self.root, self.rows, self.cols, str(self.path), self.in_chans)
        kept = [found.viewers.index(viewer) for viewer in self.viewers[i]]
        found.paths, found.viewers = [found.paths[k] for k in kept], self.viewers[i]
        return found

    def longest(self) -> int:
        """Fixations of the longest scanpath of the split."""
        given = ((self.entries[i]["fixations"], self.viewers[i][k]) for i, k in self.trials)
        return max(len(paths[viewer] if isinstance(paths, dict) else paths[int(viewer)]) for paths, viewer in given)


def read_scenes(path: Path) -> dict[str, Any]:
    """The content of ``scenes.json``: ``scenes``, ``name`` and more.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no scenes at {path}; give a folder with {FILE}, see docs/scanpath.md")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    content = {"scenes": content} if isinstance(content, list) else content
    if not isinstance(content, dict) or not isinstance(content.get("scenes"), list) or not content["scenes"]:
        raise ValueError(f"{path} holds no scenes; expected {{'scenes': [{{'image': ..., 'boxes': ...}}, ...]}}")
    if content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has the format {content['format']}, expected {FORMAT}; prepare the set anew")
    return content
