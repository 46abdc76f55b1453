"""Tables and pictures of evaluated scanpaths."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from visionattn._figures import save_figure
from visionattn.data.scanpath import Scene
from visionattn.tasks.config import write_text
from visionattn.tasks.records import markdown

Shown = tuple[Scene, list[int], list[int] | None]


def table(result: dict[str, Any]) -> str:
    """Markdown table of an evaluation: every method by every metric, with its interval and undefined scenes."""
    methods = result["methods"]
    names = list(next(iter(methods.values())))
    rows = []
    for method, entry in methods.items():
        row = [method]
        for name in names:
            value = entry[name]
            if value["mean"] is None:
                row.append("")
                continue
            ci = "" if value["ci95"] is None else " ({:.3f} to {:.3f})".format(*value["ci95"])
            missing = f", {value['undefined']} undefined" if value["undefined"] else ""
            row.append(f"{value['mean']:.3f}{ci}{missing}")
        rows.append(row)
    return markdown(["method", *names], rows)


def _draw_path(axes: Any, scene: Scene, path: list[int], color: str, shift: float) -> None:
    """A path with numbered fixations; those of one object stand side by side."""
    at = scene.centres[path] + shift
    seen: dict[int, int] = {}
    for k, i in enumerate(path):
        at[k, 0] += 0.25 * float(scene.boxes[i, 2] - scene.boxes[i, 0]) * seen.get(i, 0)
        seen[i] = seen.get(i, 0) + 1
    axes.plot(*at.T, "-", color=color, linewidth=1.2, alpha=0.8)
    for k, (x, y) in enumerate(at, 1):
        label = dict(boxstyle="circle,pad=0.15", facecolor=color, edgecolor="white", linewidth=0.5)
        axes.text(x, y, str(k), color="white", fontsize=6, ha="center", va="center", bbox=label)


def draw_scenes(shown: list[Shown], output: Path) -> None:
    """Write a picture: for each scene the predicted path and, where there is one, the true one; the target framed.

    Args:
        shown: Scene, predicted and true path.
        output: PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = 2 if any(true is not None for _, _, true in shown) else 1
    figure = Figure(figsize=(4 * columns, 3.1 * len(shown)), layout="constrained")
    for row, (scene, predicted, true) in enumerate(shown):
        pairs = [("predicted", predicted, "#d55e00"), ("true", true, "#0072b2")][:columns]
        for column, (title, path, color) in enumerate(pairs):
            axes = figure.add_subplot(len(shown), columns, row * columns + column + 1)
            axes.imshow(scene.image)
            axes.set_title(f"{scene.name}, {title}", fontsize=7)
            axes.axis("off")
            if scene.target is not None:
                x1, y1, x2, y2 = scene.boxes[scene.target]
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="#f0e442", linewidth=2))
            if path:
                _draw_path(axes, scene, path, color, 0.0)
    save_figure(figure, output)


def write_report(folder: Path, result: dict[str, Any], rows: list[dict[str, Any]], shown: list[Shown]) -> None:
    """Write ``metrics.json``, ``per_scene.csv`` (an undefined value is an empty field), ``report.md``,
    ``pictures.png``.

    Args:
        folder: Where to.
        result: Of ``evaluate_scanpaths``.
        rows: One for each scene and method.
        shown: Scenes for the picture.
    """
    write_text(folder / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    write_text(folder / "per_scene.csv", text.getvalue())
    draw_scenes(shown, folder / "pictures.png")
    share = result["outside"] / max(result["fixations"], 1)
    lengths = [np.mean([len(p) for p in scene.paths]) for scene, _, _ in shown]
    lines = [
        f"# {result['data']}, split {result['split']}",
        "",
        f"{result['scenes']} scenes, {result['scanpaths']} scanpaths, {result['fixations']} fixations, {share:.1%} of "
        f"them outside every box. The pictured scenes have {np.mean(lengths):.1f} fixations a scanpath.",
        "",
        *(["The scanpaths are SYNTHETIC: a rule made them.", ""] if "Synthetic" in result["data"] else []),
        table(result),
        "",
        "Of delta and edit distance less is better. 95 % bootstrap intervals over scenes.",
        "",
        "![predicted and true scanpaths](pictures.png)",
    ]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
