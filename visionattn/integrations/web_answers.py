"""What a model says about an uploaded picture, for the web page: scores, masks, boxes, routed regions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from visionattn.data.images import read_image
from visionattn.data.masks import READ_ERRORS, read_pixels
from visionattn.explain import overlay as heat_overlay
from visionattn.explain import routed_regions
from visionattn.integrations.web_models import Choice, load
from visionattn.layers import RoutingAttention
from visionattn.tasks.inference import predict
from visionattn.tasks.segmentation_report import COLORS, displayed, overlay

PIXELS = 2**24
"""Largest picture that the page takes; ``visionattn predict`` takes larger ones."""
_SIDE = 448  # of the pictures in which one clicks; small inputs are enlarged by a whole factor
_TOPK = 5
_ORIENTATION = 274  # EXIF tag
_QUERY, _REGION = (0, 230, 118), (255, 255, 255)


@dataclass(frozen=True)
class Answer:
    """What the page shows of one picture.

    Args:
        text: Markdown.
        scores: Probabilities by class, best first.
        picture: The picture with masks or boxes.
        view: What the model sees of the picture, where its routed regions can be asked for.
        warning: What the user should know about the question.
    """

    text: str
    scores: dict[str, float] | None = None
    picture: Image.Image | None = None
    view: Image.Image | None = None
    warning: str | None = None


def check_picture(path: str | Path) -> None:
    """Refuse what the page cannot take before anything is decoded.

    Raises:
        ValueError: No picture, or one of more than ``PIXELS`` pixels.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name}: {error}") from error
    except READ_ERRORS as error:
        raise ValueError(f"{path.name} is no picture that can be read; use PNG, JPEG, WebP or TIFF") from error
    if width * height > PIXELS:
        raise ValueError(
            f"{path.name} has {width} x {height} pixels; the page takes up to {PIXELS / 1e6:.1f} million: "
            "reduce it, or use visionattn predict"
        )


def answer(choice: Choice, path: str | Path, question: str = "") -> Answer:
    """What the model of an entry says about a picture.

    Args:
        choice: An entry of the list.
        path: Image file; it is turned as its EXIF tag says.
        question: Of grounding, what is asked.

    Raises:
        FileNotFoundError: The run, the weights or the picture are gone.
        ValueError: An unreadable or too large picture, damaged weights, or an empty or too long question.
    """
    if choice.kind == "grounding" and not question.strip():
        raise ValueError('this run answers questions; type one, for example "where is the red circle?"')
    check_picture(path)
    model = load(choice)
    if choice.kind == "classification":
        return _classes(choice, model, read_image(path, model.in_chans, exif=True))
    pixels = _upright(path, model.in_chans)
    if choice.kind == "grounding":
        return _answer_to(model, pixels, question)
    return {"segmentation": _mask, "semantic": _scene, "detection": _objects}[choice.kind](model, pixels)


def _upright(path: str | Path, in_chans: int) -> np.ndarray:
    """Pixels ``[H, W, C]``, turned as a browser shows the file; at full depth where it need not be turned."""
    with Image.open(path) as image:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    if not turned:
        return read_pixels(path, in_chans)
    picture = read_image(path, in_chans, exif=True)
    return np.array(picture).reshape(picture.height, picture.width, in_chans)


def _classes(choice: Choice, model: Any, image: Image.Image) -> Answer:
    scores = dict(predict(model, [image], _TOPK)[0])
    best = next(iter(scores))
    text = f"**{best}**, probability {scores[best]:.1%}"
    if choice.random:
        scores = {f"class {name}": value for name, value in scores.items()}
        text = "Random weights: these numbers mean nothing."
    routed = any(isinstance(module, RoutingAttention) for module in model.model.modules())
    return Answer(text, scores, view=_view(model, image)[1] if routed else None)


def _share(mask: np.ndarray, classes: list[str], colors: Any) -> str:
    """A line for each foreground class of a mask: its colour, name and share of the pixels."""
    lines = []
    for i, name in enumerate(classes[1:], 1):
        square = '<span style="color: rgb({}, {}, {})">&#9632;</span>'.format(*colors[(i - 1) % len(colors)])
        lines.append(f"{square} {name}: {np.mean(mask == i):.1%} of the pixels")
    return "  \n".join(lines)


def _mask(masker: Any, pixels: np.ndarray) -> Answer:
    from visionattn.tasks.segmentation_inference import PixelLabels

    mask = PixelLabels(masker, masker.window, masker.flips)(pixels)
    text = _share(mask, masker.classes, COLORS)
    return Answer(text, picture=Image.fromarray(overlay(pixels, mask)))


def _scene(labeller: Any, pixels: np.ndarray) -> Answer:
    from visionattn.tasks.semantic_inference import label_pixels
    from visionattn.tasks.semantic_report import colored

    mask = label_pixels(labeller, pixels)
    present = [i for i in np.argsort(-np.bincount(mask.ravel())) if (mask == i).any()]
    rank = np.zeros(256, int)
    rank[present] = range(1, len(present) + 1)
    names = ["", *(labeller.classes[i] for i in present)]
    text = _share(rank[mask], names, [labeller.palette[i] for i in present])
    return Answer(text, picture=Image.fromarray(colored(mask, labeller.palette, pixels)))


