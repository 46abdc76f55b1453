"""A whole use of the package in a few minutes: train, evaluate, draw, and compare with what is usual."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from visionattn._figures import save_figure
from visionattn.data.datasets import EmbeddedDigits
from visionattn.tasks.comparison import PEER, baselines, table, train_peer, train_timed
from visionattn.tasks.config import write_text
from visionattn.tasks.inference import Classifier, draw, load_run, predict

MODEL = "biformer_nano"
_SHOWN = 40


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
    return "\n".join(
        [
            "# Demo: 5,000 real digits, 4,000 to train and 1,000 held out",
            "",
            *table(simple, results),
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
    ours = train_timed(folder, MODEL, ["experiment=digits", *overrides])
    results = {MODEL: ours, PEER: train_peer(folder, ours["curve"]["seconds"][-1], overrides)}
    classifier = load_run(folder / MODEL / "checkpoints" / "last.ckpt")
    ours["top1"] = _draw_predictions(classifier, folder / "predictions.png")
    _draw_curves(results, simple, folder / "learning_curve.png")
    seconds = time.perf_counter() - begin
    report = _report(results, simple, seconds)
    metrics = dict(baselines_top1=simple, models=results, seconds=seconds)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1))
    write_text(folder / "report.md", report)
    return f"{report}\nwritten to {folder}: report.md, metrics.json, learning_curve.png, predictions.png"
