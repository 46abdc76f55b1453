"""Using a trained segmentation run: evaluation on a split, masks of image files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.data.images import read_image
from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.segmentation_pipeline import SegmentationSamples
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.inference import _changed
from visionattn.tasks.segmentation_data import make_network
from visionattn.tasks.segmentation_metrics import image_metrics, summarize, write_results
from visionattn.tasks.segmentation_report import overlay, write_report
from visionattn.tasks.sliding import labels, probabilities, segment_file

_LARGE = 2**24  # pixels; larger files are read in tiles


@dataclass
class Masker:
    """A network with what is needed to use it on images."""

    name: str
    model: nn.Module
    classes: list[str]
    in_chans: int
    threshold: float
    transform: dict[str, Any]
    checkpoint: str


def is_segmentation(run: str | Path) -> bool:
    """Whether a run's folder or checkpoint is of a segmentation; False where there is none."""
    path = _checkpoint(run)
    if not path.is_file():
        return False
    try:
        hparams = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"]
    except Exception:  # load_run says what is wrong with it
        return False
    return hparams.get("task") == "segmentation"


def _checkpoint(run: str | Path) -> Path:
    path = Path(run)
    return path / "checkpoints" / "best.ckpt" if path.is_dir() else path


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
    path = _checkpoint(run)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the folder of a finished run or a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        hparams, weights = content["hyper_parameters"], content["state_dict"]
        arguments, classes, threshold = dict(hparams["model"]), hparams["classes"], float(hparams["threshold"])
    except Exception as error:  # torch raises a dozen types for damaged files
        raise ValueError(f"{path} is no checkpoint of a segmentation run ({type(error).__name__})") from error
    prefix = "ema.module." if (hparams.get("averaged", False) if averaged is None else averaged) else "model."
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not weights:
        raise ValueError(f"{path} has no averaged weights; train with task.ema_decay=0.9999, or evaluate without them")
    model = make_network(arguments, classes, hparams["in_chans"])
    model.load_state_dict(weights)
    name = f"{arguments.get('decoder', arguments['_target_'].rsplit('.', 1)[-1])} {arguments.get('backbone', '')}"
    return Masker(name.strip(), model.eval(), classes, hparams["in_chans"], threshold, dict(hparams["data"]), str(path))


def _config(run: str | Path, overrides: list[str]) -> tuple[DictConfig, Path]:
    folder = Path(run) if Path(run).is_dir() else Path(run).parent.parent
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"no config.yaml in {folder}; give the folder of a run")
    return _changed(OmegaConf.load(folder / "config.yaml"), overrides), folder  # type: ignore[arg-type]


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
    config, folder = _config(run, overrides)
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split)
    if source.classes != masker.classes:
        raise ValueError(f"the model was trained on {masker.classes}, the data has {source.classes}")
    transform = SegmentationTransform(**masker.transform, train=False)
    samples = SegmentationSamples(source, transform, config.seed, config.data.on_error, replace=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = masker.model.to(device)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in masker.classes[1:]}
    shown, skipped, binned = [], [], np.zeros((99, 3))
    for i in range(len(samples)):
        batch = samples[0, i, i]
        skipped += batch["skipped"]
        if "image" not in batch or not bool((batch["mask"] != IGNORE).any()):
            continue
        window, flips = config.task.window, config.task.flips
        found = probabilities(model, batch["image"][None].to(device), window, flips=flips).cpu()
        mask, predicted = batch["mask"], labels(found, masker.threshold)[0]
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


class _Labels:
    """Pixels ``[h, w, C]`` to labels ``[h, w]`` uint8."""

    def __init__(self, masker: Masker, window: int | None, flips: bool):
        self.masker, self.window, self.flips = masker, window, flips
        self.transform = SegmentationTransform(**masker.transform, train=False)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[2] != self.masker.in_chans:
            pixels = self._channels(pixels)
        image = self.transform(Sample(pixels, None, "image"))["image"]
        found = probabilities(self.masker.model, image[None], self.window, flips=self.flips)
        if found.shape[-2:] != pixels.shape[:2]:  # a recipe that resizes
            found = F.interpolate(found, pixels.shape[:2], mode="bilinear", align_corners=False)
        return labels(found, self.masker.threshold)[0].numpy().astype(np.uint8)

    def _channels(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape[2] == 1:
            return pixels.repeat(self.masker.in_chans, 2)
        if pixels.shape[2] > self.masker.in_chans == 3:  # opacity
            return pixels[..., :3]
        raise ValueError(f"the image has {pixels.shape[2]} channels, the network takes {self.masker.in_chans}")


def predict_masks(
    run: str | Path, images: list[str], output: str | Path, window: int = 512, flips: bool = False
) -> list[Path]:
    """Write masks and overlays of image files.

    Images above 2**24 pixels are read and written in tiles, as a tiled TIFF without overlay.

    Args:
        run: Folder of the run, or a checkpoint file.
        images: Image files.
        output: Folder for ``NAME_mask.png`` (labels) and ``NAME_overlay.png``, or ``NAME_mask.tif``.
        window: Side of the windows, a multiple of 16.
        flips: Average over reflections.

    Returns:
        The mask files.

    Raises:
        FileNotFoundError: A missing run or image.
        ValueError: An unreadable image or one with other channels, or two images of one name.
    """
    stems = [Path(image).stem for image in images]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"several images are named {twice[0]}; their masks would overwrite each other")
    masker, folder, written = load_masker(run), Path(output), []
    for path, stem in zip(images, stems, strict=True):
        if _pixels(Path(path)) > _LARGE:
            target = folder / f"{stem}_mask.tif"
            segment_file(path, target, _Labels(masker, None, flips), tile=window)
        else:
            image = read_image(path, masker.in_chans, exif=True)
            pixels = np.asarray(image).reshape(image.height, image.width, -1)
            mask = _Labels(masker, window, flips)(pixels)
            target = folder / f"{stem}_mask.png"
            _save(Image.fromarray(mask), target)
            _save(Image.fromarray(overlay(pixels, mask)), folder / f"{stem}_overlay.png")
        written.append(target)
    return written


def _pixels(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    image.save(temporary, format="PNG")
    temporary.replace(path)