def _objects(finder: Any, pixels: np.ndarray) -> Answer:
    from visionattn.tasks.detection_inference import draw_found, find_objects

    if pixels.dtype != np.uint8:
        raise ValueError("a detection run takes pictures of 8 bits; convert this one")
    picture, count = draw_found(finder, pixels, find_objects(finder, pixels))
    what = finder.classes[0] if len(finder.classes) == 1 else "object"
    return Answer(f"{count} x {what}, with a score of at least {finder.score:.0%}", picture=picture)


def _answer_to(grounder: Any, pixels: np.ndarray, question: str) -> Answer:
    from visionattn.tasks.grounding_inference import answer_mask

    mask = answer_mask(grounder, pixels, question)
    text = f"What is not faded answers *{_plain(question)}*: {mask.mean():.1%} of the pixels"
    if not mask.any():
        text = f"No pixel answers *{_plain(question)}*."
    unknown = grounder.model.text.unknown(question)
    warning = f"words that the run never met, which all count as one unknown word: {', '.join(unknown)}"
    return Answer(text, picture=_spotlight(pixels, mask), warning=warning if unknown else None)


def _spotlight(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The picture, faded outside a mask, which shows colours better than a colour over it."""
    shown = displayed(pixels)
    shown[~mask] = 0.2 * shown[~mask] + 0.8 * 255
    return Image.fromarray(shown.round().astype(np.uint8))


def _plain(text: str) -> str:
    """Words of the user without what Markdown or HTML would read in them."""
    return "".join(f"&#{ord(c)};" if not (c.isalnum() or c.isspace()) else c for c in " ".join(text.split()))


def _view(model: Any, image: Image.Image) -> tuple[Tensor, Image.Image, int]:
    """Input ``[1, C, H, W]`` of a classifier, the picture of it, and how many times it is enlarged."""
    given = model.transformed(image)
    mean, std = (torch.tensor(model.data_config[key])[:, None, None] for key in ("mean", "std"))
    values = ((given * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).convert("RGB")
    scale = max(round(_SIDE / max(picture.size)), 1)
    return given[None], _enlarged(picture, scale), scale


def _enlarged(picture: Image.Image, scale: int) -> Image.Image:
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def regions(
    choice: Choice, path: str | Path, position: tuple[int, int]
) -> tuple[Image.Image, list[tuple[Image.Image, str]]]:
    """Where a position of a picture looks, by the last layer of each stage of a BiFormer.

    Args:
        choice: An entry with a BiFormer that classifies.
        path: Image file.
        position: Column and row in pixels of the answer's ``view``.

    Returns:
        The view with the position marked, and for each stage a picture and its caption: the position's region in
        green, the regions that it is routed to in white, the attention in them in colour.

    Raises:
        FileNotFoundError: The run, the weights or the picture are gone.
        ValueError: A position outside the view, another model, or an unreadable picture.
    """
    check_picture(path)
    model = load(choice)
    given, view, scale = _view(model, read_image(path, model.in_chans, exif=True))
    x, y = position
    if not (0 <= x < view.width and 0 <= y < view.height):
        raise ValueError(f"position ({x}, {y}) lies outside the picture of {view.width} x {view.height} pixels")
    found = routed_regions(model.model, given, (x // scale, y // scale))
    shown = []
    for last in {entry.stage: entry for entry in found}.values():
        layers = sum(entry.stage == last.stage for entry in found)
        drawn = _enlarged(heat_overlay(view.resize((given.shape[3], given.shape[2])), last.mask), scale)
        draw = ImageDraw.Draw(drawn)
        for box in last.regions:
            _outline(draw, box, scale, _REGION, 2)
        _outline(draw, last.query, scale, _QUERY, 4)
        what = _extent(last.regions, (given.shape[3], given.shape[2]))
        shown.append((drawn, f"stage {last.stage}, layer {layers}/{layers}: {what}"))
    _cross(view, x, y)
    return view, shown


def _extent(boxes: tuple[Any, ...], size: tuple[int, int]) -> str:
    if tuple(boxes) == ((0, 0, *size),):
        return "all"
    return "1 region" if len(boxes) == 1 else f"{len(boxes)} regions"


def _outline(draw: ImageDraw.ImageDraw, box: Any, scale: int, color: tuple[int, int, int], width: int) -> None:
    x0, y0, x1, y1 = (side * scale for side in box)
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=width)


def _cross(picture: Image.Image, x: int, y: int) -> None:
    """Mark a position; a dark edge keeps the mark visible on bright pictures."""
    draw, arm = ImageDraw.Draw(picture), 12
    for color, width in (((0, 0, 0), 6), (_QUERY, 3)):
        draw.line((x - arm, y, x + arm, y), fill=color, width=width)
        draw.line((x, y - arm, x, y + arm), fill=color, width=width)
