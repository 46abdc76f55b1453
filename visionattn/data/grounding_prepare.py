"""From a published grounding set's archives to one folder, and that folder as a source."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from visionattn.data.archives import Progress, unpacked
from visionattn.data.grounding import QuestionList, Row
from visionattn.data.grounding_layouts import LAYOUTS, Entry, index
from visionattn.data.images import read_image
from visionattn.data.masks import check_sizes, read_pixels
from visionattn.data.prepare import FORMAT
from visionattn.data.splits import SPLITS, check_split

_MAT = "ground_mask"


def prepare(
    name: str,
    archives: Iterable[str | Path],
    output: str | Path,
    progress: Progress | None = None,
    complete: bool = True,
) -> dict[str, Any]:
    """Unpack, check and convert a published grounding set; nothing is fetched.

    Writes ``OUTPUT/images`` (files as they are, each once), ``masks/ID.png`` (0 and 255) and ``dataset.json`` with the
    questions. The folder appears under its name only when everything is in it.

    Args:
        name: vizwiz, textvqa_x, vqs or vqa_x.
        archives: The files as downloaded, or folders of their contents.
        output: Folder to write, which must not exist yet.
        progress: Told in words what is being done.
        complete: Refuse questions without a text, image or mask, and another number than the published; otherwise
            leave them out and count them.

    Returns:
        What ``dataset.json`` holds.

    Raises:
        FileNotFoundError: An archive or a list in it is missing, or no question is complete.
        FileExistsError: There is something at ``output``.
        ValueError: An unknown name, damaged files, or incomplete questions, named and counted.
    """
    if name not in LAYOUTS:
        raise ValueError(f"no published grounding set {name!r}, expected one of {', '.join(LAYOUTS)}")
    with unpacked(archives, output, progress) as (folders, target, sources):
        entries = list(LAYOUTS[name].read(index(folders)))
        kept = _complete(name, entries, complete)
        info = dict(format=FORMAT, name=name, kind="grounding", **_convert(name, kept, target, progress))
        info["counts"] |= dict(left_out=len(entries) - len(kept))
        info["note"] = LAYOUTS[name].note
        info["sources"] = sources
        (target / "dataset.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    return info


def _complete(name: str, entries: list[Entry], complete: bool) -> list[Entry]:
    lacking = {
        "image": [e.name for e in entries if e.image is None],
        "mask": [e.name for e in entries if e.mask is None],
        "question": [e.name for e in entries if not e.question],
    }
    names = [entry.name for entry in entries]
    if twice := len(names) - len(set(names)):
        raise ValueError(f"{name}: {twice} questions occur twice; give every archive once")
    found = {key: f"{len(some)} have no {key} {some[:3]}" for key, some in lacking.items() if some}
    count = LAYOUTS[name].count
    if count is not None and len(entries) != count:
        found["count"] = f"the set has {count}"
    if complete and found:
        raise ValueError(
            f"{name}: of {len(entries)} questions {'; '.join(found.values())}; give all archives of the set, or go on "
            "with what is complete by --partial (complete=False)"
        )
    kept = [entry for entry in entries if entry.image and entry.mask and entry.question]
    if not kept:
        raise FileNotFoundError(f"{name}: no question is complete: {'; '.join(found.values())}; give all archives")
    return kept


def _convert(name: str, entries: list[Entry], target: Path, progress: Progress | None) -> dict[str, Any]:
    for kind in ("images", "masks"):
        (target / kind).mkdir(parents=True)
    images: dict[Path, str] = {}
    samples = {}
    for number, entry in enumerate(entries):
        if progress and number % 100 == 0:
            progress(f"{name}: {number + 1} of {len(entries)}, {entry.name}")
        mask = read_any_mask(Path(str(entry.mask)))
        path = Path(str(entry.image))
        if path not in images:
            images[path] = f"{path.parent.name}_{path.name}"
            _copy(path, target / "images" / images[path], mask)
        with Image.open(target / "images" / images[path]) as image:
            shape = np.empty((image.height, image.width))
        check_sizes(shape, mask, path)
        Image.fromarray(mask.astype(np.uint8) * 255).save(target / "masks" / f"{entry.name}.png")
        known = dict(question=entry.question, answer=entry.answer, image=images[path], group=entry.group)
        samples[entry.name] = known
    splits = {split: [entry.name for entry in entries if entry.split == split] for split in SPLITS}
    return dict(splits=splits, samples=samples, counts=dict(questions=len(samples), images=len(images)))


def _copy(path: Path, target: Path, mask: np.ndarray) -> None:
    """Copy an image that can be read; one whose mask fits it only as its EXIF data turn it is turned."""
    image = read_image(path, 3)
    if (image.height, image.width) != mask.shape:
        with Image.open(path) as stored:
            turned = ImageOps.exif_transpose(stored).convert("RGB")
        if (turned.height, turned.width) == mask.shape:
            turned.save(target, quality=95)
            return
    shutil.copyfile(path, target)


def read_any_mask(path: Path) -> np.ndarray:
    """A mask of a published set: ``.npy``, ``.mat`` (variable ``ground_mask``) or an image.

    A pixel belongs to the answer above half of the file's largest value (above 0 for files of 0 and 1).

    Returns:
        ``[H, W]`` bool.

    Raises:
        ImportError: ``.mat`` without the package scipy.
        ValueError: The file cannot be read or holds no ``[H, W]``.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".mat":
            try:
                from scipy.io import loadmat
            except ImportError as error:
                raise ImportError('.mat files need the package scipy: pip install "visionattn[ground]"') from error
            values = np.asarray(loadmat(path, variable_names=[_MAT])[_MAT])
        else:
            values = read_pixels(path, 1)[..., 0]
    except ImportError:
        raise
    except Exception as error:  # the readers raise a dozen types for damaged files
        raise ValueError(f"cannot read mask {path}: {type(error).__name__} {error}; load it anew") from error
    values = np.squeeze(values)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise ValueError(f"mask {path} has shape {list(values.shape)} of {values.dtype}, expected numbers [H, W]")
    return values > values.max(initial=0) / 2


class PreparedQuestions(QuestionList):
    """A folder that ``prepare`` wrote.

    Args:
        root: The folder with ``dataset.json``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        in_chans: Channels that images are read with, 1 or 3.
        name: Set that the folder must hold; None accepts any.

    Raises:
        FileNotFoundError: The folder or files of it are missing.
        ValueError: ``dataset.json`` is damaged or of another set, or the split is empty.
    """

    def __init__(self, root: str | Path, split: str = "train", in_chans: int = 3, name: str | None = None):
        check_split(split)
        root, path = Path(root), Path(root, "dataset.json")
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; write the folder with: visionattn data prepare NAME ARCHIVE...")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
            if info["format"] != FORMAT or info.get("kind") != "grounding":
                raise ValueError(
                    f"format {info['format']} of {info.get('kind', 'masks')}, expected {FORMAT}, grounding"
                )
            if name is not None and info["name"] != name:
                raise ValueError(f"it holds the set {info['name']!r}, expected {name!r}; correct data.root")
            rows = [_row(root, item, info["samples"][item]) for item in info["splits"][split]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be used: {error}; prepare the set anew") from error
        super().__init__(rows, in_chans, path)


def _row(root: Path, item: str, entry: dict[str, str]) -> Row:
    if Path(item).name != item or Path(entry["image"]).name != entry["image"]:
        raise ValueError(f"{item!r} or {entry['image']!r} is no name of a file without folders")
    image, mask = root / "images" / entry["image"], root / "masks" / f"{item}.png"
    return Row(item, image, mask, entry["question"], entry["answer"], entry["group"])
