"""Using a trained run of semantic segmentation: evaluation on a split, labels of image files."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import nn
from torch.utils.data import DataLoader

from visionattn._figures import save_picture
from visionattn.data.masks import read_pixels
from visionattn.data.pipeline import EpochSampler
from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.segmentation_pipeline import SegmentationSamples, collate_samples
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.inference import distinct_stems, read_checkpoint, run_config
from visionattn.tasks.semantic import best_labels, class_scores, confusion_matrix, set_scores
from visionattn.tasks.semantic_data import make_labeller
from visionattn.tasks.semantic_report import Shown, colored, write_report

_SHOWN = 8  # images of the report


@dataclass
class Labeller:
    """A network with what is needed to use it on images."""

    name: str
    model: nn.Module
    classes: list[str]
    palette: list[list[int]]
    in_chans: int
    transform: dict[str, Any]
    window: int | None
    overlap: float
    flips: bool
    checkpoint: str

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device


def load_labeller(run: str | Path, averaged: bool | None = None) -> Labeller:
    """Load the best checkpoint of a run.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Returns:
        The network in evaluation mode.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of such a run, or has no averaged weights.
    """
    path, hparams, weights = read_checkpoint(run, averaged)
    try:
        arguments, palette = dict(hparams["model"]), hparams["palette"]
        how = (dict(hparams["data"]), hparams["window"], hparams["overlap"], hparams["flips"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a semantic segmentation ({type(error).__name__})") from error
    model = make_labeller(arguments, hparams["classes"], hparams["in_chans"])
    model.load_state_dict(weights)
    name = f"{arguments.get('decoder', arguments['_target_'].rsplit('.', 1)[-1])} {arguments.get('backbone', '')}"
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Labeller(name.strip(), model, hparams["classes"], palette, hparams["in_chans"], *how, str(path))


@torch.inference_mode()
def evaluate_labels(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run; writes ``RUN/eval/SPLIT``: metrics.json, per_class.csv, confusion.csv, report.md and pictures.

    Args:
        run: Folder of the run, or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``task.flips=true``.
        averaged: As in ``load_labeller``.

    Returns:
        ``miou``, ``macc`` and ``aacc`` of the whole split in [0, 1], ``classes`` with ``iou``, ``accuracy`` (None
        without a pixel) and ``pixels`` of each, and what was measured with which weights.

    Raises:
        FileNotFoundError: The run or its data are missing.
        ValueError: Other classes than those of the training, no truth, or an unreadable sample.
    """
    labeller = load_labeller(run, averaged)
    config, folder = run_config(run, overrides)
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split)
    if source.classes != labeller.classes:
        raise ValueError(f"the model was trained on {labeller.classes}, the data has {source.classes}")
    transform = SegmentationTransform(**labeller.transform, train=False)
    samples = SegmentationSamples(source, transform, config.seed, config.data.on_error, replace=False)
    loader = DataLoader(
        samples,
        sampler=EpochSampler(samples, shuffle=False),
        num_workers=config.data.workers,
        collate_fn=collate_samples,  # one image a batch, for their sizes differ
    )
    matrix = confusion_matrix(len(labeller.classes)).to(labeller.device)
    shown: list[Shown] = []
    skipped: list[str] = []
    images, how = 0, (config.task.window, config.task.overlap, config.task.flips)
    for batch in track(loader, description="evaluating", transient=True, disable=not sys.stderr.isatty()):
        skipped += batch["skipped"]
        mask = batch["mask"]
        if not len(mask) or not bool((mask != IGNORE).any()):
            continue
        scores = class_scores(labeller.model, batch["image"].to(labeller.device), *how)
        found = best_labels(scores, tuple(mask.shape[-2:]))
        matrix.update(found, mask.to(labeller.device))
        images += 1
        if len(shown) < _SHOWN:
            shown.append(Shown(batch["name"][0], batch["image"][0], mask[0], found[0].cpu()))
    if not images:
        raise ValueError(f"split {config.data.val_split!r} has no image with a truth to measure; {skipped[:1]}")
    counts = matrix.compute().cpu()
    result = dict(
        task="semantic",
        name=labeller.name,
        checkpoint=labeller.checkpoint,
        checkpoint_sha256=sha256(labeller.checkpoint),
        split=config.data.val_split,
        images=images,
        skipped=len(skipped),
        skipped_images=skipped,
        window=config.task.window,
        flips=config.task.flips,
        **_scores(counts, labeller.classes),
    )
    write_report(folder / "eval" / str(config.data.val_split), result, counts, shown, labeller.palette, folder / "logs")
    return result


