"""Draw the curves of training runs side by side: loss, score, images per second and share of waiting for data."""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

from visionattn._figures import save_figure
from visionattn.tasks.comparison import read_epochs
from visionattn.tasks.config import write_text

# columns of a joined table, and what the axes call them
FIGURES = {
    "train/loss": "training loss",
    "val/top1": "validation top-1, %",
    "images_per_second": "images/s in training",
    "data_share": "waiting for data, % of training",
}
KEPT = ("epoch", "epoch_seconds", "lr", *FIGURES, "val/loss", "peak_memory_gib")


def read_runs(paths: list[Path]) -> dict[str, list[dict[str, str]]]:
    """Rows by name of the run, from folders of runs, and from tables that ``--table`` wrote.

    Raises:
        FileNotFoundError: A path is neither.
        ValueError: A run has no whole epoch.
    """
    runs: dict[str, list[dict[str, str]]] = {}
    for path in paths:
        if path.suffix == ".csv" and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    runs.setdefault(row.pop("run"), []).append(row)
        elif (log := path / "logs" / "metrics.csv").is_file():
            # the epoch in which a run was stopped has no end
            rows = [row for row in read_epochs(log) if "epoch_seconds" in row]
            kept = [{key: f"{row[key]:g}" for key in KEPT if key in row} for row in rows]
            runs[path.name] = [row | {"epoch": str(n)} for n, row in enumerate(kept, 1)]
        else:
            raise FileNotFoundError(f"{path}: expected a run's folder with logs/metrics.csv, or a table of --table")
    if empty := [name for name, rows in runs.items() if not rows]:
        raise ValueError(f"no whole epoch in {', '.join(empty)}")
    return runs


def draw(runs: dict[str, list[dict[str, str]]], baselines: dict[str, float], path: Path) -> None:
    """Each figure against the minutes of training, the baselines as lines beside the score."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, FIGURES.items(), strict=True):
        factor = 100 if label.split(",")[-1].strip().startswith("%") else 1
        for name, rows in runs.items():
            passed, minutes = 0.0, []
            for row in rows:
                passed += float(row["epoch_seconds"]) / 60
                minutes.append(passed)
            axes.plot(minutes, [factor * float(row[key]) for row in rows], label=name)
        for i, (name, value) in enumerate(baselines.items() if key == "val/top1" else ()):
            axes.axhline(value, color="grey", linestyle=("--", ":", "-.")[i % 3], label=name)
        axes.set(xlabel="minutes of training and validation", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Read, write the table and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or a table that --table wrote")
    parser.add_argument("--baseline", action="append", default=[], metavar="NAME=PERCENT", help="a line at that top-1")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="write the epochs of all runs there as well")
    parser.add_argument("--output", type=Path, default=Path("runs.png"), help="picture (default runs.png)")
    args = parser.parse_args()
    try:
        baselines = {name: float(value) for name, _, value in (text.rpartition("=") for text in args.baseline)}
        runs = read_runs(args.runs)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if args.table:
        lines = [",".join(("run", *KEPT))]
        lines += [",".join((name, *(row.get(key, "") for key in KEPT))) for name, rows in runs.items() for row in rows]
        write_text(args.table, "\n".join(lines) + "\n")
    draw(runs, baselines, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
