"""Using a trained segmentation run: evaluation on a split, masks of image files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visionattn._figures import save_picture
from visionattn.data.masks import read_pixels
from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.segmentation_pipeline import SegmentationSamples
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.inference import distinct_stems, read_checkpoint, run_config
from visionattn.tasks.segmentation_baseline import baseline
from visionattn.tasks.segmentation_data import make_network
from visionattn.tasks.segmentation_metrics import image_metrics, summarize, write_results
from visionattn.tasks.segmentation_report import overlay, write_report
from visionattn.tasks.sliding import labels, of_size, pixels_of_file, probabilities, segment_file

_LARGE, _TILE = 2**24, 512  # pixels of a file from which it is read in tiles, and their side


@dataclass
class Masker:
    """A network with what is needed to use it on images."""

    name: str
    model: nn.Module
    classes: list[str]
    in_chans: int
    threshold: float
    transform: dict[str, Any]
    window: int | None
    flips: bool
    checkpoint: str


def load_masker(run: str | Path, averaged: bool | None = None) -> Masker:
    """Load the best checkpoint of a segmentation run.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Returns:
        The network in evaluation mode, with the threshold chosen on the validation split.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a segmentation run, or has no averaged weights.
    """
    path, hparams, weights = read_checkpoint(run, averaged)
    try:
        arguments, classes, threshold = dict(hparams["model"]), hparams["classes"], float(hparams["threshold"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a segmentation ({type(error).__name__})") from error
    model = make_network(arguments, classes, hparams["in_chans"])
    model.load_state_dict(weights)
    name = f"{arguments.get('decoder', arguments['_target_'].rsplit('.', 1)[-1])} {arguments.get('backbone', '')}"
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    how = (dict(hparams["data"]), hparams["window"], hparams["flips"])
    return Masker(name.strip(), model, classes, hparams["in_chans"], threshold, *how, str(path))


@torch.inference_mode()
def evaluate_masks(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run; writes ``RUN/eval/SPLIT``: metrics.json, per_image.csv, report.md, pictures and curves.

    The threshold is the one chosen on the validation split, whatever split is measured.

    Args:
        run: Folder of the run, or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``data.val_split=test``.
        averaged: As in ``load_masker``.

    Returns:
        For each foreground class what ``summarize`` gives, and what was measured with which weights.

    Raises:
        FileNotFoundError: The run or its data are missing.
        ValueError: Other classes than those of the training, no truth, or an unreadable sample.
    """
    masker = load_masker(run, averaged)
    config, folder = run_config(run, overrides)
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split)
    if source.classes != masker.classes:
        raise ValueError(f"the model was trained on {masker.classes}, the data has {source.classes}")
    transform = SegmentationTransform(**masker.transform, train=False)
    samples = SegmentationSamples(source, transform, config.seed, config.data.on_error, replace=False)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in masker.classes[1:]}
    shown, skipped, binned = [], [], np.zeros((99, 3))
    for i in range(len(samples)):
        batch = samples[0, i, i]
        skipped += batch["skipped"]
        if "image" not in batch or not bool((batch["mask"] != IGNORE).any()):
            continue
        mask = batch["mask"]
        found = of_size(_probabilities(masker, batch["image"], config.task.window, config.task.flips), mask)
        predicted = labels(found, masker.threshold)[0]
        for k, name in enumerate(masker.classes[1:], 1):
            truth = torch.where(mask == IGNORE, IGNORE, (mask == k).long())
            row = image_metrics(found[0, k - 1], truth, masker.threshold, batch["spacing"], prediction=predicted == k)
            rows[name].append({"name": batch["name"], "group": batch["group"], "class": name, **row})
        binned += _threshold_counts(found[0], mask)
        if len(shown) < 8:
            shown.append((batch["name"], batch["image"], mask, predicted))
    result: dict[str, Any] = dict(
        task="segmentation",
        name=masker.name,
        checkpoint=masker.checkpoint,
        checkpoint_sha256=sha256(masker.checkpoint),
        split=config.data.val_split,
        threshold=masker.threshold if len(masker.classes) == 2 else None,
        skipped=len(skipped),
        skipped_images=skipped,
        classes={name: summarize(found_rows, seed=config.seed) for name, found_rows in rows.items()},
    )
    if config.get("baseline"):
        if len(masker.classes) > 2:
            raise ValueError(f"baseline=true is for two classes, the run has {len(masker.classes)}")
        train = hydra.utils.instantiate(config.data.source, split=config.data.train_split)
        result["baseline"] = baseline(SegmentationSamples(train, transform, config.seed, "raise"), samples)
    output = folder / "eval" / str(config.data.val_split)
    write_results(output, result, [row for found_rows in rows.values() for row in found_rows])
    write_report(output, result, shown, binned, folder / "logs")
    return result


