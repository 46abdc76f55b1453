"""Draw published accuracy against measured throughput, and memory against resolution, into docs/images."""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path

import timm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

import visionattn
from visionattn.tasks.checkpoints import full_name
from visionattn.tasks.zoo import measured_speeds, published_figures

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks"
# top-1 in percent of timm's peers, as published: arXiv:2103.14030 table 1, arXiv:2201.03545 table 1
PEERS = {"swin_tiny_patch4_window7_224": 81.3, "convnext_tiny": 82.1}
MODES = ("inference", "training")


def _accuracies(names: Iterable[str]) -> dict[str, float]:
    """Published top-1 of those models that have one, by name."""
    published, found = published_figures(ROOT / "checkpoints"), dict(PEERS)
    for name in set(names) & set(visionattn.list_models()):
        if row := published.get(full_name(timm.create_model(name, device="meta"))):
            found[name] = float(row["top1"])
    return found


def _family(name: str) -> str:
    return "peers" if name in PEERS else name.partition("_")[0]


def draw_speed(path: Path) -> None:
    """Published top-1 against images/s of inference and of training; hollow where the host set the pace."""
    speeds = measured_speeds(BENCHMARKS / "models.csv")
    accuracies = _accuracies(speeds)
    families = sorted({_family(name) for name in accuracies if name in speeds} - {"peers"})
    colours = {family: f"C{i}" for i, family in enumerate(families)} | {"peers": "grey"}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, mode in zip(figure.subplots(1, 2, sharey=True), MODES, strict=True):
        for name, top1 in accuracies.items():
            cell = speeds.get(name, {}).get(f"images/s, {mode}")
            if cell is None:
                continue
            rate, colour = float(cell.rstrip(" *").replace(",", "")), colours[_family(name)]
            axes.plot(rate, top1, "o", color=colour, markerfacecolor="none" if "*" in cell else colour)
            axes.annotate(
                name.partition("_patch")[0],
                (rate, top1),
                (4, -11 if name in PEERS else 5),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([500, 1000, 2000, 5000, 10000, 20000]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.18, y=0.12)
        axes.grid(alpha=0.3, which="both")
        axes.set_xlabel(f"images/s, {mode}")
    figure.axes[0].set_ylabel("published top-1, %")
    figure.suptitle(
        "224 pixels, one H100, bf16, batch 128 or 64; filled: CUDA graphs, hollow: one call at a time (host-bound)",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def _memory_lines(axes: Axes, rows: list[dict[str, str]]) -> None:
    for name in dict.fromkeys(row["model"] for row in rows):
        own = sorted(
            (int(row["height"]), float(row["peak_gib"]) / int(row["batch"])) for row in rows if row["model"] == name
        )
        if len(own) > 1:
            style = dict(color="grey", marker="so"[list(PEERS).index(name) % 2]) if name in PEERS else dict(marker="o")
            axes.plot(*zip(*own, strict=True), label=name.partition("_patch")[0], **style)


def draw_memory(path: Path, rows: list[dict[str, str]]) -> None:
    """Peak memory of an image against the side of square images, of training and of dense features."""
    modes = [mode for mode in ("training", "features") if any(row["mode"] == mode for row in rows)]
    figure = Figure(figsize=(5 * len(modes), 4.2), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        _memory_lines(axes, [row for row in rows if row["mode"] == mode])
        axes.set(xlabel="height and width, pixels", ylabel=f"peak GiB an image, {mode}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted({int(row["height"]) for row in rows})))
        axes.yaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2, 5]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']} autocast, weights included", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    draw_speed(folder / "zoo_speed.png")
    resolutions = BENCHMARKS / "resolution.csv"
    if resolutions.is_file():
        with resolutions.open(newline="", encoding="utf-8") as file:
            draw_memory(folder / "zoo_memory.png", list(csv.DictReader(file)))