def _scores(counts: torch.Tensor, classes: list[str]) -> dict[str, Any]:
    """``set_scores`` in plain values, by the names of the classes."""
    scores = set_scores(counts)
    known = [[None if math.isnan(x) else x for x in scores[key].tolist()] for key in ("iou", "accuracy")]
    rows = zip(*known, counts.sum(1).tolist(), strict=True)
    return dict(
        **{name: scores[name] for name in ("miou", "macc", "aacc")},
        classes={
            name: dict(iou=iou, accuracy=accuracy, pixels=pixels)
            for name, (iou, accuracy, pixels) in zip(classes, rows, strict=True)
        },
    )


@torch.inference_mode()
def label_pixels(labeller: Labeller, pixels: np.ndarray, window: int | None = None, flips: bool = False) -> np.ndarray:
    """Labels of one image.

    Args:
        labeller: From ``load_labeller``.
        pixels: ``[H, W, C]``, as ``read_pixels`` gives them.
        window: Side of the windows; by default the run's.
        flips: Average over the mirror image even if the run does not.

    Returns:
        ``[H, W]`` uint8.
    """
    sample = SegmentationTransform(**labeller.transform, train=False)(Sample(pixels, None, "image"))
    how = (window or labeller.window, labeller.overlap, flips or labeller.flips)
    scores = class_scores(labeller.model, sample["image"][None].to(labeller.device), *how)
    return best_labels(scores, pixels.shape[:2])[0].cpu().numpy().astype(np.uint8)


def predict_labels(
    run: str | Path, images: list[str], output: str | Path, window: int | None = None, flips: bool = False
) -> list[Path]:
    """Write labels and overlays of image files, at their own sizes.

    Args:
        run: Folder of the run, or a checkpoint file.
        images: Image files; as in training they are not turned by their EXIF data.
        output: Folder for ``NAME_labels.png`` (indices, with the colours as palette) and ``NAME_overlay.png``.
        window: Side of the windows; by default the run's.
        flips: Average over the mirror image even if the run does not.

    Returns:
        The files of labels.

    Raises:
        FileNotFoundError: A missing run or image.
        ValueError: An unreadable image, or two of one name.
    """
    stems = distinct_stems(images)
    labeller, folder, written = load_labeller(run), Path(output), []
    for path, stem in zip(images, stems, strict=True):
        pixels = read_pixels(path, labeller.in_chans)
        mask = label_pixels(labeller, pixels, window, flips)
        picture = Image.fromarray(mask)
        picture.putpalette(np.array(labeller.palette, np.uint8).tobytes())
        target = folder / f"{stem}_labels.png"
        save_picture(picture, target)
        save_picture(Image.fromarray(colored(mask, labeller.palette, pixels)), folder / f"{stem}_overlay.png")
        written.append(target)
    return written


def predict_command(args: Any) -> Iterator[str]:
    """``visionattn predict`` for labels of scenes."""
    if args.run_folder is None:
        raise ValueError("--task semantic needs --run FOLDER")
    folder = "predictions" if args.output == "prediction.png" else args.output
    for path in predict_labels(args.run_folder, args.images, folder, args.window, args.flips):
        yield f"labels: {path}"
