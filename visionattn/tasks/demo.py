"""A whole use of the package in a few minutes: train, evaluate, draw, and compare with what is usual."""

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
from matplotlib.figure import Figure

from visionattn.data.datasets import EmbeddedDigits
from visionattn.tasks.config import compose, write_text
from visionattn.tasks.inference import Classifier, draw, load_run, predict, save_figure
from visionattn.tasks.train import train

MODEL = "biformer_nano"
PEER = "edgenext_xx_small"  # of timm's models below 2 M parameters tried on these digits the best for its time
_SHOWN = 40


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
    return {name: float(c.fit(x, train.labels).score(y, val.labels)) for name, c in classifiers.items()}


def _train(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Train on the digits with the same recipe for every model; returns top-1, seconds and the curve."""
    config = compose(["experiment=digits", f"output_dir={folder}", f"name={name}", "overwrite=true", *overrides])
    rank_zero_info(f"{name}: {config.trainer.max_epochs} epochs")
    start = time.perf_counter()
    metrics = train(config)
    seconds = time.perf_counter() - start
    return dict(
        parameters=sum(
            p.numel() for p in timm.create_model(config.model.model_name, num_classes=10, in_chans=1).parameters()
        ),
        epochs=config.trainer.max_epochs,
        seconds=seconds,
        top1=metrics["val/top1"],
        curve=_curve(folder / name / "logs" / "metrics.csv"),
    )


def _curve(path: Path) -> dict[str, list[float]]:
    """Columns of an epoch log: training loss, top-1, and seconds since the start."""
    epochs: dict[int, dict[str, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            epochs.setdefault(int(row["epoch"]), {}).update({k: float(v) for k, v in row.items() if v})
    rows = [epochs[number] for number in sorted(epochs)]
    curve = {key: [row[key] for row in rows] for key in ("train/loss", "val/top1", "epoch_seconds")}
    passed = 0.0
    curve["seconds"] = [passed := passed + seconds for seconds in curve.pop("epoch_seconds")]
    return curve


def _draw_curves(results: dict[str, dict[str, Any]], simple: dict[str, float], output: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, result in results.items():
        curve = result["curve"]
        left.plot(curve["seconds"], curve["train/loss"], marker=".", label=name)
        right.plot(curve["seconds"], [100 * value for value in curve["val/top1"]], marker=".", label=name)
    for (name, top1), style in zip(simple.items(), ("--", ":"), strict=True):
        right.axhline(100 * top1, color="gray", linestyle=style, label=name.partition(" (")[0])
    right.set_ylim(max(right.get_ylim()[0], 80), 100)
    left.set(xlabel="seconds of training", ylabel="training loss")
    right.set(xlabel="seconds of training", ylabel="top-1 of the held-out images in %")
    right.legend()
    save_figure(figure, output)


def _draw_predictions(classifier: Classifier, output: Path) -> float:
    """Contact sheet: every mistake first, then right answers. Returns top-1 counted from the same predictions."""
    source = EmbeddedDigits("val")
    images, labels, _ = zip(*(source[i] for i in range(len(source))), strict=True)
    results = [result[0] for result in predict(classifier, list(images), 1)]
    right = [name == source.classes[label] for (name, _), label in zip(results, labels, strict=True)]
    order = sorted(range(len(right)), key=lambda i: right[i])[:_SHOWN]
    titles = [f"{results[i][0]}  {results[i][1]:.0%}" + ("" if right[i] else f"\ntruth {labels[i]}") for i in order]
    draw([images[i] for i in order], titles, output, ["black" if right[i] else "crimson" for i in order])
    return sum(right) / len(right)


def _report(results: dict[str, dict[str, Any]], simple: dict[str, float], seconds: float) -> str:
    rows = [
        f"| {name} | {result['parameters'] / 1e6:.2f} M | {result['epochs']} | {result['curve']['seconds'][-1]:.0f} s "
        f"| **{result['top1']:.1%}** |"
        for name, result in results.items()
    ]
    return "\n".join(
        [
            "# Demo: 5,000 real digits, 4,000 to train and 1,000 held out",
            "",
            "| model | parameters | epochs | training | top-1 of the held-out images after the last epoch |",
            "|---|---|---|---|---|",
            *(f"| {name} | - | - | - | **{top1:.1%}** |" for name, top1 in simple.items()),
            *rows,
            "",
            f"{MODEL} is ours, {PEER} is timm's: same images, augmentation and optimizer, each with the learning rate "
            "that suited it better, and for the peer at least the same time; no choice of epoch for either. The digits "
            "are easy and 1,000 images resolve about 0.5 points: this shows that everything works, not which network "
            "is better.",
            "",
            f"The whole demo took {seconds:.0f} s with {torch.get_num_threads()} threads, PyTorch {torch.__version__}.",
            "",
        ]
    )


def demo(folder: Path, overrides: list[str]) -> str:
    """Train ``biformer_nano`` on the embedded digits, and a timm model of similar size for the same time.

    Args:
        folder: Where everything is written: ``report.md``, ``metrics.json``, ``learning_curve.png``,
            ``predictions.png`` and the two runs. Files of a former demo there are replaced.
        overrides: Changes to the configuration of both trainings, for example ``["seed=1"]``.

    Returns:
        The report as Markdown.
    """
    begin = time.perf_counter()
    simple = baselines()
    rank_zero_info(", ".join(f"{name}: top-1 {top1:.1%}" for name, top1 in simple.items()))
    ours = _train(folder, MODEL, *overrides)
    # the first epoch costs more than the later ones, so the peer gets rather more time than less
    peer = [f"model.model_name={PEER}", "~model.n_win", "~model.topks", "task.lr=3.2e-2", *overrides]
    probe = _train(folder, "probe", *peer, "trainer.max_epochs=1")["curve"]["seconds"][0]
    shutil.rmtree(folder / "probe")
    theirs = _train(folder, PEER, *peer, f"trainer.max_epochs={math.ceil(ours['curve']['seconds'][-1] / probe)}")
    results = {MODEL: ours, PEER: theirs}
    classifier = load_run(folder / MODEL / "checkpoints" / "last.ckpt")
    ours["top1"] = _draw_predictions(classifier, folder / "predictions.png")
    _draw_curves(results, simple, folder / "learning_curve.png")
    seconds = time.perf_counter() - begin
    report = _report(results, simple, seconds)
    metrics = dict(baselines_top1=simple, models=results, seconds=seconds)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_text(folder / "report.md", report)
    return f"{report}\nwritten to {folder}: report.md, metrics.json, learning_curve.png, predictions.png"
