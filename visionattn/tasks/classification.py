"""Image classification: loss, optimizer, learning rate and metrics around any timm model."""

from collections.abc import Mapping
from typing import Any

from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from visionattn.data.randomness import seed_all, seed_from
from visionattn.tasks.training import Training, scale_learning_rates

__all__ = ["Classification", "scale_learning_rates"]


def check_pairs(task: Mapping[str, Any], size: int) -> None:
    """Refuse mixup and cutmix of batches of one image, since they join the images of a batch in pairs.

    Args:
        task: The group, of a classification.
        size: Images of a batch.

    Raises:
        ValueError: It wants either of them, and there are no pairs.
    """
    if size < 2 and (task["mixup"] > 0 or task["cutmix"] > 0):
        raise ValueError(
            f"task.mixup={task['mixup']} and task.cutmix={task['cutmix']} join the images of a batch in pairs, and it "
            f"has {size}; set data.batch_size=2 or more, or "
            f"both to 0"
        )


class Classification(Training):
    """Cross-entropy training with mixup, cutmix and a cosine learning rate.

    Mixup and cutmix join the images of a batch in pairs; of an odd number the last one, another in every epoch, is left
    out.

    Every random choice of a step comes from generators seeded by (seed, epoch, batch, rank), and the learning rate is
    a function of the epoch, so a run resumed at an epoch's end repeats the uninterrupted one.

    Args:
        model: Images ``[B, C, H, W]`` to logits ``[B, classes]``.
        num_classes: Number of classes.
        seed: Seed of the run.
        smoothing: Label smoothing.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        aux_weight: Weight of the same loss on each further output of a model that returns several in training.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``.
        **training: Optimizer, schedule and averaged weights, see ``Training``.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        smoothing: float,
        mixup: float,
        cutmix: float,
        aux_weight: float,
        hparams: dict[str, Any],
        **training: Any,
    ):
        super().__init__(model, **training)
        self.aux_weight, self.seed = aux_weight, seed
        self.mixup = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)
            self.loss = SoftTargetCrossEntropy()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        self.save_hyperparameters(hparams)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None:
            even = len(images) // 2 * 2
            if not even:
                raise ValueError(
                    "a batch of one image has no pair for mixup or cutmix; use fewer processes, more images, or "
                    "task.mixup=0 task.cutmix=0"
                )
            images, labels = self.mixup(images[:even].clone(), labels[:even])
        output = self.model(images)
        logits, *further = output if isinstance(output, tuple) else (output,)
        loss = self.loss(logits, labels) + self.aux_weight * sum(self.loss(x, labels) for x in further)
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True
        )
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the metrics."""
        if not len(batch["label"]):
            return
        logits = self.evaluated(batch["image"])
        for name, metric in (("val/top1", self.top1), ("val/top5", self.top5)):
            metric(logits, batch["label"])
            self.log(name, metric, prog_bar=True, batch_size=len(batch["label"]))
        loss = nn.functional.cross_entropy(logits, batch["label"])
        self.log("val/loss", loss, batch_size=len(batch["label"]), sync_dist=True)
