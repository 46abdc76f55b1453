"""A trained Pointer Network on convex hulls: exact sequences and areas by number of points, hulls of own points."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from torch import Tensor

from visionattn._figures import save_figure
from visionattn.data.hull import RandomHulls, collate_points
from visionattn.heads.pointer_network import PointerNetwork
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.config import write_text
from visionattn.tasks.hull import make_network
from visionattn.tasks.inference import read_checkpoint, run_config
from visionattn.tasks.records import markdown

SIZES = (5, 10)
"""Numbers of points that an evaluation takes beside those of the run."""


def area(points: np.ndarray) -> float:
    """Area of a polygon ``[n, 2]``, positive counter-clockwise."""
    x, y = points.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def is_simple(points: np.ndarray) -> bool:
    """Whether a polygon ``[n, 2]`` has at least three corners, none twice, and sides that do not cross."""
    n = len(points)
    if n < 3 or len({tuple(p) for p in points.tolist()}) < n:
        return False

    def turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> bool:
        return bool((b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0]))

    sides = [(points[i], points[(i + 1) % n]) for i in range(n)]
    for i in range(n):
        for j in range(i + 2, n - (i == 0)):
            (a, b), (c, d) = sides[i], sides[j]
            if turn(a, b, c) != turn(a, b, d) and turn(c, d, a) != turn(c, d, b):
                return False
    return True


def load_pointer(run: str | Path, averaged: bool | None = None) -> tuple[PointerNetwork, dict[str, Any], Path]:
    """Network in evaluation mode, hyperparameters and file of a run's best checkpoint; errors as
    ``read_checkpoint``."""
    path, hparams, weights = read_checkpoint(run, averaged)
    model = make_network(dict(hparams["model"]))
    model.load_state_dict(weights)
    return model.eval(), hparams, path


@torch.inference_mode()
def evaluate_hulls(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run on 1,000 sets of points of each size; writes ``RUN/eval/SPLIT/metrics.json``.

    ``exact``: share of whole sequences that are right, with a 95 % interval by the normal approximation; ``simple``:
    share of results that are simple polygons; ``area``: mean share of the true hull's area that those cover.

    Args:
        run: Folder of the run, or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``data.val_split=test``.
        averaged: As in ``read_checkpoint``.

    Raises:
        FileNotFoundError: The run is missing.
        ValueError: The file is no checkpoint.
    """
    model, hparams, path = load_pointer(run, averaged)
    config, folder = run_config(run, overrides)
    results = {}
    for size in sorted({*hparams["data"]["sizes"], *SIZES}):
        source: RandomHulls = hydra.utils.instantiate(
            config.data.source, split=config.data.val_split, sizes=[size], count=1000
        )
        batch = collate_points([source[0, i, i] for i in range(len(source))])
        found = model.generate(batch["image"], batch["counts"], size + 1)
        exact = np.mean([p == t for p, t in zip(found, source.paths, strict=True)])
        shares = [
            area(points[p]) / area(points[t])
            for points, p, t in zip(source.points, found, source.paths, strict=True)
            if is_simple(points[p])
        ]
        error = 1.96 * float(np.sqrt(exact * (1 - exact) / len(found)))
        results[str(size)] = dict(
            items=len(found),
            exact=float(exact),
            ci95=[float(exact) - error, float(exact) + error],
            simple=len(shares) / len(found),
            area=float(np.mean(np.abs(shares))) if shares else None,
            trained=size in hparams["data"]["sizes"],
        )
    result: dict[str, Any] = dict(
        task="hull",
        checkpoint=str(path),
        checkpoint_sha256=sha256(str(path)),
        split=config.data.val_split,
        sizes=results,
    )
    write_text(folder / "eval" / str(config.data.val_split) / "metrics.json", json.dumps(result, indent=1) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown table of an evaluation."""
    rows = []
    for size, entry in result["sizes"].items():
        covered = "" if entry["area"] is None else f"{entry['area']:.1%}"
        low, high = entry["ci95"]
        seen = "yes" if entry["trained"] else "no"
        rows.append(
            [size, seen, f"{entry['exact']:.1%}", f"{low:.1%} to {high:.1%}", f"{entry['simple']:.1%}", covered]
        )
    return markdown(["points", "trained on", "exact", "95 % interval", "simple polygons", "area of those"], rows)


def _read(path: str) -> np.ndarray:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file of points at {path}")
    try:
        points = np.array(json.loads(Path(path).read_text(encoding="utf-8")), dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must hold a JSON list of points [x, y] in the unit square: {error}") from error
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3 or not np.isfinite(points).all():
        raise ValueError(f"{path} must hold at least three points [x, y], got an array {points.shape}")
    return points


def predict_command(args: Any) -> Iterator[str]:
    """``visionattn predict`` for JSON files of points: the hull of each, and a picture of all."""
    from matplotlib.figure import Figure

    if args.run_folder is None:
        raise ValueError("a hull needs --run FOLDER")
    model, _, _ = load_pointer(args.run_folder)
    figure = Figure(figsize=(3 * len(args.images), 3), layout="constrained")
    for i, path in enumerate(args.images):
        points = _read(path)
        given: Tensor = torch.from_numpy(points).float()[None]
        (found,) = model.generate(given, torch.tensor([len(points)]), len(points) + 1)
        axes = figure.add_subplot(1, len(args.images), i + 1)
        axes.plot(*points.T, "o")
        axes.plot(*points[[*found, *found[:1]]].T, "-")
        axes.set_aspect("equal")
        yield f"{path}: {found}"
    save_figure(figure, Path(args.output))
    yield f"picture: {args.output}"
