"""Images with questions and the masks that answer them: what a source gives, and folders of one's own."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from visionattn.data.images import check_channels
from visionattn.data.masks import check_sizes, read_mask, read_pixels
from visionattn.data.segmentation import Sample
from visionattn.data.splits import SPLITS, check_split, split_groups

CLASSES = ["background", "answer"]


@dataclass
class Question(Sample):
    """A sample of a segmentation with a question.

    Args:
        question: What is asked.
        answer: What the answer is, where known; no network sees it.
    """

    question: str = ""
    answer: str = ""


class GroundingSource(Protocol):
    """Questions by number; ``questions`` and ``groups`` (the image of each) are known without reading images.

    A source that knows all objects of its images may have ``foreground(i)``, their masks ``[H, W]`` (bool), and
    ``named(i)``, what question ``i`` names of its object: an evaluation then has baselines and a table by them.
    """

    classes: list[str]
    in_chans: int
    questions: list[str]
    groups: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Question:
        """Question ``i``; ValueError or FileNotFoundError, naming the file, where it cannot be read or is wrong."""
        ...


@dataclass(frozen=True)
class Row:
    """One question of a list: files, texts, and what its image is called."""

    name: str
    image: Path
    mask: Path
    question: str
    answer: str
    group: str


class QuestionList:
    """Questions about image files, with mask files.

    Args:
        rows: The questions.
        in_chans: Channels that images are read with, 1 or 3.
        where: What messages call the list.
        threshold: As for ``read_mask``.

    Raises:
        FileNotFoundError: Images or masks are missing.
        ValueError: An empty list or an empty question.
    """

    classes = CLASSES

    def __init__(self, rows: Sequence[Row], in_chans: int, where: Path, threshold: int | None = None):
        check_channels(in_chans)
        if not rows:
            raise ValueError(f"{where} has no question in this split; give others or another split")
        empty = [row.name for row in rows if not row.question.strip()]
        if empty:
            raise ValueError(f"{where}: {len(empty)} questions are empty, first that of {empty[0]}; write or remove it")
        missing = [f"image {row.image}" for row in rows if not row.image.is_file()]
        missing += [f"mask {row.mask} of image {row.image.name}" for row in rows if not row.mask.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{where}: {len(missing)} files are missing, first {missing[0]}; add or unlist them"
            )
        self.rows, self.in_chans, self.threshold = list(rows), in_chans, threshold
        self.questions = [row.question for row in rows]
        self.groups = [row.group for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Question:
        row = self.rows[i]
        image, mask = read_pixels(row.image, self.in_chans), read_mask(row.mask, CLASSES, threshold=self.threshold)
        check_sizes(image, mask, row.image)
        return Question(image, mask, row.name, row.group, question=row.question, answer=row.answer)


class QuestionFolder(QuestionList):
    """One's own data: ``ROOT/images``, ``ROOT/masks`` and ``ROOT/questions.json`` or ``questions.csv``.

    The list has an entry (JSON: an object of a list; CSV: a line) for each question, with ``image`` (a file of
    ``images``), ``mask`` (a file of ``masks``), ``question``, and perhaps ``answer`` and ``split`` (train, val, test).
    Without ``split`` images are divided at random and always alike for one ``seed``; questions of one image stay
    together. Masks are binary, as ``read_mask`` takes them.

    Args:
        root: The folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        in_chans: Channels that images are read with, 1 or 3.
        val: Share of the images for validation, where the list has no ``split``.
        test: Share of the images for the test, likewise.
        seed: Seed of that division.
        threshold: Smallest foreground value of masks; see ``read_mask``.

    Raises:
        FileNotFoundError: There is no list, or files that it names are missing.
        ValueError: A damaged list, an entry without a field, an unknown split, or a name that leads out of the folder.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        in_chans: int = 3,
        val: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        threshold: int | None = None,
    ):
        check_split(split)
        root = Path(root)
        where, entries = _read_list(root)
        rows = [_row(root, where, number, entry) for number, entry in enumerate(entries)]
        given = [str(entry.get("split") or "") for entry in entries]
        if any(given):
            if wrong := sorted(set(given) - set(SPLITS)):
                raise ValueError(f"{where} has the split {wrong[0]!r}, expected one of {', '.join(SPLITS)} for each")
            rows = [row for row, found in zip(rows, given, strict=True) if found == split]
        else:
            rows = [rows[i] for i in split_groups([row.group for row in rows], val, test, seed)[split]]
        super().__init__(rows, in_chans, where, threshold)


def _read_list(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    found = [path for path in (root / "questions.json", root / "questions.csv") if path.is_file()]
    if len(found) != 1:
        raise FileNotFoundError(f"{root} holds {len(found)} of questions.json and questions.csv, expected one of them")
    where = found[0]
    try:
        if where.suffix == ".json":
            entries = json.loads(where.read_text(encoding="utf-8"))
        else:
            with where.open(encoding="utf-8", newline="") as file:
                entries = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{where} is damaged: {error}; repair it") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise ValueError(f"{where} holds no list of questions; expected entries with image, mask and question")
    return where, entries


def _row(root: Path, where: Path, number: int, entry: dict[str, Any]) -> Row:
    values = {key: str(entry.get(key) or "") for key in ("image", "mask", "question", "answer")}
    if lacking := [key for key in ("image", "mask", "question") if not values[key].strip()]:
        raise ValueError(f"{where}: question number {number + 1} has no {' and no '.join(lacking)}; add it")
    for key in ("image", "mask"):
        if Path(values[key]).is_absolute() or ".." in Path(values[key]).parts:
            raise ValueError(f"{where}: question number {number + 1} names {values[key]!r}, expected a file in {key}s")
    image, mask = root / "images" / values["image"], root / "masks" / values["mask"]
    stem = Path(values["image"]).stem
    return Row(f"{number:06d}_{stem}", image, mask, values["question"], values["answer"], values["image"])


def other_questions(questions: Sequence[str], groups: Sequence[str], seed: int = 0) -> list[str]:
    """A wrong question for each: the next different one about the same image, or else one about another image.

    Args:
        questions: Questions.
        groups: Image of each.
        seed: Of the choice among other images.

    Raises:
        ValueError: There is only one image with only one question.
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    order, others = np.random.default_rng(seed).permutation(len(questions)).tolist(), []
    for i, (question, group) in enumerate(zip(questions, groups, strict=True)):
        own = members[group]
        start = own.index(i)
        near = [j for j in own[start + 1 :] + own[:start] if questions[j] != question]
        if not near:
            near = [j for j in (*order[i:], *order[:i]) if groups[j] != group and questions[j] != question][:1]
        if not near:
            raise ValueError("every question is the same, so none can be exchanged; give at least two")
        others.append(questions[near[0]])
    return others
