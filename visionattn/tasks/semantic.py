"""Labels of whole scenes: every pixel has one of many classes, and no class is a background."""

from typing import Any

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from visionattn.data.randomness import seed_all, seed_from
from visionattn.data.segmentation import IGNORE
from visionattn.tasks.segmentation import freeze_parts
from visionattn.tasks.sliding import of_size
from visionattn.tasks.training import Training

_CHUNK = 16  # classes that are enlarged to the size of an image at once


def pixel_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean cross entropy of the counted pixels; 0 where there are none.

    Args:
        logits: ``[B, K, H, W]``.
        mask: ``[B, H, W]``, labels and ``IGNORE``.
    """
    total = F.cross_entropy(logits.float(), mask, ignore_index=IGNORE, reduction="sum")
    return total / (mask != IGNORE).sum().clamp_min(1)


def class_scores(
    model: nn.Module, images: Tensor, window: int | None = None, overlap: float = 1 / 3, flips: bool = False
) -> Tensor:
    """Scores whose largest one is the class of a pixel: logits, or with ``flips`` mean probabilities.

    Args:
        model: Images to logits ``[B, K, H, W]``.
        images: ``[B, C, H, W]``.
        window: Side of the windows that larger images are cut into; None: whole images. Where windows overlap the
            mean of their logits counts.
        overlap: Share of a window that the next one covers again.
        flips: Average over the image and its mirror image (left to right).

    Returns:
        ``[B, K, H, W]``, float32.

    Raises:
        ValueError: A window below 1 or an overlap outside [0, 1).
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be a number of pixels, at least 1, or null")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} must lie in [0, 1)")

    def once(x: Tensor) -> Tensor:
        if window is not None and max(x.shape[-2:]) > window:
            found: Any = sliding_window_inference(x, window, 4, lambda part: model(part).float(), overlap)
            return found
        return model(x).float()

    if not flips:
        return once(images)
    return (once(images).softmax(1) + once(images.flip(-1)).softmax(1).flip(-1)) / 2


def best_labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the largest score at every pixel of the original image.

    Scores are enlarged some classes at a time: 150 maps of a photograph of 2000 x 3000 pixels are 3.6 GB.

    Args:
        scores: ``[B, K, h, w]``.
        size: Height and width to enlarge or reduce to (bilinear).

    Returns:
        ``[B, *size]`` int64; the first of equal ones.
    """
    best, found = None, None
    for first in range(0, scores.shape[1], _CHUNK):
        part = scores[:, first : first + _CHUNK]
        if part.shape[-2:] != size:
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)
        value, index = part.max(1)
        if best is None or found is None:
            best, found = value, index
        else:
            better = value > best
            best, found = torch.where(better, value, best), torch.where(better, index + first, found)
    assert found is not None
    return found


def set_scores(confusion: Tensor) -> dict[str, Any]:
    """Scores of a whole set, as mmsegmentation defines them.

    Args:
        confusion: ``[K, K]``, pixels by true class and found class.

    Returns:
        ``iou`` and ``accuracy`` of every class, ``[K]``: true positives over the union, and over the true pixels, NaN
        without any; ``miou`` and ``macc``, their means over the classes that have one; ``aacc``, the share of all
        pixels that is right.
    """
    table = confusion.double()
    hit, true, predicted = table.diagonal(), table.sum(1), table.sum(0)
    iou, accuracy = hit / (true + predicted - hit), hit / true  # 0 / 0 is NaN
    means = dict(miou=iou.nanmean(), macc=accuracy.nanmean(), aacc=hit.sum() / true.sum())
    return dict(iou=iou, accuracy=accuracy, **{name: float(value) for name, value in means.items()})


def confusion_matrix(num_classes: int) -> MulticlassConfusionMatrix:
    """Pixels by true and found class, summed over images and processes on the network's device."""
    return MulticlassConfusionMatrix(num_classes, ignore_index=IGNORE, validate_args=False)


class Semantic(Training):
    """Training of labels.

    The loss is the mean cross entropy over the counted pixels, and ``aux_weight`` times that of further outputs.
    ``val/miou``, ``val/macc`` and ``val/aacc`` are those of the whole validation split at the images' own sizes
    (``set_scores``). Random choices of a step depend on (seed, epoch, batch, rank).

    Args:
        model: Images ``[B, C, H, W]`` to logits ``[B, K, H, W]``, in training possibly several.
        num_classes: K.
        seed: Seed of the run.
        aux_weight: Weight of the loss on each further output.
        freeze: Parts for the model's ``freeze``.
        window: Side of the windows at validation; None: whole images.
        overlap: Share of a window that the next one covers again.
        flips: Average over the mirror image when evaluating and predicting.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``.
        **training: Optimizer, schedule and averaged weights, see ``Training``.

    Raises:
        ValueError: An unknown schedule or part, or ``freeze`` with a model that has no such method.
    """

    monitors, kind = ("val/miou", "val/macc", "val/aacc"), "semantic"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        aux_weight: float,
        freeze: list[str],
        window: int | None,
        overlap: float,
        flips: bool,
        hparams: dict[str, Any],
        **training: Any,
    ):
        freeze_parts(model, freeze)
        super().__init__(model, **training)
        self.seed, self.aux_weight = seed, aux_weight
        self.window, self.overlap, self.flips = window, overlap, flips
        self.confusion = confusion_matrix(num_classes)
        self.save_hyperparameters({**hparams, "window": window, "overlap": overlap, "flips": flips})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        output, mask = self.model(batch["image"]), batch["mask"]
        outputs = output if isinstance(output, tuple | list) else (output,)
        losses = [pixel_loss(of_size(x, mask), mask) for x in outputs]
        loss = losses[0] + self.aux_weight * sum(losses[1:])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(mask), sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Empty the confusion matrix."""
        self.confusion.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the confusion matrix."""
        mask = batch["mask"]
        if len(mask):
            scores = class_scores(self.evaluated, batch["image"], self.window, self.overlap, self.flips)
            self.confusion.update(best_labels(scores, tuple(mask.shape[-2:])), mask)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all images."""
        scores = set_scores(self.confusion.compute())
        for name in ("miou", "macc", "aacc"):
            self.log(f"val/{name}", scores[name], prog_bar=name == "miou", sync_dist=True)
