"""Tables and pictures of an evaluated semantic segmentation."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from visionattn._figures import save_figure
from visionattn.data.segmentation import IGNORE
from visionattn.tasks.config import write_text
from visionattn.tasks.records import markdown
from visionattn.tasks.segmentation_report import displayed, learning_curve

_OUTSIDE = (128, 128, 128)  # pixels without truth
_NAMED = 24  # classes of the legend, those with most pixels


class Shown(NamedTuple):
    """An image of the report: name, normalised image ``[C, H, W]``, truth and prediction ``[h, w]``."""

    name: str
    image: Tensor
    truth: Tensor
    found: Tensor


def colored(mask: np.ndarray, palette: Sequence[Sequence[int]], pixels: np.ndarray | None = None) -> np.ndarray:
    """Labels in their colours, over an image if there is one; grey without truth.

    Args:
        mask: ``[H, W]``, labels and ``IGNORE``.
        palette: Colour of each class.
        pixels: ``[H, W, C]``.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    table = np.full((IGNORE + 1, 3), _OUTSIDE, np.uint8)
    table[: len(palette)] = palette
    shown = table[mask]
    return shown if pixels is None else (0.5 * shown + 0.5 * displayed(pixels)).round().astype(np.uint8)


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.2f}"


def table(result: dict[str, Any]) -> str:
    """Markdown tables of an evaluation: the scores of the whole split in percent, then IoU and accuracy by class."""
    names = ("miou", "macc", "aacc")
    values = [str(result["images"]), *(_percent(result[name]) for name in names)]
    head = markdown(["images", "mIoU", "mAcc", "aAcc"], [values])
    rows = [
        [name, _percent(found["iou"]), _percent(found["accuracy"]), str(found["pixels"])]
        for name, found in result["classes"].items()
    ]
    return f"{head}\n\n{markdown(['class', 'IoU', 'accuracy', 'true pixels'], rows)}"


def _legend(axes: Any, shown: list[Shown], classes: list[str], palette: Sequence[Sequence[int]]) -> None:
    from matplotlib.patches import Patch

    counts = np.zeros(IGNORE + 1, np.int64)
    for example in shown:
        for mask in (example.truth, example.found):
            counts += np.bincount(mask.numpy().ravel(), minlength=IGNORE + 1)
    most = [int(k) for k in np.argsort(-counts[: len(classes)], kind="stable")[:_NAMED] if counts[k]]
    patches = [Patch(color=np.array(palette[k]) / 255, label=classes[k]) for k in most]
    axes.legend(handles=patches, ncol=4, fontsize=7, loc="upper center", frameon=False)
    axes.axis("off")


def _pictures(shown: list[Shown], classes: list[str], palette: Sequence[Sequence[int]], output: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.3 * len(shown) + 1.6), layout="constrained")
    grid = figure.add_gridspec(len(shown) + 1, 3)
    for i, example in enumerate(shown):
        views = [
            displayed(example.image.numpy().transpose(1, 2, 0)).astype(np.uint8),
            colored(example.truth.numpy(), palette),
            colored(example.found.numpy(), palette),
        ]
        for j, (view, title) in enumerate(zip(views, (example.name, "truth", "prediction"), strict=True)):
            axes = figure.add_subplot(grid[i, j])
            axes.imshow(view)
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    _legend(figure.add_subplot(grid[len(shown), :]), shown, classes, palette)
    save_figure(figure, output)


def _csv(header: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


def write_report(
    folder: Path,
    result: dict[str, Any],
    counts: Tensor,
    shown: list[Shown],
    palette: Sequence[Sequence[int]],
    logs: Path,
) -> None:
    """Write the files of an evaluation.

    Args:
        folder: Where ``metrics.json``, ``per_class.csv`` (an undefined value is an empty field), ``confusion.csv``
            (true classes in rows), ``report.md``, ``pictures.png`` and ``learning.png`` go.
        result: Of ``evaluate_labels``.
        counts: Confusion matrix ``[K, K]``.
        shown: Images for ``pictures.png``.
        palette: Colour of each class.
        logs: Folder of the run's CSV logs.
    """
    classes = list(result["classes"])
    write_text(folder / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    columns = ["iou", "accuracy", "pixels"]
    rows = [[name, *(found[key] for key in columns)] for name, found in result["classes"].items()]
    write_text(folder / "per_class.csv", _csv(["class", *columns], rows))
    matrix = [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)]
    write_text(folder / "confusion.csv", _csv(["true", *classes], matrix))
    _pictures(shown, classes, palette, folder / "pictures.png")
    pictures = ["pictures.png"]
    pictures += ["learning.png"] if learning_curve(logs, folder / "learning.png", "val/miou") else []
    lines = [f"# {result['name']}, split {result['split']}", "", table(result), "", "Percent; grey has no truth.", ""]
    write_text(folder / "report.md", "\n".join([*lines, *(f"![{name}]({name})" for name in pictures)]) + "\n")
