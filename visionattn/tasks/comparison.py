"""Several models trained on the embedded digits, beside what is usual: simple classifiers and a timm model."""

import csv
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig

from visionattn.data.datasets import EmbeddedDigits
from visionattn.tasks.config import compose, write_text
from visionattn.tasks.train import train

PEER = "edgenext_xx_small"  # of timm's models below 2 M parameters tried on these digits the best for its time
_PEER_SETTINGS = ["experiment=digits", f"model.model_name={PEER}", "~model.n_win", "~model.topks", "task.lr=3.2e-2"]


def baselines() -> dict[str, float]:
    """Top-1 of two classifiers of pixel vectors that need seconds: what a network must beat to be worth its time."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    train, val = (EmbeddedDigits(split) for split in ("train", "val"))
    x, y = (split.images.reshape(len(split), -1) / 255 for split in (train, val))
    classifiers = {
        "nearest neighbour (angle of pixel vectors)": KNeighborsClassifier(1, metric="cosine"),
        "support vector machine (RBF kernel, pixels)": SVC(C=10),
    }
    results = {name: float(c.fit(x, train.labels).score(y, val.labels)) for name, c in classifiers.items()}
    rank_zero_info(", ".join(f"{name}: top-1 {top1:.1%}" for name, top1 in results.items()))
    return results


def train_timed(folder: Path, name: str, overrides: list[str]) -> dict[str, Any]:
    """Train one model and say what it took.

    Args:
        folder: Where the run's folder ``name`` goes; a former run there is replaced.
        name: Name of the run.
        overrides: The configuration.

    Returns:
        ``parameters``, ``epochs``, ``seconds``, ``top1`` after the last epoch, and the ``curve``.
    """
    config = compose([*overrides, f"output_dir={folder}", f"name={name}", "overwrite=true"])
    rank_zero_info(f"{name}: {config.trainer.max_epochs} epochs")
    start = time.perf_counter()
    metrics = train(config)
    seconds = time.perf_counter() - start
    model = timm.create_model(config.model.model_name, num_classes=10, in_chans=1, device="meta")
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        epochs=config.trainer.max_epochs,
        seconds=seconds,
        top1=metrics["val/top1"],
        curve=_curve(folder / name / "logs" / "metrics.csv"),
    )


def read_epochs(path: Path) -> list[dict[str, float]]:
    """One row an epoch of a run's ``metrics.csv``, in which the figures of an epoch stand in several lines."""
    epochs: dict[int, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epochs.setdefault(int(row["epoch"]), {}).update({k: float(v) for k, v in row.items() if v})
    return [epochs[number] for number in sorted(epochs)]


def _curve(path: Path) -> dict[str, list[float]]:
    """Columns of an epoch log: training loss, top-1, and seconds since the start."""
    rows = read_epochs(path)
    curve = {key: [row[key] for row in rows] for key in ("train/loss", "val/top1", "epoch_seconds")}
    passed = 0.0
    curve["seconds"] = [passed := passed + seconds for seconds in curve.pop("epoch_seconds")]
    return curve


def train_peer(folder: Path, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """Train timm's ``PEER`` on the digits for about ``seconds``, as ``train_timed`` does."""
    settings = [*_PEER_SETTINGS, *overrides]
    probe = train_timed(folder, "probe", [*settings, "trainer.max_epochs=1"])["curve"]["seconds"][0]
    shutil.rmtree(folder / "probe")
    return train_timed(folder, PEER, [*settings, f"trainer.max_epochs={math.ceil(seconds / probe)}"])


def table(simple: dict[str, float], results: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table of the baselines and what ``train_timed`` gave."""
    return [
        "| model | parameters | epochs | training | top-1 of the held-out images after the last epoch |",
        "|---|---|---|---|---|",
        *(f"| {name} | - | - | - | **{top1:.1%}** |" for name, top1 in simple.items()),
        *(
            f"| {name} | {result['parameters'] / 1e6:.2f} M | {result['epochs']} | "
            f"{result['curve']['seconds'][-1]:.0f} s | **{result['top1']:.1%}** |"
            for name, result in results.items()
        ),
    ]


def compare(config: DictConfig, overrides: list[str]) -> str:
    """Train every model of a configuration's ``models`` on the digits, then the peer for the longest of their times.

    Args:
        config: With ``models``: name of the run to its own changes of the configuration.
        overrides: What the configuration was composed from.

    Returns:
        The report as Markdown; it is also written to ``report.md``, with ``metrics.json``, in ``output_dir/name``.

    Raises:
        ValueError: The configuration is for other data than the digits.
    """
    if not config.data.source._target_.endswith("EmbeddedDigits"):
        raise ValueError(f"models is for the embedded digits, got {config.data.source._target_}; set models=null")
    folder = Path(config.output_dir, config.name)
    simple, results = baselines(), {}
    for name, changes in config.models.items():
        results[name] = train_timed(folder, name, [*changes, *overrides])
    longest = max(result["curve"]["seconds"][-1] for result in results.values())
    own = ("experiment=", "models", "~models", "+models", "name=", "output_dir=")
    given = [text for text in overrides if not text.startswith(own)]
    results[PEER] = train_peer(folder, longest, given)
    report = "\n".join(
        [
            "# 5,000 real digits, 4,000 to train and 1,000 held out",
            "",
            *table(simple, results),
            "",
            f"{PEER} is timm's, trained for the time of the slowest of ours; it has more parameters than they do. No "
            "choice of epoch for any. The digits are easy and 1,000 images resolve about 0.5 points: this shows that "
            f"every family trains. {torch.get_num_threads()} threads, PyTorch {torch.__version__}.",
            "",
        ]
    )
    write_text(folder / "metrics.json", json.dumps(dict(baselines_top1=simple, models=results), indent=1))
    write_text(folder / "report.md", report)
    return f"{report}\nwritten to {folder}: report.md, metrics.json"
