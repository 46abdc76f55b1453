"""Scenes of several shapes with questions about one of them, from the images of the package easy-vqa.

The package (github.com/vzhou842/easy-VQA, MIT) has 4,000 training and 1,000 test images of 64 x 64 pixels with one
coloured shape each. Shapes are cut out by their difference to the background and put together on one of their
backgrounds.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.grounding import CLASSES, Question
from visionattn.data.images import check_channels
from visionattn.data.splits import SPLITS, check_split

_CONTRAST = 60  # least difference of a channel between a shape and its background
_GAP = 2  # pixels between the boxes of two shapes
_VALIDATION = 10  # every tenth training image serves validation scenes only
_BOTH = ("where is the {color} {shape}?", "find the {color} {shape}", "which region is the {color} {shape}?")
_BY_COLOR = ("what is the {color} shape?", "what shape is the {color} object?", "where is the {color} shape?")
_BY_SHAPE = ("what color is the {shape}?", "what is the color of the {shape}?", "where is the {shape}?")
COUNTS = {"train": 6000, "val": 250, "test": 1000}
"""Scenes of each split."""


@dataclass(frozen=True)
class Shape:
    """One image of the package: its shape cut out, and its background."""

    pixels: np.ndarray
    mask: np.ndarray
    background: tuple[int, ...]
    color: str
    shape: str


class Scenes:
    """Scenes with at least four shapes, and questions that exactly one of them answers.

    A scene depends on seed, split and number alone. Validation scenes are made of every tenth training image, training
    scenes of the others, test scenes of the test images. All questions of a scene are about different shapes.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        in_chans: Channels, 1 or 3; the colours that most questions ask for need 3.
        side: Side of a scene in pixels, at least 96.
        shapes: Least and largest number of shapes.
        questions_each: Questions of each scene, at most the least number of shapes.
        count: Scenes; None takes ``COUNTS``.
        seed: Of the scenes.

    Raises:
        ImportError: The package easy-vqa is not installed.
        FileNotFoundError: The package lacks its images.
        ValueError: Numbers outside the ranges above.
    """

    classes = CLASSES

    def __init__(
        self,
        split: str = "train",
        in_chans: int = 3,
        side: int = 96,
        shapes: tuple[int, int] = (4, 5),
        questions_each: int = 2,
        count: int | None = None,
        seed: int = 0,
    ):
        check_split(split)
        check_channels(in_chans)
        least, most = shapes
        if (
            side < 96
            or not 4 <= least <= most <= 6
            or not 1 <= questions_each <= least
            or (1 if count is None else count) < 1
        ):
            raise ValueError(
                f"side={side}, shapes={list(shapes)}, questions_each={questions_each}, count={count}: a side of at "
                "least 96, 4 to 6 shapes, at most as many questions as shapes, and a scene are needed"
            )
        self.in_chans, self.side, self.each, self.seed = in_chans, side, questions_each, seed
        self.bounds, self.split = (least, most), split
        self.library = _library(split)  # whose images are read when a scene needs them
        self.plans = [self._plan(i) for i in range(COUNTS[split] if count is None else count)]
        asked = [(i, question) for i, (_, questions) in enumerate(self.plans) for question in questions]
        self.questions = [question for _, (question, _, _) in asked]
        self.groups = [f"{split}_{i:05d}" for i, _ in asked]

    def _plan(self, number: int) -> tuple[list[tuple[int, int, int]], list[tuple[str, str, int]]]:
        """Places (shape, top, left) and questions (question, answer, number of its place) of a scene."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), number])
        while True:
            chosen = rng.choice(len(self.library), int(rng.integers(self.bounds[0], self.bounds[1] + 1)), replace=False)
            places = self._places([int(i) for i in chosen], rng)
            kinds = [self.library[i][1:] for i, _, _ in places]
            asked = [k for k in range(len(kinds)) if places and kinds.count(kinds[k]) == 1]
            if len(asked) >= self.each:
                break
        order = rng.permutation(asked)[: self.each]
        return places, [self._question(int(k), kinds, rng) for k in order]

    def _places(self, chosen: list[int], rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Places that do not overlap, or none where 200 tries found none."""
        places: list[tuple[int, int, int]] = []
        boxes = np.zeros((self.side, self.side), bool)
        for i in sorted(chosen, key=lambda i: -self._shape(i).mask.size):
            height, width = self._shape(i).mask.shape
            for _ in range(200):
                top = int(rng.integers(_GAP, self.side - height - _GAP + 1))
                left = int(rng.integers(_GAP, self.side - width - _GAP + 1))
                box = slice(top - _GAP, top + height + _GAP), slice(left - _GAP, left + width + _GAP)
                if not boxes[box].any():
                    break
            else:
                return []
            boxes[top : top + height, left : left + width] = True
            places.append((i, top, left))
        return places

    def _shape(self, i: int) -> Shape:
        return _cut(*self.library[i])

    @staticmethod
    def _question(k: int, kinds: list[tuple[str, str]], rng: np.random.Generator) -> tuple[str, str, int]:
        color, shape = kinds[k]
        forms = [(text, f"{color} {shape}") for text in _BOTH]
        if [other for other, _ in kinds].count(color) == 1:
            forms += [(text, shape) for text in _BY_COLOR]
        if [other for _, other in kinds].count(shape) == 1:
            forms += [(text, color) for text in _BY_SHAPE]
        text, answer = forms[int(rng.integers(len(forms)))]
        return text.format(color=color, shape=shape), answer, k

    def __len__(self) -> int:
        return len(self.questions)

    def named(self, i: int) -> str:
        """What question ``i`` names of its answer: ``"color"``, ``"shape"`` or ``"color and shape"``."""
        places, questions = self.plans[i // self.each]
        question, _, k = questions[i % self.each]
        # "shape" and "object" stand for a shape in the questions that name a colour alone
        return " and ".join(
            what
            for what, word in zip(("color", "shape"), self.library[places[k][0]][1:], strict=True)
            if word in question
        )

    def foreground(self, i: int) -> list[np.ndarray]:
        """Masks ``[H, W]`` (bool) of all shapes of the scene that question ``i`` is about."""
        masks = []
        for number, top, left in self.plans[i // self.each][0]:
            masks.append(np.zeros((self.side, self.side), bool))
            height, width = self._shape(number).mask.shape
            masks[-1][top : top + height, left : left + width] = self._shape(number).mask
        return masks

    def __getitem__(self, i: int) -> Question:
        places, questions = self.plans[i // self.each]
        question, answer, k = questions[i % self.each]
        image = np.empty((self.side, self.side, 3), np.uint8)
        image[:] = self._shape(places[0][0]).background
        for number, top, left in places:
            shape = self._shape(number)
            height, width = shape.mask.shape
            image[top : top + height, left : left + width][shape.mask] = shape.pixels[shape.mask]
        if self.in_chans == 1:
            image = (image.astype(float) @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)[..., None]
        mask = self.foreground(i)[k].astype(np.int64)
        return Question(image, mask, f"{self.groups[i]}_{i % self.each}", self.groups[i], None, None, question, answer)


@lru_cache(maxsize=4)
def _library(split: str) -> list[tuple[Path, str, str]]:
    """Image, colour and shape, in the order of the package's numbers, of a split."""
    spec = find_spec("easy_vqa")
    if spec is None or not spec.origin:
        raise ImportError('data=scenes needs the package easy-vqa: pip install "visionattn[ground]"')
    import easy_vqa

    test = split == "test"
    paths: dict[int, str] = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
    kinds = _kinds(*(easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()))
    numbers = [i for i in sorted(paths) if test or (i % _VALIDATION == 0) == (split == "val")]
    found = [(Path(paths[i]), *kinds[i]) for i in numbers if None not in kinds.get(i, (None, None))]
    if len(found) < 6:
        raise FileNotFoundError(f"easy-vqa at {Path(spec.origin).parent} lacks images; install it anew")
    return found


def _kinds(questions: list[str], answers: list[str], images: list[int]) -> dict[int, tuple[Any, Any]]:
    """Colour and shape of each image, as far as the package's questions and answers tell them."""
    colors = {a for q, a in zip(questions, answers, strict=True) if "color" in q and a not in ("yes", "no")}
    shapes = set(answers) - colors - {"yes", "no"}
    found: dict[int, list[Any]] = {}
    for question, answer, image in zip(questions, answers, images, strict=True):
        kind = found.setdefault(image, [None, None])
        words = question.rstrip("?").split()
        said = [answer, *words] if answer not in ("yes", "no") else words
        denied = "not" in words or "no" in words
        if answer in ("yes", "no") and denied == (answer == "yes"):
            continue  # it tells what the image does not show
        for word in said:
            if word in colors:
                kind[0] = word
            elif word in shapes:
                kind[1] = word
    return {image: (kind[0], kind[1]) for image, kind in found.items()}


@lru_cache(maxsize=5000)
def _cut(path: Path, color: str, shape: str) -> Shape:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    mask = np.abs(pixels.astype(int) - pixels[0, 0].astype(int)).max(2) > _CONTRAST
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError(f"{path} shows no shape; install easy-vqa anew")
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return Shape(pixels[box], mask[box], tuple(int(x) for x in pixels[0, 0]), color, shape)
