"""How published sets of answer grounding are laid out: from unpacked folders to entries of image, mask and question.

Layouts follow public loaders of the sets, not the archives; ``docs/grounding.md`` says what was not verified.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionattn.data.splits import split_groups

Files = dict[str, Path]


@dataclass(frozen=True)
class Entry:
    """A question of a published set; image or mask None where the archives lack the file."""

    name: str
    split: str
    image: Path | None
    mask: Path | None
    question: str
    answer: str
    group: str


def vizwiz(files: Files) -> Iterator[Entry]:
    """VizWiz-VQA-Grounding: ``{train,val}_grounding.json``, ``{train,val}/NAME.jpg``, ``binary_masks_png``."""
    for split in ("train", "val"):
        for name, entry in read_json(files, rf"{split}_grounding\.json", dict).items():
            stem, answer = Path(name).stem, str(entry.get("most_common_answer", ""))
            image = files.get(f"{split}/{name}") or files.get(name)
            mask = files.get(f"{split}/{stem}.png")
            yield Entry(stem, split, image, mask, _text(entry, name), answer, name)


def textvqa_x(files: Files) -> Iterator[Entry]:
    """TextVQA-X: ``{train,val}_id.txt``, ``explanations_token.json``, ``seg/ID.npy``; TextVQA's questions, images."""
    asked = {}
    for path in _matching(files, r"textvqa_[\d.]+_(?:train|val|test)\.json"):
        asked.update({str(entry["question_id"]): entry for entry in _load(path, dict).get("data", [])})
    if not asked:
        raise FileNotFoundError("textvqa_x needs TextVQA's TextVQA_0.5.1_train.json (and _val); give them too")
    images = read_json(files, r"explanations_token\.json", dict)
    for split in ("train", "val"):
        for line in _one(files, rf"{split}_id\.txt").read_text(encoding="utf-8").split():
            entry, shown = asked.get(line, {}), images.get(line, {})
            name = str(shown.get("image") or f"{entry.get('image_id', line)}.jpg")
            answers = entry.get("answers") or [""]
            answer, mask = max(sorted(map(str, answers)), key=answers.count), _first(files, f"seg/{line}", _ARRAYS)
            yield Entry(line, split, files.get(f"train_images/{name}"), mask, _text(entry, line), answer, name)


def vqs(files: Files) -> Iterator[Entry]:
    """VQS: lists of regions and of questions, line by line; ``IMAGE.jpg_K.mat``; COCO 2014 images."""
    for split, part in (("train", "train"), ("val", "val")):
        regions = _lines(_one(files, rf"region{part}list\.txt"))
        # the published name is misspelt
        questions = _lines(_one(files, rf"region{part}[oq]uestionlist\.txt"))
        if len(regions) != len(questions):
            raise ValueError(f"vqs: {len(regions)} regions and {len(questions)} questions of {part}; load both anew")
        for number, (region, question) in enumerate(zip(regions, questions, strict=True)):
            name = Path(region.split()[0]).name
            match = re.match(r"(COCO_(?:train|val)2014_\d+)_(\d+)\.\w+$", name)
            if not match:
                raise ValueError(
                    f"vqs: line {number + 1} of {part} is {region!r}, expected .../COCO_val2014_ID_K.jpg 0"
                )
            image, k = match[1], match[2]
            mask = _anywhere(files, f"{image}.jpg_{k}.mat")
            yield Entry(f"{image}_{k}", split, _anywhere(files, f"{image}.jpg"), mask, question, "", image)


def vqa_x(files: Files) -> Iterator[Entry]:
    """VQA-X: ``visual/{val,test}/ID.*`` for VQA v2's questions; four fifths of the images of val are for training."""
    asked: dict[str, dict[str, Any]] = {}
    for path in _matching(files, r"v2_openended_mscoco_(?:train|val)2014_questions\.json"):
        asked.update({str(entry["question_id"]): entry for entry in _load(path, dict).get("questions", [])})
    if not asked:
        raise FileNotFoundError("vqa_x needs VQA's v2_OpenEnded_mscoco_val2014_questions.json; give it too")
    answers = {}
    for path in _matching(files, r"v2_mscoco_(?:train|val)2014_annotations\.json"):
        annotations = _load(path, dict).get("annotations", [])
        answers.update(
            {str(entry["question_id"]): str(entry.get("multiple_choice_answer", "")) for entry in annotations}
        )
    found = []
    for split in ("val", "test"):
        maps = {key: path for key, path in files.items() if re.match(rf"{split}/\d+\.\w+$", key) and _is_map(path)}
        for path in maps.values():
            entry = asked.get(path.stem, {})
            number = int(entry.get("image_id", 0))
            names = [f"COCO_{part}2014_{number:012d}" for part in ("val", "train")]
            image = next((file for name in names if (file := _anywhere(files, f"{name}.jpg"))), None)
            text, answer = _text(entry, path.stem), answers.get(path.stem, "")
            found.append(Entry(path.stem, split, image, path, text, answer, str(number)))
    first = [entry for entry in found if entry.split == "val"]
    if len({entry.group for entry in first}) > 1:
        parts = split_groups([entry.group for entry in first], val=0.2, test=0.0)
        training = {first[i].name for i in parts["train"]}
    else:
        training = set()
    for entry in found:
        split = "train" if entry.name in training else entry.split
        yield Entry(entry.name, split, entry.image, entry.mask, entry.question, entry.answer, entry.group)


@dataclass(frozen=True)
class GroundingLayout:
    """A published set: its reader, its number of questions (None: unknown), and what a user should know."""

    read: Callable[[Files], Iterator[Entry]]
    count: int | None
    note: str


LAYOUTS: dict[str, GroundingLayout] = {
    "vizwiz": GroundingLayout(vizwiz, None, "training and validation as published; the test has no public masks"),
    "textvqa_x": GroundingLayout(textvqa_x, 18_096, "training and validation as published"),
    "vqs": GroundingLayout(vqs, 96_064, "training and validation as published; no answers"),
    "vqa_x": GroundingLayout(
        vqa_x,
        None,
        "published maps exist for validation and test only: four fifths of the validation images serve training here",
    ),
}
_ARRAYS = (".npy", ".png", ".mat")


def index(folders: Sequence[Path]) -> Files:
    """Files by their last folder and name, which tell published files apart."""
    files: Files = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and "__MACOSX" not in path.parts:
                files[f"{path.parent.name}/{path.name}"] = path
                files.setdefault(path.name, path)
    return files


def read_json(files: Files, pattern: str, kind: type) -> Any:
    """The JSON file whose name matches, in lower case.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or no ``kind``.
    """
    return _load(_one(files, pattern), kind)


def _load(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}; load it anew") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path.name} holds a {type(found).__name__}, expected a {kind.__name__}; load it anew")
    return found


def _matching(files: Files, pattern: str) -> list[Path]:
    return sorted({path for path in files.values() if re.fullmatch(pattern, path.name.lower())})


def _one(files: Files, pattern: str) -> Path:
    found = _matching(files, pattern)
    if len(found) != 1:
        raise FileNotFoundError(f"the archives hold {len(found)} files named {pattern}, expected 1; give all archives")
    return found[0]


def _anywhere(files: Files, name: str) -> Path | None:
    return files.get(name)


def _first(files: Files, stem: str, endings: Sequence[str]) -> Path | None:
    return next((files[stem + ending] for ending in endings if stem + ending in files), None)


def _is_map(path: Path) -> bool:
    return path.suffix.lower() in (*_ARRAYS, ".jpg")


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _text(entry: dict[str, Any], name: str) -> str:
    return str(entry.get("question") or "").strip()
