"""Using a trained detection run: evaluation on a split, boxes and masks of image files."""

import json
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
from torch import Tensor, nn

from visionattn._figures import save_picture
from visionattn.data.detection_transforms import DetectionSamples, DetectionTransform
from visionattn.data.images import read_image
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.config import write_text
from visionattn.tasks.detection import has_masks
from visionattn.tasks.detection_baseline import baseline
from visionattn.tasks.detection_data import make_detector
from visionattn.tasks.detection_metrics import CocoScores, encode_detections, result_rows
from visionattn.tasks.detection_report import draw_objects, write_report
from visionattn.tasks.inference import distinct_stems, read_checkpoint, run_config

_SHOWN = 6  # images in the picture of an evaluation


@dataclass
class Finder:
    """A detector with what is needed to use it on images."""

    name: str
    model: nn.Module
    classes: list[str]
    category_ids: list[int]
    in_chans: int
    score: float
    checkpoint: str

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> dict[str, Any]:
        """Encoded detections of one image ``[C, H, W]`` in [0, 1]."""
        device = next(self.model.parameters()).device
        return encode_detections(self.model([image.to(device)])[0])


def load_finder(run: str | Path, averaged: bool | None = None) -> Finder:
    """Load the best checkpoint of a detection run.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Returns:
        The network in evaluation mode.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a detection run, or has no averaged weights.
    """
    path, hparams, weights = read_checkpoint(run, averaged)
    try:
        arguments, classes, ids = dict(hparams["model"]), hparams["classes"], hparams["category_ids"]
        score, in_chans = float(hparams["score"]), hparams["in_chans"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a detection ({type(error).__name__})") from error
    model = make_detector(arguments, classes, in_chans)
    model.load_state_dict(weights)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    name = f"{arguments.get('detector', 'retinanet')} {arguments.get('backbone', '')}".strip()
    return Finder(name, model, classes, ids, in_chans, score, str(path))


def evaluate_objects(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run; writes ``RUN/eval/SPLIT``: metrics.json, per_class.csv, detections.json, report.md, pictures.

    Args:
        run: Folder of the run, or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``data.val_split=test``; with
            ``baseline=true`` a grid of boxes of the training split's median size is measured beside.
        averaged: As in ``load_finder``.

    Returns:
        ``scores``, as ``CocoScores.compute`` gives them with None for NaN, and what was measured with which weights.

    Raises:
        FileNotFoundError: The run or its data are missing.
        ValueError: Other classes than those of the training, or an unreadable image.
    """
    finder = load_finder(run, averaged)
    config, folder = run_config(run, overrides)
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split)
    if source.classes != finder.classes:
        raise ValueError(f"the model was trained on {finder.classes[:5]}, the data has {source.classes[:5]}")
    masks = has_masks(finder.model)
    samples = DetectionSamples(
        source, DetectionTransform(masks=False, train=False), config.seed, config.data.on_error, replace=False
    )
    scores, skipped, rows, shown = CocoScores(finder.classes, masks), [], [], []
    numbers = range(len(samples))
    pictured = {round(i * max(len(samples) - 1, 0) / max(_SHOWN - 1, 1)) for i in range(_SHOWN)}
    for i in track(numbers, description="evaluating", transient=True, disable=not sys.stderr.isatty()):
        item = samples[0, i, i]
        skipped += item["skipped"]
        if "image" not in item:
            continue
        found = finder(item["image"])
        scores.add(i, item["truth"], found)
        rows += [{**row, "file_name": item["name"]} for row in result_rows(i + 1, found, finder.category_ids)]
        if i in pictured:
            shown.append((item["name"], _pixels(item["image"]), item["truth"], from_score(found, finder.score)))
    result: dict[str, Any] = dict(
        task="detection",
        name=finder.name,
        checkpoint=finder.checkpoint,
        checkpoint_sha256=sha256(finder.checkpoint),
        split=config.data.val_split,
        images=len(scores.found),
        objects=sum(len(truth["boxes"]) - sum(truth["crowd"]) for truth, _ in scores.found.values()),
        skipped=len(skipped),
        skipped_images=skipped,
        scores=_plain(scores.compute()),
    )
    if config.get("baseline"):
        train = hydra.utils.instantiate(config.data.source, split=config.data.train_split)
        result["baseline"] = _plain(baseline(train, scores))
    output = folder / "eval" / str(config.data.val_split)
    write_text(output / "metrics.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_text(output / "detections.json", json.dumps(rows) + "\n")
    write_report(output, result, shown, folder / "logs")
    return result


def _plain(values: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return None if isinstance(values, float) and math.isnan(values) else values


def _pixels(image: Tensor) -> np.ndarray:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def from_score(found: dict[str, Any], score: float) -> dict[str, Any]:
    """The detections with at least a score."""
    kept = [i for i, value in enumerate(found["scores"]) if value >= score]
    return {key: [values[i] for i in kept] for key, values in found.items()}


def find_objects(finder: Finder, pixels: np.ndarray) -> dict[str, Any]:
    """Encoded detections of one image ``[H, W, C]`` uint8."""
    return finder(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


def draw_found(finder: Finder, pixels: np.ndarray, found: dict[str, Any]) -> tuple[Image.Image, int]:
    """The image with its objects from the run's score on, and their number.

    Args:
        finder: From ``load_finder``.
        pixels: ``[H, W, C]`` uint8.
        found: Of ``find_objects``.
    """
    drawn = from_score(found, finder.score)
    captions = [f"{score:.0%}" for score in drawn["scores"]]
    if len(finder.classes) > 1:
        captions = [f"{finder.classes[i - 1]} {text}" for i, text in zip(drawn["labels"], captions, strict=True)]
    picture = draw_objects(pixels, drawn["boxes"], drawn["labels"], captions, drawn.get("masks"))
    return picture, len(drawn["boxes"])


def predict_objects(run: str | Path, images: list[str], output: str | Path) -> Iterator[tuple[Path, int]]:
    """Write pictures with boxes and masks, and all detections in COCO's format.

    Args:
        run: Folder of the run, or a checkpoint file.
        images: Image files.
        output: Folder for ``NAME_objects.png`` and ``detections.json``: rows of image_id (1 for the first image),
            file_name, category_id, category, bbox (left, top, width, height), score and perhaps segmentation.

    Yields:
        Each picture and its number of objects from the run's score on, as soon as it is written.

    Raises:
        FileNotFoundError: A missing run or image.
        ValueError: An unreadable image, or two of one name.
    """
    stems = distinct_stems(images)
    finder, folder = load_finder(run), Path(output)
    names = dict(zip(finder.category_ids, finder.classes, strict=True))
    rows = []
    for number, (path, stem) in enumerate(zip(images, stems, strict=True), 1):
        pixels = np.array(read_image(path, finder.in_chans))
        pixels = pixels.reshape(*pixels.shape[:2], finder.in_chans)
        found = find_objects(finder, pixels)
        for row in result_rows(number, found, finder.category_ids):
            rows.append({**row, "file_name": str(path), "category": names[row["category_id"]]})
        picture, count = draw_found(finder, pixels, found)
        target = folder / f"{stem}_objects.png"
        save_picture(picture, target)
        yield target, count
    write_text(folder / "detections.json", json.dumps(rows, indent=1) + "\n")


def predict_command(args: Any) -> Iterator[str]:
    """``visionattn predict`` for objects."""
    if args.run_folder is None:
        raise ValueError("--task detection needs --run FOLDER")
    folder = Path("predictions" if args.output == "prediction.png" else args.output)
    for path, count in predict_objects(args.run_folder, args.images, folder):
        yield f"objects: {path} ({count})"
    yield f"detections: {folder / 'detections.json'}"
