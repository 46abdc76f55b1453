"""Answer grounding: loss, metrics and averaged weights around any network of images and questions that gives masks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from visionattn.data.randomness import seed_all, seed_from
from visionattn.tasks.grounding_metrics import question_metrics
from visionattn.tasks.segmentation import MaskLoss
from visionattn.tasks.sliding import of_size
from visionattn.tasks.training import Training


def answer_probabilities(model: nn.Module, images: Tensor, questions: list[str], like: Tensor) -> Tensor:
    """Probabilities that pixels belong to the answer.

    Args:
        model: Images ``[B, C, h, w]`` and B questions to logits ``[B, 1, h, w]``.
        images: ``[B, C, h, w]``.
        questions: B strings.
        like: ``[..., H, W]``, whose size the result has.

    Returns:
        ``[B, H, W]``, float32; enlarged or reduced as probabilities, bilinearly.
    """
    return of_size(model(images, questions).float().sigmoid(), like)[:, 0]


class Grounding(Training):
    """Training of masks that answer questions.

    Every random choice of a step comes from generators seeded by (seed, epoch, batch, rank). ``val/iou`` is the mean
    over the questions of the IoU of the pixels above one half, at the masks' own size; ``val/pointing`` the share whose
    most probable pixel lies in the mask.

    Args:
        model: Images ``[B, C, H, W]`` and B questions to logits ``[B, 1, H, W]``.
        num_classes: 1.
        seed: Seed of the run.
        loss: One of ``visionattn.tasks.segmentation.LOSSES``.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``.
        **training: Optimizer, schedule and averaged weights, see ``Training``.

    Raises:
        ValueError: An unknown loss or schedule.
    """

    monitors, kind = ("val/iou", "val/loss"), "grounding"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        loss: str,
        hparams: dict[str, Any],
        **training: Any,
    ):
        super().__init__(model, **training)
        self.loss: Callable[[Tensor, Tensor], Tensor] = MaskLoss(loss, num_classes)
        self.seed = seed
        self.save_hyperparameters(dict(hparams))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        mask = batch["mask"]
        loss = self.loss(of_size(self.model(batch["image"], batch["question"]), mask), mask)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(mask), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log a batch's loss, IoU and pointing."""
        mask = batch["mask"]
        if not len(mask):
            return
        found = answer_probabilities(self.evaluated, batch["image"], batch["question"], mask)
        self.log("val/loss", self.loss(found[:, None].logit(1e-6), mask), batch_size=len(mask), sync_dist=True)
        rows = [question_metrics(p, t) for p, t in zip(found, mask, strict=True)]
        self.log("val/iou", _mean(rows, "iou"), prog_bar=True, batch_size=len(mask), sync_dist=True)
        known = [row for row in rows if row["pointing"] == row["pointing"]]
        if known:
            self.log("val/pointing", _mean(known, "pointing"), batch_size=len(known), sync_dist=True)


def _mean(rows: list[dict[str, float]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)
