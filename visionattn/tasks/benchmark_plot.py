"""A picture of timed models: throughput, and the percentiles of the time of a batch."""

from pathlib import Path
from typing import Any

from visionattn._writing import replaced

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Fail before anything is timed.

    Raises:
        ValueError: The path is a folder or has another suffix than .png, .svg and .pdf.
        ImportError: matplotlib is not installed.
    """
    if path.is_dir() or path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"--plot {path}: expected the name of a file that ends with {', '.join(_SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "visionattn[train]"') from error


def plot_models(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw rows of ``benchmark_models`` as bars.

    Args:
        rows: With ``model``, ``mode``, ``images_per_s``, ``median_ms``, ``p90_ms`` and ``p99_ms``.
        title: What the rows have in common.
        path: File to write, .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.32 * len(rows)), layout="constrained")
    speed, latency = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    colours = [f"C{modes.index(row['mode'])}" for row in rows]
    speed.barh(places, [row["images_per_s"] for row in rows], color=colours)
    speed.set_yticks(places, [f"{row['model']}, {row['mode']}" for row in rows])
    speed.invert_yaxis()
    speed.set_xlabel("images/s")
    for key, marker in (("median_ms", "o"), ("p90_ms", "|"), ("p99_ms", "x")):
        label = {"median_ms": "p50"}.get(key, key.removesuffix("_ms"))
        latency.plot([row[key] for row in rows], places, marker, color="black", label=label)
    latency.hlines(places, [row["median_ms"] for row in rows], [row["p99_ms"] for row in rows], colors=colours)
    latency.set_xlabel("ms for a batch")
    latency.set_xlim(left=0)
    latency.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium", wrap=True)
    with replaced(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
