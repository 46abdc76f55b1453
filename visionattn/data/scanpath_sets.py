"""Published sets of scanpaths, from the files as downloaded to a folder that ``ScanpathFolder`` reads.

amazon: book covers of the STI data set (DFKI-Interactive-Machine-Learning/STI-Dataset) as OAT uses them. shelves:
    OAT's wine,
shampoo and yogurt shelves. cocosearch18: arXiv and Scientific Reports 2021,
https://sites.google.com/view/cocosearch. mit1003: Judd et al. 2009, or any images with a table of fixations.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.archives import Progress, unpacked
from visionattn.data.datasets import EXTENSIONS
from visionattn.data.scanpath import FILE, FORMAT, divide

Entry = dict[str, Any]
Found = tuple[list[tuple[Path, Entry]], dict[str, int]]
BOOKS = (6, 14)
SHELVES = {"Q1": (2, 11, 449, 152), "Q2": (3, 9, 305, 186), "Q3": (3, 9, 305, 186)}
"""Rows, columns, height and width of a cell in pixels; on screens of 1680 x 1050 the shelves end at the lower edge."""
SCREEN = (1680, 1050)
COCO_GRID, MIT_GRID = (6, 10), (6, 8)


def grid_boxes(rows: int, cols: int, width: float, height: float, top: float = 0.0) -> list[list[float]]:
    """Boxes of a grid, row by row, for cells of ``width`` x ``height`` pixels below ``top``."""
    return [
        [c * width, top + r * height, (c + 1) * width, top + (r + 1) * height] for r in range(rows) for c in range(cols)
    ]


def mask_boxes(mask: np.ndarray) -> np.ndarray:
    """Boxes of the bright parts of a mask, in the published order: by ``ymin // 10 * 10``, then ``xmin``.

    Parts of less than a tenth of the median part's area are taken for noise of the compression.

    Args:
        mask: ``[H, W]`` uint8.

    Returns:
        ``[N, 4]``.
    """
    from scipy import ndimage

    found, _ = ndimage.label(mask > 127)
    boxes = np.array([[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in ndimage.find_objects(found)], dtype=float)
    if not len(boxes):
        return np.zeros((0, 4))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    boxes = boxes[area >= np.median(area[area >= area.max() / 10]) / 10]
    return boxes[np.lexsort((boxes[:, 0], boxes[:, 1] // 10 * 10))]


def overlap(box: Sequence[float], boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of a box with every one of ``boxes`` ``[N, 4]``."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    both = np.clip(high - low, 0, None).prod(1)
    return both / ((boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2] - box[0]) * (box[3] - box[1]) - both)


def _files(folders: Sequence[Path]) -> dict[str, Path]:
    """Every file by its path, in lower case, from its folder."""
    return {
        f"{folder.name}/{path.relative_to(folder).as_posix()}".lower(): path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__MACOSX" not in path.parts and not path.name.startswith(".")
    }


def _image(files: dict[str, Path], ending: str, without: str = "binarymask/") -> Path | None:
    """The image whose path ends with ``/ending``, with or without the ending of its name."""
    ending = ending.lower()
    names = [ending] if ending.endswith(EXTENSIONS) else [ending + e for e in EXTENSIONS]
    hits = [p for key, p in files.items() if any(key.endswith("/" + n) for n in names) and without not in key]
    return hits[0] if hits else None


def _need(image: Path | None, name: str, wanted: str) -> Path:
    if image is None:
        raise ValueError(f"{name}: the archives hold no image {wanted}; give all archives of the set")
    return image


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no JSON file: {error}; load it anew") from error


def amazon(files: dict[str, Path], complete: bool) -> Found:
    """Book covers: ``Amazon.json`` (or ``amazon_data.json``), ``images/``, and OAT's ``binarymask/14x6-NAME`` if given.

    Departures from the published preparation: every viewer keeps the own scanpath (there, a slip gives all six of an
    image to the last one); without the masks of OAT the 84 books are the cells of an even grid.
    """
    tables = [p for key, p in files.items() if key.endswith(("/amazon.json", "/amazon_data.json"))]
    if not tables:
        raise FileNotFoundError("amazon: the archives hold no Amazon.json; see docs/scanpath.md for the files expected")
    content, found = _json(tables[0]), []
    if complete and len(content) != 100:
        raise ValueError(f"amazon has 100 images, Amazon.json names {len(content)}; use --partial to go on")
    counts = dict(scanpaths=0, too_long_or_short=0, empty=0, masks=0)
    lengths = np.array([len(p) for e in content.values() for p in e["fixations"].values()])
    low, high = lengths.mean() - 3 * lengths.std(), lengths.mean() + 3 * lengths.std()
    for name, given in content.items():
        image = _need(_image(files, f"images/{name}"), "amazon", f"images/{name}")
        width, height = given["size"]["width"], given["size"]["height"]
        mask = _image(files, f"binarymask/14x6-{name}", without="\0")
        boxes = np.array(grid_boxes(*BOOKS, width / BOOKS[1], height / BOOKS[0]))
        if mask is not None:
            counts["masks"] += 1
            boxes = mask_boxes(np.asarray(Image.open(mask).convert("L")))
            if len(boxes) != BOOKS[0] * BOOKS[1]:
                raise ValueError(
                    f"amazon: {mask.name} has {len(boxes)} parts, expected 84; repair it, or give no masks"
                )
        truth = given["ground_truth"][0]
        shares = overlap([truth["xmin"], truth["ymin"], truth["xmax"], truth["ymax"]], boxes)
        if shares.max() <= 0:
            raise ValueError(f"amazon: the target of {name} meets none of its {len(boxes)} books")
        paths = {v: p for v, p in given["fixations"].items() if len(p) and low <= len(p) <= high}
        counts["scanpaths"] += len(paths)
        counts["empty"] += sum(not len(p) for p in given["fixations"].values())
        counts["too_long_or_short"] += sum(
            bool(len(p)) and not low <= len(p) <= high for p in given["fixations"].values()
        )
        entry = dict(size=[width, height], boxes=boxes.tolist(), target=int(shares.argmax()), grid=list(BOOKS))
        found.append((image, entry | dict(fixations=paths)))
    return found, counts


def shelves(files: dict[str, Path], complete: bool) -> Found:
    """Shelves: tables as CSV with ``ID, Question, X, Y, T_Package, Sub_ID`` and images ``QUESTION/ID.png``.

    The published tables are Excel files: save each sheet as CSV. Images are looked for under the column ``Image``
    where there is one. Rows of one ``Question, ID, Sub_ID`` are one scanpath, in their order; ``T_Package`` counts
    from 1.
    """
    tables = [p for key, p in files.items() if key.endswith(".csv")]
    if not tables:
        other = sorted(p.name for key, p in files.items() if key.endswith((".xlsx", ".xls", ".pkl", ".pickle")))
        raise FileNotFoundError(
            f"shelves: the archives hold no CSV table{f', only {other[:3]}' if other else ''}; save the sheets of the "
            "Excel files as CSV. Pickle files are not read, since that could run code"
        )
    trials: dict[tuple[str, str], dict[str, list[list[float]]]] = {}
    targets: dict[tuple[str, str], int] = {}
    for table in tables:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        lacking = {"ID", "Question", "X", "Y", "T_Package", "Sub_ID"} - (rows[0].keys() if rows else set())
        if lacking:
            raise ValueError(f"{table.name} lacks the columns {sorted(lacking)}; see docs/scanpath.md")
        for row in rows:
            if row["Question"] not in SHELVES:
                raise ValueError(f"{table.name}: the question {row['Question']!r} is none of {', '.join(SHELVES)}")
            key = row["Question"], row.get("Image") or row["ID"]
            trials.setdefault(key, {}).setdefault(row["Sub_ID"], []).append([float(row["X"]), float(row["Y"])])
            if targets.setdefault(key, int(row["T_Package"]) - 1) != int(row["T_Package"]) - 1:
                raise ValueError(f"{table.name}: {'/'.join(key)} has several targets; each needs an ID of its own")
    found = []
    for (question, item), paths in trials.items():
        rows_, cols, height, width = SHELVES[question]
        image = _need(_image(files, f"{question}/{item}"), "shelves", f"{question}/{item}")
        boxes = grid_boxes(rows_, cols, width, height, SCREEN[1] - rows_ * height)
        entry = dict(size=list(SCREEN), boxes=boxes, target=targets[question, item], grid=[rows_, cols], group=question)
        found.append((image, entry | dict(fixations=paths)))
    return found, dict(scanpaths=sum(len(e["fixations"]) for _, e in found))


def cocosearch18(files: dict[str, Path], complete: bool) -> Found:
    """COCO-Search18: ``coco_search18_fixations_*.json`` and images ``TASK/NAME`` of 1680 x 1050 pixels.

    The objects are the cells of a grid of 6 x 10, for the set gives a box for the target alone. The target is the
    cell with the middle of its box; trials without it in the image have none. The first fixation, which the fixation
    cross fixed, and wrong answers are left out.
    """
    tables = [p for key, p in files.items() if key.endswith(".json") and "fixations" in p.name.lower()]
    if not tables:
        raise FileNotFoundError("cocosearch18: the archives hold no coco_search18_fixations_*.json")
    rows, cols = COCO_GRID
    width, height = SCREEN[0] / cols, SCREEN[1] / rows
    boxes, found, counts = grid_boxes(rows, cols, width, height), {}, dict(scanpaths=0, wrong=0, empty=0, no_image=0)
    for trial in (trial for table in tables for trial in _json(table)):
        task, name = str(trial["task"]), trial["name"]
        image = _image(files, f"{task}/{name}") or _image(files, f"{task.replace(' ', '_')}/{name}")
        points = [[x, y] for x, y in zip(trial["X"], trial["Y"], strict=True)][1:]
        reason = "no_image" if image is None else "wrong" if not trial.get("correct", 1) else "" if points else "empty"
        if image is None and complete:
            raise ValueError(f"cocosearch18: no image {task}/{name}; give all archives, or --partial to go on without")
        if reason or image is None:
            counts[reason] += 1
            continue
        target = None
        if trial.get("condition") != "absent" and trial.get("bbox"):
            x, y, w, h = trial["bbox"]
            column, row = int((x + w / 2) // width), int((y + h / 2) // height)
            if not (0 <= column < cols and 0 <= row < rows):
                raise ValueError(f"cocosearch18: the target of {task}/{name} lies outside the image: {trial['bbox']}")
            target = row * cols + column
        split = {"valid": "val", "validation": "val"}.get(trial["split"], trial["split"])
        entry = dict(size=list(SCREEN), boxes=boxes, target=target, grid=[rows, cols], group=task, split=split)
        key = task, name, target is None
        found.setdefault(key, (image, entry | dict(fixations={})))[1]["fixations"][str(trial["subject"])] = points
        counts["scanpaths"] += 1
    return list(found.values()), counts


def mit1003(files: dict[str, Path], complete: bool) -> Found:
    """Images, and their fixations as CSV (``image, subject, x, y``, in order) or JSON ``{image: {subject: [[x, y],
    ...]}}``.

    MIT1003 itself comes as MATLAB files; write them out in either form. Nobody looked for anything, so there is no
    target. The objects are the cells of a grid of 6 x 8.
    """
    paths: dict[str, dict[str, list[list[float]]]] = {}
    for key, path in files.items():
        if key.endswith(".csv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                for row in csv.DictReader(file):
                    if not {"image", "subject", "x", "y"} <= row.keys():
                        raise ValueError(f"{path.name} has the columns {list(row)}, expected image, subject, x, y")
                    at = [float(row["x"]), float(row["y"])]
                    paths.setdefault(row["image"], {}).setdefault(row["subject"], []).append(at)
        elif key.endswith(".json"):
            for name, viewers in _json(path).items():
                paths.setdefault(name, {}).update(viewers)
    if not paths:
        raise FileNotFoundError("mit1003: the archives hold no fixations as CSV or JSON; see docs/scanpath.md")
    found, rows, cols = [], *MIT_GRID
    counts = dict(scanpaths=0, empty=0)
    for name, viewers in paths.items():
        image = _need(_image(files, name), "mit1003", name)
        with Image.open(image) as opened:
            width, height = opened.size
        kept = {str(v): p for v, p in viewers.items() if len(p)}
        counts["scanpaths"] += len(kept)
        counts["empty"] += len(viewers) - len(kept)
        boxes = grid_boxes(rows, cols, width / cols, height / rows)
        entry = dict(size=[width, height], boxes=boxes, target=None, grid=[rows, cols], fixations=kept)
        found.append((image, entry))
    return found, counts


READERS: dict[str, Callable[[dict[str, Path], bool], Found]] = dict(
    amazon=amazon, shelves=shelves, cocosearch18=cocosearch18, mit1003=mit1003
)
"""Name of a set to the function that finds its images and scenes."""


def prepare(
    name: str,
    archives: Iterable[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    complete: bool = True,
) -> Entry:
    """Unpack and convert a published set; nothing is fetched.

    Writes ``OUTPUT/images/`` and ``OUTPUT/scenes.json``. The folder appears under its name only when everything is
    in it.

    Args:
        name: One of ``READERS``.
        archives: The files as downloaded (zip, tar, tar.gz, gz), or folders of their contents.
        output: Folder to write, which must not exist yet.
        progress: Told in words what is being done.
        complete: Refuse another number of images than the published one.

    Returns:
        What ``scenes.json`` holds, and ``splits``: the names of the scenes in each.

    Raises:
        FileNotFoundError: An archive or the set's table is missing.
        FileExistsError: There is something at ``output``.
        ValueError: Damaged or unfitting files, by name.
    """
    with unpacked(archives, output, progress) as (folders, target, sources):
        try:
            found, counts = READERS[name](_files(folders), complete)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{name}: the tables have another layout ({type(error).__name__}: {error})") from error
        (target / "images").mkdir(parents=True)
        scenes = []
        for number, (image, entry) in enumerate(found):
            if progress:
                progress(f"{name}: {number + 1} of {len(found)}, {image.name}")
            with Image.open(image) as opened:
                if list(opened.size) != entry["size"]:
                    raise ValueError(f"{name}: {image.name} has {opened.size} pixels, expected {tuple(entry['size'])}")
            place = f"images/{number:05d}{image.suffix.lower()}"
            shutil.copyfile(image, target / place)
            if entry["fixations"]:
                scenes.append({"image": place, "name": f"{image.parent.name}/{image.stem}", **entry})
        content = dict(format=FORMAT, name=name, counts=counts | dict(scenes=len(scenes)), scenes=scenes)
        content["sources"] = sources
        (target / FILE).write_text(json.dumps(content), encoding="utf-8")
    return content | dict(splits=_splits(scenes))


def _splits(scenes: list[Entry]) -> dict[str, list[str]]:
    if any("split" in scene for scene in scenes):
        names = sorted({scene["split"] for scene in scenes})
        return {split: [scene["name"] for scene in scenes if scene["split"] == split] for split in names}
    return {split: [scenes[i]["name"] for i in chosen] for split, chosen in divide(len(scenes), 0).items()}
