"""Tables and pictures of an evaluated detector."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coder

from visionattn._figures import save_figure
from visionattn.tasks.config import write_text
from visionattn.tasks.detection_metrics import NAMES
from visionattn.tasks.records import markdown
from visionattn.tasks.segmentation_report import learning_curve

_COLORS = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (240, 228, 66), (204, 121, 167), (86, 180, 233))
_TRUTH, _CROWD = (255, 255, 255), (128, 128, 128)
_HEADER = ("AP", "AP50", "AP75", "small", "medium", "large", "AR 1", "AR 10", "AR 100")


def draw_objects(
    pixels: np.ndarray,
    boxes: list[list[float]],
    labels: list[int],
    captions: list[str] | None = None,
    masks: list[dict[str, Any]] | None = None,
    colors: list[tuple[int, int, int]] | None = None,
) -> Image.Image:
    """The image with its objects.

    Args:
        pixels: ``[H, W, C]`` uint8.
        boxes: Left, top, width, height in pixels.
        labels: From 1.
        captions: What stands at each box.
        masks: Encoded masks, drawn half transparent.
        colors: Of each box; by default by its label.
    """
    shown = np.array(pixels if pixels.shape[2] == 3 else pixels[..., :1].repeat(3, 2), np.float64)
    colors = colors or [_COLORS[(label - 1) % len(_COLORS)] for label in labels]
    for mask, color in zip(masks or [], colors, strict=False):
        inside = coder.decode(mask).astype(bool)
        shown[inside] = 0.5 * shown[inside] + 0.5 * np.array(color)
    picture = Image.fromarray(shown.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    width = max(round(max(picture.size) / 400), 1)
    for i, (x, y, w, h) in enumerate(boxes):
        draw.rectangle((x, y, x + w, y + h), outline=colors[i], width=width)
        if captions:
            draw.text((x + width, y + width), captions[i], fill=colors[i])
    return picture


def table(result: dict[str, Any]) -> str:
    """Markdown table of an evaluation: boxes, masks and, if measured, the baseline's boxes; classes if several."""
    kinds = dict(bbox="boxes", segm="masks")
    rows = [[kinds[kind], *map(_number, (found[name] for name in NAMES))] for kind, found in result["scores"].items()]
    if "baseline" in result:
        rows.append(
            [f"grid of {result['baseline']['boxes']} median boxes", *(_number(result["baseline"][n]) for n in NAMES)]
        )
    text = markdown(["", *_HEADER], rows)
    classes = result["scores"]["bbox"]["classes"]
    if len(classes) > 1:
        columns = [[_number(found[key]) for key in ("ap", "ap50")] for found in classes.values()]
        lines = [[name, *values] for name, values in zip(classes, columns, strict=True)]
        text += "\n\n" + markdown(["class", "AP", "AP50"], lines)
    return text


def _number(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def write_report(
    folder: Path,
    result: dict[str, Any],
    shown: list[tuple[str, np.ndarray, dict[str, Any], dict[str, Any]]],
    logs: Path,
) -> None:
    """Write ``per_class.csv``, ``report.md``, ``pictures.png`` and ``learning.png``.

    Args:
        folder: Where to.
        result: Of ``evaluate_objects``.
        shown: Name, pixels ``[H, W, C]``, truth and the detections to draw of some images.
        logs: Folder of the run's CSV logs.
    """
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["class", "kind", "ap", "ap50"])
    for kind, scores in result["scores"].items():
        for name, found in scores["classes"].items():
            writer.writerow([name, kind, *("" if v is None or math.isnan(v) else v for v in found.values())])
    write_text(folder / "per_class.csv", sheet.getvalue())
    _pictures(shown, folder / "pictures.png")
    pictures = ["pictures.png"]
    pictures += ["learning.png"] if learning_curve(logs, folder / "learning.png", "val/ap50") else []
    lines = [f"# {result['name']}, split {result['split']}", "", table(result), ""]
    lines += ["Left the objects (grey: crowd regions, which count neither way), right what was found.", ""]
    write_text(folder / "report.md", "\n".join([*lines, *(f"![{name}]({name})" for name in pictures)]) + "\n")


def _pictures(shown: list[tuple[str, np.ndarray, dict[str, Any], dict[str, Any]]], output: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.1 * max(len(shown), 1)), layout="constrained")
    for i, (name, pixels, truth, found) in enumerate(shown):
        corners = np.asarray(truth["boxes"], float).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        colors = [_CROWD if crowd else _TRUTH for crowd in truth["crowd"].tolist()]
        views = [
            draw_objects(pixels, boxes, truth["labels"].tolist(), masks=truth["masks"], colors=colors),
            draw_objects(pixels, found["boxes"], found["labels"], masks=found.get("masks")),
        ]
        for j, (view, title) in enumerate(zip(views, (name, f"{len(found['boxes'])} found"), strict=True)):
            axes = figure.add_subplot(len(shown), 2, 2 * i + j + 1)
            axes.imshow(view)
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    save_figure(figure, output)
