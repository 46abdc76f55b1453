"""Image classification: loss, optimizer, learning rate and metrics around any timm model."""

from typing import Any

import lightning
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from visionattn.data.randomness import seed_all, seed_from


def scale_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Move parameters that have a learning rate of their own to further groups of the optimizer.

    Args:
        optimizer: Before a scheduler reads its groups; timm's schedulers honour their ``lr_scale``.
        model: Its method ``lr_scales``, if any, gives factors by the names of parameters.
    """
    factors = model.lr_scales() if hasattr(model, "lr_scales") else {}
    scales = {model.get_parameter(name): factor for name, factor in factors.items()}
    for group in list(optimizer.param_groups):
        for factor in sorted({scales[p] for p in group["params"] if p in scales}):
            moved = [p for p in group["params"] if scales.get(p) == factor]
            group["params"] = [p for p in group["params"] if scales.get(p) != factor]
            scale = factor * group.get("lr_scale", 1.0)
            optimizer.add_param_group({**group, "params": moved, "lr_scale": scale})


class Classification(lightning.LightningModule):
    """Cross-entropy training with mixup, cutmix and a cosine learning rate.

    Every random choice of a step comes from generators seeded by (seed, epoch, batch, rank), and the learning rate is
    a function of the epoch, so a run resumed at an epoch's end repeats the uninterrupted one.

    Args:
        model: Images ``[B, C, H, W]`` to logits ``[B, classes]``.
        num_classes: Number of classes.
        seed: Seed of the run.
        epochs: Length of the schedule.
        opt: Optimizer, a name of ``timm.optim``.
        lr: Peak learning rate.
        weight_decay: On matrices and kernels; vectors have none.
        layer_decay: Factor on the learning rate from each layer to the one before.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate at its start.
        min_lr: Learning rate at the end.
        smoothing: Label smoothing.
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        ema_decay: Decay of an exponential moving average of the weights.
        ema_eval: Validate the averaged weights instead of the trained ones (and so choose the best checkpoint by them).
        aux_weight: Weight of the same loss on each further output of a model that returns several in training.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        epochs: int,
        opt: str,
        lr: float,
        weight_decay: float,
        layer_decay: float | None,
        warmup_epochs: int,
        warmup_lr: float,
        min_lr: float,
        smoothing: float,
        mixup: float,
        cutmix: float,
        ema_decay: float | None,
        ema_eval: bool,
        aux_weight: float,
        hparams: dict[str, Any],
    ):
        super().__init__()
        self.model = model
        self.ema = ModelEmaV3(model, decay=ema_decay) if ema_decay else None
        self.ema_eval = ema_eval
        self.aux_weight = aux_weight
        self.averaged_steps = 0
        self.seed, self.epochs, self.min_lr = seed, epochs, min_lr
        self.warmup_epochs, self.warmup_lr = warmup_epochs, warmup_lr
        self.optimizer_args = dict(opt=opt, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
        self.mixup = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=num_classes)
            self.loss = SoftTargetCrossEntropy()
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes))
        self.save_hyperparameters(hparams)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; the learning rate is set by ``on_train_epoch_start``."""
        optimizer = create_optimizer_v2(self.model, **self.optimizer_args)
        scale_learning_rates(optimizer, self.model)
        self.schedule = CosineLRScheduler(
            optimizer,
            t_initial=self.epochs,
            lr_min=self.min_lr,
            warmup_t=self.warmup_epochs,
            warmup_lr_init=self.warmup_lr,
        )
        return optimizer

    def on_train_start(self) -> None:
        """Count optimizer steps from where a resumed run stands."""
        self.averaged_steps = self.global_step

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        self.schedule.step(self.current_epoch)
        self.log("lr", max(group["lr"] for group in self.schedule.optimizer.param_groups), rank_zero_only=True)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Loss of a batch."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        images, labels = batch["image"], batch["label"]
        if self.mixup is not None:
            even = len(images) // 2 * 2  # timm pairs the images of a batch
            if even == 0:
                return None
            images, labels = self.mixup(images[:even].clone(), labels[:even])
        output = self.model(images)
        logits, *further = output if isinstance(output, tuple) else (output,)
        loss = self.loss(logits, labels) + self.aux_weight * sum(self.loss(x, labels) for x in further)
        self.log(
            "train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True
        )
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Update the averaged weights, once for each step of the optimizer however many batches it took."""
        if self.ema is not None and self.global_step > self.averaged_steps:
            self.averaged_steps = self.global_step
            self.ema.update(self.model)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add a batch to the metrics."""
        if not len(batch["label"]):
            return
        model = self.ema.module if self.ema is not None and self.ema_eval else self.model
        logits = model(batch["image"])
        for name, metric in (("val/top1", self.top1), ("val/top5", self.top5)):
            metric(logits, batch["label"])
            self.log(name, metric, prog_bar=True, batch_size=len(batch["label"]))
        loss = nn.functional.cross_entropy(logits, batch["label"])
        self.log("val/loss", loss, batch_size=len(batch["label"]), sync_dist=True)