def _threshold_counts(found: Tensor, mask: Tensor) -> np.ndarray:
    """TP, predicted and true pixels at the thresholds 0.01 to 0.99, of the union of the foreground classes."""
    inside = mask != IGNORE
    p, t = found.sum(0)[inside].numpy(), (mask[inside] > 0).numpy()
    steps = np.linspace(0.01, 0.99, 99)
    return np.array([[((p > s) & t).sum(), (p > s).sum(), t.sum()] for s in steps], dtype=float)


def _probabilities(masker: Masker, image: Tensor, window: int | None, flips: bool) -> Tensor:
    """``probabilities`` of one image ``[C, H, W]``, on the network's device and back."""
    device = next(masker.model.parameters()).device
    return probabilities(masker.model, image[None].to(device), window, flips=flips).cpu()


class PixelLabels:
    """Pixels ``[h, w, C]`` to labels ``[h, w]`` uint8.

    Args:
        masker: From ``load_masker``.
        window: Side of the windows; None takes the whole image.
        flips: Average over reflections.
    """

    def __init__(self, masker: Masker, window: int | None, flips: bool):
        self.masker, self.window, self.flips = masker, window, flips
        self.transform = SegmentationTransform(**masker.transform, train=False)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        sample = self.transform(Sample(pixels, None, "image"))
        found = of_size(_probabilities(self.masker, sample["image"], self.window, self.flips), sample["mask"])
        return labels(found, self.masker.threshold)[0].numpy().astype(np.uint8)


def predict_masks(
    run: str | Path, images: list[str], output: str | Path, window: int | None = None, flips: bool = False
) -> list[Path]:
    """Write masks and overlays of image files.

    Images above 2**24 pixels are read and written in tiles, as a tiled TIFF without overlay. Files are read as for
    training: at their full depth, and not turned by their EXIF data.

    Args:
        run: Folder of the run, or a checkpoint file.
        images: Image files.
        output: Folder for ``NAME_mask.png`` (labels) and ``NAME_overlay.png``, or ``NAME_mask.tif``.
        window: Side of the windows; by default the run's, and 512 for tiles, which want a multiple of 16.
        flips: Average over reflections even if the run does not.

    Returns:
        The mask files.

    Raises:
        FileNotFoundError: A missing run or image.
        ValueError: An unreadable image, one that is too large for a transform of whole images, or two of one name.
    """
    stems = distinct_stems(images)
    masker, folder, written = load_masker(run), Path(output), []
    flips = flips or masker.flips
    for path, stem in zip(images, stems, strict=True):
        if pixels_of_file(Path(path)) > _LARGE:
            label = PixelLabels(masker, None, flips)
            if label.transform.resizes or label.transform.intensity == "percentile":
                raise ValueError(
                    f"{path} has more than {_LARGE} pixels and is cut into tiles, but the run's transform needs whole "
                    "images (it resizes them or takes their percentiles); reduce the image, or train with "
                    "data.transform.recipe=default and intensity=range"
                )
            target = folder / f"{stem}_mask.tif"
            tile = window or masker.window or _TILE
            segment_file(path, target, label, tile=tile, in_chans=masker.in_chans)
        else:
            pixels = read_pixels(path, masker.in_chans)
            mask = PixelLabels(masker, window or masker.window, flips)(pixels)
            target = folder / f"{stem}_mask.png"
            save_picture(Image.fromarray(mask), target)
            save_picture(Image.fromarray(overlay(pixels, mask)), folder / f"{stem}_overlay.png")
        written.append(target)
    return written


def predict_command(args: Any) -> Iterator[str]:
    """``visionattn predict`` for masks."""
    if args.run_folder is None:
        raise ValueError("--task segmentation needs --run FOLDER")
    folder = "predictions" if args.output == "prediction.png" else args.output
    for path in predict_masks(args.run_folder, args.images, folder, args.window, args.flips):
        yield f"mask: {path}"
