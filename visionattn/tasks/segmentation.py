"""Segmentation: losses, threshold, metrics and averaged weights around any network that gives masks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DiceLoss, SoftDiceclDiceLoss, TverskyLoss
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.data.randomness import seed_all, seed_from
from visionattn.data.segmentation import IGNORE
from visionattn.heads.losses import DiceFocalLoss
from visionattn.tasks.segmentation_metrics import from_counts
from visionattn.tasks.sliding import labels, of_size, probabilities
from visionattn.tasks.training import Training

THRESHOLDS = [i / 20 for i in range(1, 20)]
LOSSES = ("bce_dice", "ce_dice", "dice", "dice_focal", "tversky", "cldice")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits, target.float())
    return F.cross_entropy(logits, target[:, 0])


class MaskLoss(nn.Module):
    """A loss by name on the pixels that have a truth.

    ``bce_dice``, ``ce_dice``: mean cross entropy + ``1 - (2 sum(p y) + 1) / (sum p + sum y + 1)``, sums over the
    batch (for one class FSG-Net's); ``dice``: its second term; ``tversky``: false negatives weigh 0.7, false
    positives 0.3; ``dice_focal``: HER-Seg's; ``cldice``: half Dice, half soft clDice.

    Args:
        name: One of ``LOSSES``.
        num_classes: Channels of the logits; 1 is binary.

    Raises:
        ValueError: Another name, or ``dice_focal`` for several classes.
    """

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        if name not in LOSSES:
            raise ValueError(f"loss={name!r} must be one of {', '.join(LOSSES)}")
        self.name, self.num_classes = name, num_classes
        binary = num_classes == 1
        common: dict[str, Any] = dict(sigmoid=binary, softmax=not binary, to_onehot_y=not binary, batch=True)
        self.overlap: nn.Module = DiceLoss(**common, smooth_nr=1.0, smooth_dr=1.0)
        if name == "tversky":
            self.overlap = TverskyLoss(**common, alpha=0.3, beta=0.7)
        elif name == "dice_focal":
            if not binary:  # it takes sigmoids, and evaluation a softmax
                raise ValueError(f"loss='dice_focal' is for two classes, got {num_classes}; take ce_dice")
            self.overlap = DiceFocalLoss()
        elif name == "cldice":
            self.overlap = SoftDiceclDiceLoss(iter_=3, alpha=0.5)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        logits = logits.float()
        inside = mask != IGNORE
        if not bool(inside.any()):
            return logits.sum() * 0.0
        if self.name == "cldice":
            truth = F.one_hot(mask.masked_fill(~inside, 0), max(self.num_classes, 2)).movedim(-1, 1)
            p = logits.sigmoid() if self.num_classes == 1 else logits.softmax(1)
            truth = truth[:, 1:] if self.num_classes == 1 else truth
            return self.overlap(p * inside[:, None], truth.float() * inside[:, None])
        # one long row of pixels: every one of these losses sums over the batch
        if bool(inside.all()):  # nothing to choose, which costs as much as a small network
            row, target = logits.movedim(1, 0).flatten(1)[None], mask.flatten()[None, None]
        else:
            row, target = logits.movedim(1, 0)[:, inside][None], mask[inside][None, None]
        loss = self.overlap(row, target)
        return loss + _cross_entropy(row, target) if self.name in ("bce_dice", "ce_dice") else loss


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """Stop training of parts of a network by its own ``freeze``.

    Raises:
        ValueError: There are parts, but the network has no such method or part.
    """
    if parts:
        if not hasattr(model, "freeze"):
            raise ValueError(f"task.freeze={list(parts)}: {type(model).__name__} cannot freeze parts; set []")
        model.freeze(list(parts))


class Segmentation(Training):
    """Training of masks.

    Every random choice of a step comes from generators seeded by (seed, epoch, batch, rank). After each validation the
    threshold with the best Dice of the validation split's one confusion matrix is taken and kept in the checkpoint's
    hyperparameters; tests use it as it is. Several classes need none. ``val/dice`` is that Dice (of several classes
    the mean over those with a value; NaN where there is none), ``val/dice_at_half`` the one at 0.5. ``val/loss`` is the
    training loss of the probabilities found, the mean over batches.

    Args:
        model: Images ``[B, C, H, W]`` to logits ``[B, K, H, W]``, in training possibly several; K = 1 is binary.
        num_classes: K.
        seed: Seed of the run.
        loss: One of ``LOSSES``.
        aux_weight: Weight of the loss on each further output, the weights being divided by their sum: 1 gives the
            mean over the outputs.
        freeze: Parts for the model's ``freeze``.
        window: Side of the windows at validation; None: whole images.
        flips: Average over reflections when evaluating and predicting.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``.
        **training: Optimizer, schedule and averaged weights, see ``Training``.

    Raises:
        ValueError: An unknown loss, schedule or part, or ``freeze`` with a model that has no such method.
    """

    monitors, kind = ("val/dice", "val/iou", "val/loss"), "segmentation"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        loss: str,
        aux_weight: float,
        freeze: list[str],
        window: int | None,
        flips: bool,
        hparams: dict[str, Any],
        **training: Any,
    ):
        freeze_parts(model, freeze)
        super().__init__(model, **training)
        self.loss: Callable[[Tensor, Tensor], Tensor] = MaskLoss(loss, num_classes)
        self.seed, self.num_classes, self.aux_weight = seed, num_classes, aux_weight
        self.window, self.flips = window, flips
        rows = len(THRESHOLDS) if num_classes == 1 else num_classes - 1
        self.register_buffer("counts", torch.zeros(rows, 4, dtype=torch.float64), persistent=False)
        self.save_hyperparameters({**hparams, "threshold": 0.5, "window": window, "flips": flips})

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        output, mask = self.model(batch["image"]), batch["mask"]
        outputs = output if isinstance(output, tuple | list) else (output,)
        weights = [1.0, *[self.aux_weight] * (len(outputs) - 1)]
        loss: Any = sum(w * self.loss(of_size(x, mask), mask) for w, x in zip(weights, outputs, strict=True))
        loss = loss / sum(weights)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(mask), sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Empty the confusion matrices."""
        self.counts.zero_()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the confusion matrices."""
        if not len(batch["mask"]):
            return
        mask = batch["mask"]
        found = of_size(probabilities(self.evaluated, batch["image"], self.window, flips=self.flips), mask)
        inside = mask != IGNORE
        # windows and reflections are averaged as probabilities, so the loss goes back to logits from them
        whole = found if self.num_classes == 1 else torch.cat([1 - found.sum(1, keepdim=True), found], 1)
        logits = whole.logit(1e-6) if self.num_classes == 1 else whole.clamp_min(1e-6).log()
        self.log("val/loss", self.loss(logits, mask), batch_size=len(mask), sync_dist=True)
        if self.num_classes == 1:
            pairs = [(found[:, 0] > t, mask == 1) for t in THRESHOLDS]
        else:
            best = labels(found, 0.5)
            pairs = [(best == k, mask == k) for k in range(1, self.num_classes)]
        for row, (predicted, true) in zip(self.counts, pairs, strict=True):
            p, t = predicted[inside], true[inside]
            row += torch.stack([(p & t).sum(), (p & ~t).sum(), (~p & t).sum(), (~p & ~t).sum()]).double()

    def on_validation_epoch_end(self) -> None:
        """Choose the threshold and log the metrics of all images."""
        counts = self.all_gather(self.counts).reshape(-1, *self.counts.shape).sum(0)
        results = [from_counts(*row) for row in counts.tolist()]
        scores = [0.0 if r["dice"] != r["dice"] else r["dice"] for r in results]
        if self.num_classes == 1:
            # among equals the one nearest to one half
            best = max(range(len(scores)), key=lambda i: (scores[i], -abs(THRESHOLDS[i] - 0.5)))
            self.hparams["threshold"] = THRESHOLDS[best]
            self.log("val/threshold", THRESHOLDS[best], rank_zero_only=True)
            self.log("val/dice_at_half", results[THRESHOLDS.index(0.5)]["dice"], rank_zero_only=True)
            chosen = [results[best]]
        else:
            chosen = results
        for name in ("dice", "iou"):
            values = [r[name] for r in chosen if r[name] == r[name]]
            value = sum(values) / len(values) if values else math.nan
            self.log(f"val/{name}", value, prog_bar=name == "dice", sync_dist=True)
