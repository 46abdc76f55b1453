"""Object detection: training and validation of any network that gives boxes, and perhaps masks."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.data.randomness import seed_all, seed_from
from visionattn.tasks.detection_metrics import CocoScores, encode_detections
from visionattn.tasks.training import Training


class Detection(Training):
    """Training of a detector.

    Every random choice of a step, among them the samples of anchors and proposals, comes from generators seeded by
    (seed, epoch, batch, rank). ``val/ap`` and ``val/ap50`` are COCO's average precision of boxes on the whole
    validation split; a network of masks has ``val/mask_ap`` and ``val/mask_ap50`` too. There is no validation loss, for
    torchvision's detectors have losses in training mode only.

    Args:
        model: Lists of images and targets to a dictionary of losses in training, else to detections, as
            ``visionattn.heads.detection.Detector``.
        num_classes: Kinds of objects.
        seed: Seed of the run.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``, ``classes`` among them.
        score: Detections from this score on are drawn in pictures; figures count all.
        **training: Optimizer, schedule and averaged weights, see ``Training``.

    Raises:
        ValueError: An unknown schedule, or a score outside [0, 1].
    """

    monitors, kind = ("val/ap", "val/ap50", "val/mask_ap"), "detection"

    def __init__(
        self, model: nn.Module, num_classes: int, seed: int, hparams: dict[str, Any], score: float, **training: Any
    ):
        super().__init__(model, **training)
        if not 0 <= score <= 1:
            raise ValueError(f"task.score={score} must lie in [0, 1]")
        self.seed, self.masks = seed, has_masks(model)
        self.classes = list(hparams.get("classes", map(str, range(num_classes))))
        self.scores = CocoScores(self.classes, self.masks)
        self.save_hyperparameters({**hparams, "score": score})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Sum of the detector's losses."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        losses = self.model(batch["image"], batch["target"])
        total = torch.stack(list(losses.values())).sum()
        how: Any = dict(on_step=False, on_epoch=True, batch_size=len(batch["image"]), sync_dist=True)
        for name, loss in losses.items():
            self.log(f"train/{name.removeprefix('loss_')}_loss", loss, **how)
        self.log("train/loss", total, prog_bar=True, **how)
        return total

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's detections."""
        self.scores = CocoScores(self.classes, self.masks)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Detect in a batch."""
        if batch["image"]:
            rows = zip(batch["number"], batch["truth"], self.evaluated(batch["image"]), strict=True)
            for number, truth, found in rows:
                self.scores.add(number, truth, encode_detections(found))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole split."""
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self.scores.found)
            for part in parts:
                self.scores.found.update(part)
        result = self.scores.compute()
        for prefix, kind in (("", "bbox"), ("mask_", "segm")):
            for name in ("ap", "ap50") if kind in result else ():
                value = result[kind][name]
                self.log(f"val/{prefix}{name}", value, prog_bar=not prefix, rank_zero_only=False, sync_dist=False)


def has_masks(model: nn.Module) -> bool:
    """Whether a detector gives masks."""
    return getattr(model, "detector_name", "") == "mask_rcnn"
