"""Tables and pictures of an evaluated segmentation."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from visionattn._figures import save_figure
from visionattn.data.segmentation import IGNORE
from visionattn.tasks.config import write_text
from visionattn.tasks.records import markdown
from visionattn.tasks.segmentation_metrics import METRICS

COLORS = np.array([[0, 158, 115], [213, 94, 0], [0, 114, 178], [240, 228, 66], [204, 121, 167], [86, 180, 233]])
"""Of the foreground classes in turn, RGB."""
_SHOWN = dict(hit=(255, 255, 255), false=(213, 94, 0), missed=(0, 114, 178), outside=(128, 128, 128))


def displayed(pixels: np.ndarray) -> np.ndarray:
    """``[H, W, C]`` of any type as ``[H, W, 3]`` float64 in [0, 255]; of other than three channels the first."""
    shown = (pixels if pixels.shape[2] == 3 else pixels[..., :1].repeat(3, 2)).astype(np.float64)
    if pixels.dtype != np.uint8:
        low, high = shown.min(), shown.max()
        shown = 255 * (shown - low) / max(high - low, 1e-9)
    return shown


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with its labels in colour.

    Args:
        pixels: ``[H, W, C]``; of other than three channels the first is shown grey.
        mask: ``[H, W]`` labels, 0 the background.

    Returns:
        ``[H, W, 3]`` uint8.
    """
    shown = displayed(pixels)
    inside = mask > 0
    shown[inside] = 0.5 * shown[inside] + 0.5 * COLORS[(mask[inside].astype(int) - 1) % len(COLORS)]
    return shown.round().astype(np.uint8)


def errors(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Hits white, false foreground vermilion, missed or wrong foreground blue, no truth grey: ``[H, W, 3]`` uint8."""
    shown = np.zeros((*truth.shape, 3), np.uint8)
    shown[(predicted == truth) & (truth > 0)] = _SHOWN["hit"]
    shown[(predicted > 0) & (truth == 0)] = _SHOWN["false"]
    shown[(predicted != truth) & (truth > 0)] = _SHOWN["missed"]
    shown[truth == IGNORE] = _SHOWN["outside"]
    return shown


def table(result: dict[str, Any]) -> str:
    """Markdown table of an evaluation: for each class mean, interval, undefined images and value of the whole set.

    Below it, if measured, the grey threshold beside it.
    """
    rows = []
    for name, summary in result["classes"].items():
        for metric in METRICS:
            entry, total = summary["per_image"][metric], summary["per_set"].get(metric)
            unit = f" ({summary['unit']})" if metric == "hd95" else ""
            ci = "" if entry["ci95"] is None else "{:.4f} to {:.4f}".format(*entry["ci95"])
            mean = "undefined" if entry["mean"] is None else f"{entry['mean']:.4f}"
            undefined = f"{entry['undefined']} of {summary['images']}"
            rows.append([name, metric + unit, mean, ci, undefined, "" if total is None else f"{total:.4f}"])
    text = markdown(["class", "metric", "mean over images", "95 % interval", "undefined", "whole set"], rows)
    if "baseline" in result:
        found = result["baseline"]
        dice, total = ("undefined" if v is None else f"{v:.4f}" for v in (found["dice"], found["dice_of_all"]))
        text += (
            f"\n\nOne grey threshold of the training split ({found['foreground']} than {found['threshold']:.4g}): "
            f"Dice {dice} mean over images, {total} of the whole set."
        )
    return text


def _pictures(shown: list[tuple[str, Tensor, Tensor, Tensor]], output: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.1 * len(shown)), layout="constrained")
    for i, (name, image, mask, predicted) in enumerate(shown):
        pixels, truth, found = image.numpy(), mask.numpy(), predicted.numpy()
        pixels = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
        low, high = pixels.min(), pixels.max()
        classes = max(int(found.max()), int(truth[truth != IGNORE].max()), 1)
        views = [(pixels - low) / max(high - low, 1e-9), np.where(truth == IGNORE, 0, truth), found]
        titles = (name, "truth", "prediction", "errors")
        for j, (view, title) in enumerate(zip([*views, errors(found, truth)], titles, strict=True)):
            axes = figure.add_subplot(len(shown), 4, 4 * i + j + 1)
            axes.imshow(view, cmap="gray", **(dict(vmin=0, vmax=classes) if j in (1, 2) else {}))
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    save_figure(figure, output)


def _curve(x: Any, ys: dict[str, Any], xlabel: str, output: Path, mark: float | None = None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for label, y in ys.items():
        axes.plot(x[label] if isinstance(x, dict) else x, y, label=label)
    if mark is not None:
        axes.axvline(mark, color="gray", linestyle=":", label="chosen on validation")
    axes.set_xlabel(xlabel)
    axes.legend()
    save_figure(figure, output)


def learning_curve(logs: Path, output: Path, score: str = "val/dice") -> bool:
    """Draw training loss and a validation score by epoch from the CSV logs; False where there are none."""
    points: dict[str, list[tuple[float, float]]] = {}
    for path in sorted(logs.glob("*.csv"), key=lambda p: (p.name == "metrics.csv", p.name)):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key in ("train/loss", score):
                    if row.get(key) and row.get("epoch"):
                        points.setdefault(key, []).append((float(row["epoch"]) + 1, float(row[key])))
    if points:
        xs = {key: [p[0] for p in found] for key, found in points.items()}
        _curve(xs, {key: [p[1] for p in found] for key, found in points.items()}, "epoch", output)
    return bool(points)


def write_report(
    folder: Path,
    result: dict[str, Any],
    shown: list[tuple[str, Tensor, Tensor, Tensor]],
    counts: np.ndarray,
    logs: Path,
) -> None:
    """Write ``report.md``, ``pictures.png``, ``threshold.png`` and ``learning.png``.

    Args:
        folder: Where to.
        result: Of ``evaluate_masks``.
        shown: Name, image ``[C, H, W]``, truth and prediction ``[H, W]`` of some images.
        counts: ``[99, 3]``: true positive, predicted and true pixels at the thresholds 0.01 to 0.99.
        logs: Folder of the run's CSV logs.
    """
    steps = np.linspace(0.01, 0.99, 99)
    hit, predicted, true = counts.T
    with np.errstate(invalid="ignore", divide="ignore"):
        curves = {"Dice": 2 * hit / (predicted + true), "precision": hit / predicted, "sensitivity": hit / true}
    _pictures(shown, folder / "pictures.png")
    _curve(steps, curves, "threshold", folder / "threshold.png", result["threshold"])
    pictures = ["pictures.png", "threshold.png"]
    pictures += ["learning.png"] if learning_curve(logs, folder / "learning.png") else []
    lines = [f"# {result['name']}, split {result['split']}", "", table(result), ""]
    lines += ["Errors: white hit, vermilion false, blue missed, grey without truth.", ""]
    write_text(folder / "report.md", "\n".join([*lines, *(f"![{name}]({name})" for name in pictures)]) + "\n")
