"""Figures for people: the picture beside what was found in it, with a legend that says what is shown."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visionattn._writing import replaced
from visionattn.explain._need import need
from visionattn.explain.distance import AttentionDistance
from visionattn.explain.grid import Box
from visionattn.explain.receptive_field import ReceptiveField

_COLUMNS = 6
_INCHES = 2.3  # width of a panel
POSITION, QUERY, ROUTED = "#00ff66", "#00e5ff", "#ffffff"


@dataclass
class Panel:
    """One picture of a figure.

    Args:
        title: What stands above.
        picture: The picture.
        boxes: Outlines in pixels of the picture, each with its colour.
        marked: Draw a cross at the chosen position.
    """

    title: str
    picture: Any
    boxes: Sequence[tuple[Box, str]] = field(default_factory=list)
    marked: bool = True


def inside(layer: str) -> str:
    """The name of a layer without the path to the backbone that holds its stage."""
    return layer[found.start() :] if (found := re.search(r"\bstages[._]\d", layer)) else layer


def panels(
    items: Sequence[Panel],
    caption: str,
    position: tuple[int, int] | None,
    heat: str,
    keys: dict[str, str],
    ends: tuple[str, str] = ("0", "max"),
) -> Any:
    """A figure of pictures in rows.

    Args:
        items: The panels.
        caption: What the figure shows, below it.
        position: Column and row of the chosen position, in pixels.
        heat: What the colours stand for, beside a bar of them.
        keys: Names and colours of outlines.
        ends: Names of the coldest and the warmest colour.

    Returns:
        A matplotlib figure.
    """
    rows = math.ceil(len(items) / _COLUMNS)
    columns = math.ceil(len(items) / rows)
    height, width = np.asarray(items[0].picture).shape[:2]
    size = (max(_INCHES * columns, 4.2) + 0.7, (_INCHES * height / width + 0.4) * rows + (0.75 if keys else 0.5))
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, panel in zip(grid.flat, items, strict=False):
        axes.imshow(panel.picture, interpolation="nearest")
        axes.set_title(panel.title, fontsize=8)
        for (x0, y0, x1, y1), color in panel.boxes:
            _outline(axes, (x0, y0, x1, y1), color)
        if panel.marked and position is not None:
            axes.plot(*position, marker="+", markersize=11, markeredgewidth=3.5, color="black")
            axes.plot(*position, marker="+", markersize=9, markeredgewidth=1.8, color=POSITION)
        axes.set_xlim(-0.5, width - 0.5)
        axes.set_ylim(height - 0.5, -0.5)
    _heat_bar(figure, grid, heat, ends)
    _legend(figure, keys, marked=position is not None and any(panel.marked for panel in items))
    figure.supxlabel(_wrapped(caption, size[0]), fontsize=8)
    return figure


def _outline(axes: Any, box: Box, color: str) -> None:
    patches = need("matplotlib.patches", "matplotlib")
    x0, y0, x1, y1 = box
    for style in (dict(edgecolor="black", linewidth=2.4), dict(edgecolor=color, linewidth=1.2)):
        axes.add_patch(patches.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, **style))


def _heat_bar(figure: Any, grid: Any, label: str, ends: tuple[str, str]) -> None:
    scale = need("matplotlib.cm", "matplotlib").ScalarMappable(cmap="plasma")
    bar = figure.colorbar(scale, ax=list(grid.flat), shrink=0.7, aspect=30, pad=0.01)
    bar.set_ticks([0, 1], labels=list(ends))
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)


def _legend(figure: Any, keys: dict[str, str], marked: bool) -> None:
    lines, patches = need("matplotlib.lines", "matplotlib"), need("matplotlib.patches", "matplotlib")
    handles = [patches.Patch(facecolor="#777777", edgecolor=color, label=name, lw=1.5) for name, color in keys.items()]
    if marked:
        cross = dict(marker="+", color=POSITION, markersize=9, markeredgewidth=2, linestyle="")
        handles.insert(0, lines.Line2D([], [], label="chosen position", **cross))
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8, facecolor="#dddddd")


def _wrapped(text: str, inches: float) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, int(inches * 17)))


def fields_figure(fields: Sequence[ReceptiveField], caption: str) -> Any:
    """Effective receptive fields side by side, with the squares that hold half and 99 % of each."""
    height, width = fields[0].heat.shape
    columns = len(fields)
    size = (max(_INCHES * columns, 4.2) + 0.7, _INCHES * height / width + 0.9)
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)
    for axes, found in zip(grid.flat, fields, strict=True):
        heat = found.heat.cpu().numpy()
        # the fourth root shows the faint rim, which linear colours hide
        axes.imshow((heat / max(heat.max(), 1e-300)) ** 0.25, cmap="plasma", vmin=0, vmax=1, interpolation="nearest")
        areas = ", ".join(
            f"{share:.0%} in {ratio:.1%}" for share, ratio in found.ratios.items() if share in (0.5, 0.99)
        )
        axes.set_title(f"map {found.stage}\n{areas}", fontsize=8)
        axes.axis("off")
    scale = need("matplotlib.cm", "matplotlib").ScalarMappable(cmap="plasma")
    bar = figure.colorbar(scale, ax=list(grid.flat), shrink=0.8, aspect=25, pad=0.01)
    bar.set_ticks([0, 0.1**0.25, 1], labels=["0", "max / 10", "max"])
    bar.ax.tick_params(labelsize=7)
    bar.set_label("size of the gradient", fontsize=8)
    figure.supxlabel(_wrapped(caption, size[0]), fontsize=8)
    return figure


def distances_figure(distances: Sequence[AttentionDistance], caption: str) -> Any:
    """Mean attention distance of every head over the layers, beside that of attention to everything alike."""
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(max(5.5, 0.45 * len(distances) + 2), 4.6), layout="constrained"
    )
    axes = figure.subplots()
    for i, found in enumerate(distances):
        pixels = found.pixels.cpu()
        axes.plot([i] * len(pixels), pixels, "o", color=f"C{found.stage % 10}", markersize=5, alpha=0.7)
    axes.plot([found.uniform for found in distances], "_", color="black", markersize=14, label="all pixels alike")
    for stage in sorted({found.stage for found in distances}):
        axes.plot([], [], "o", color=f"C{stage % 10}", label=f"heads of stage {stage}" if stage else "heads")
    axes.set_ylim(0, 1.08 * max(max(found.uniform, found.pixels.max().item()) for found in distances))
    axes.set_xlim(-0.6, len(distances) - 0.4)
    axes.set_xticks(range(len(distances)), labels=[inside(found.layer) for found in distances], rotation=90, fontsize=7)
    axes.set_ylabel("mean attention distance (pixels)", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.supxlabel(_wrapped(caption, figure.get_size_inches()[0]), fontsize=8)
    return figure


def curves_figure(curves: Sequence[tuple[str, Any]], caption: str) -> Any:
    """Values of channel gates, each layer's from low to high."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = need("matplotlib", "matplotlib").colormaps["viridis"]
    for i, (name, values) in enumerate(curves):
        share = np.linspace(0, 100, len(values))
        axes.plot(share, np.sort(values), color=colors(i / max(len(curves) - 1, 1)), label=inside(name))
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("channels of the layer, from the most closed to the most open (%)", fontsize=9)
    axes.set_ylabel("gate", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), title="layer, first to last", title_fontsize=7)
    figure.supxlabel(_wrapped(caption, 6.5), fontsize=8)
    return figure


def matrices_figure(matrices: Sequence[tuple[str, Any]], caption: str) -> Any:
    """Attention between channels, one matrix per layer; colours are scaled for each alone."""
    columns = min(len(matrices), 4)
    rows = math.ceil(len(matrices) / columns)
    size = (max(2.6 * columns, 5.0), 2.7 * rows + 0.9)
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, matrix) in zip(grid.flat, matrices, strict=False):
        axes.axis("on")
        drawn = axes.imshow(matrix, cmap="plasma", interpolation="nearest")
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("channel looked at", fontsize=7)
        axes.set_ylabel("output channel", fontsize=7)
        figure.colorbar(drawn, ax=axes, shrink=0.75).ax.tick_params(labelsize=6)
    figure.supxlabel(_wrapped(caption, size[0]), fontsize=8)
    return figure


def save_arrays(arrays: dict[str, Any], path: Path) -> None:
    """Write arrays as a compressed .npz file under a temporary name and rename it.

    Raises:
        SavingError: The file cannot be written.
    """
    with replaced(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{name: np.asarray(value) for name, value in arrays.items()})
