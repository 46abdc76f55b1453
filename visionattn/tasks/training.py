"""What every training shares: optimizer, learning rate by epoch or step, averaged weights, going on inside an epoch."""

import math
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from visionattn.tasks.engine import compile_mode, compile_network, set_grad_checkpointing, shard

SCHEDULES = ("cosine", "cosine_cycles", "exponential", "steps", "poly")


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


def learning_rate_factor(
    schedule: str,
    progress: float,
    epochs: int,
    warmup_epochs: float,
    cycles: float,
    decay: float,
    milestones: Sequence[int] = (),
    power: float = 1.0,
) -> float:
    """Factor on the learning rate of the schedules that timm does not have.

    Linear warm-up, then with ``t`` the share of the epochs after it that are done:

        cosine_cycles: ``(1 + cos(2 pi cycles t)) / 2`` (FSG-Net)
        exponential: ``decay ** epoch``, constant within an epoch (HER-Seg)
        steps: ``decay`` for each milestone that is passed (detection: 8 and 11 of 12 epochs)
        poly: ``(1 - t) ** power`` (labelled scenes)

    Args:
        schedule: ``"cosine_cycles"``, ``"exponential"``, ``"steps"`` or ``"poly"``.
        progress: Epochs done, with the fraction of the one in progress.
        epochs: Length of the training.
        warmup_epochs: Length of the warm-up.
        cycles: Full cosines.
        decay: Factor per epoch or milestone.
        milestones: Epochs, counted from the start of the training.
        power: Exponent of ``"poly"``.
    """
    if progress < warmup_epochs:
        return progress / warmup_epochs
    if schedule == "exponential":
        return decay ** math.floor(progress - warmup_epochs)
    if schedule == "steps":
        return decay ** sum(progress >= milestone for milestone in milestones)
    t = (progress - warmup_epochs) / max(epochs - warmup_epochs, 1)
    if schedule == "poly":
        return max(1 - t, 0.0) ** power
    return (1 + math.cos(2 * math.pi * cycles * t)) / 2


class Training(lightning.LightningModule):
    """Optimizer, schedule and averaged weights around a model.

    Args:
        model: The network.
        epochs: Length of the schedule.
        opt: Optimizer, a name of ``timm.optim``.
        lr: Peak learning rate.
        weight_decay: On matrices and kernels.
        layer_decay: Factor on the learning rate from each layer to the one before.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate at its start (timm's cosine only).
        min_lr: Learning rate at the end (timm's cosine and poly only).
        ema_decay: Decay of an exponential moving average of the weights.
        ema_eval: Validate the averaged weights (and so choose the best checkpoint by them).
        schedule: ``"cosine"`` (timm's, set at every epoch), ``"cosine_cycles"``, ``"exponential"``, ``"steps"`` or
            ``"poly"`` (at every step).
        cycles: Full cosines of ``"cosine_cycles"``.
        decay: Factor per epoch of ``"exponential"``, per milestone of ``"steps"``.
        milestones: Epochs of ``"steps"`` after which the learning rate falls.
        power: Exponent of ``"poly"``.
        channels_last: Keep kernels and images in memory with the channels last, which convolutions prefer on CPUs and
            in half precision on GPUs.
        compile: Mode of ``torch.compile`` for the trained network (the averaged one, if validated, is not compiled).
            State dicts keep their keys.
        grad_checkpointing: Recompute blocks in the backward pass, for less memory and about a third more time.

    Raises:
        ValueError: Another schedule or mode; a network that cannot recompute its blocks; averaged weights of a sharded
            network.
    """

    monitors: tuple[str, ...] = ("val/top1", "val/top5", "val/loss")  # what the best checkpoint may be the best in
    entry_points: tuple[str, ...] = ("forward",)  # methods of the network that a step or a validation calls
    kind = "classification"  # or one of ``visionattn.tasks.kinds.KINDS``

    def __init__(
        self,
        model: nn.Module,
        epochs: int,
        opt: str,
        lr: float,
        weight_decay: float,
        layer_decay: float | None = None,
        warmup_epochs: float = 0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        ema_decay: float | None = None,
        ema_eval: bool = False,
        schedule: str = "cosine",
        cycles: float = 1.0,
        decay: float = 1.0,
        channels_last: bool = False,
        milestones: Sequence[int] = (),
        power: float = 1.0,
        compile: str | bool | None = None,
        grad_checkpointing: bool = False,
    ):
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}")
        self.compile_mode = compile_mode(compile)
        if grad_checkpointing:
            set_grad_checkpointing(model)
        self.channels_last = channels_last
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.ema = ModelEmaV3(model, decay=ema_decay) if ema_decay else None
        if self.ema is not None:  # DDP would wait for the gradients of the copy
            self.ema.requires_grad_(False)
        self.ema_eval = ema_eval
        self.prepared = False
        self.so_far: dict[str, Any] | None = None
        self.epochs, self.min_lr = epochs, min_lr
        self.warmup_epochs, self.warmup_lr = warmup_epochs, warmup_lr
        self.optimizer_args = dict(opt=opt, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
        self.schedule_name, self.cycles, self.decay, self.power = schedule, cycles, decay, power
        self.milestones = tuple(milestones)

    @property
    def optimizer_kind(self) -> dict[str, Any]:
        """The settings that a state of the optimizer belongs to or, as the weight decay, silently brings back."""
        return {key: self.optimizer_args[key] for key in ("opt", "weight_decay", "layer_decay")}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer with its groups of parameters."""
        optimizer = create_optimizer_v2(self.model, **self.optimizer_args)
        scale_learning_rates(optimizer, self.model)
        return optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; the learning rate is set at the start of an epoch or step."""
        optimizer = self.make_optimizer()
        self.schedule = CosineLRScheduler(
            optimizer,
            t_initial=self.epochs,
            lr_min=self.min_lr,
            warmup_t=self.warmup_epochs,
            warmup_lr_init=self.warmup_lr,
        )
        return optimizer

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        self.so_far = None  # of an epoch that is over
        if self.schedule_name == "cosine":
            self.schedule.step(self.current_epoch)
        else:
            self._set_rate(self.current_epoch)
        self.log("lr", max(group["lr"] for group in self.schedule.optimizer.param_groups), rank_zero_only=True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step, for schedules that know steps."""
        if self.schedule_name != "cosine":
            # a resumed run, and one with limited batches, stand at the same place of the schedule
            self._set_rate(self.current_epoch + (batch_idx + 1) / max(int(self.trainer.num_training_batches), 1))

    def _set_rate(self, progress: float) -> None:
        # the fraction of the step that ends an epoch would already count as the next one
        if self.schedule_name in ("exponential", "steps") and progress > self.warmup_epochs:
            progress = max(self.current_epoch, self.warmup_epochs)
        factor = learning_rate_factor(
            self.schedule_name,
            progress,
            self.epochs,
            self.warmup_epochs,
            self.cycles,
            self.decay,
            self.milestones,
            self.power,
        )
        least = self.min_lr if self.schedule_name == "poly" and progress >= self.warmup_epochs else 0.0
        lr = least + (self.optimizer_args["lr"] - least) * factor
        for group in self.schedule.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @property
    def evaluated(self) -> nn.Module:
        """The weights that validation measures."""
        return self.ema.module if self.ema is not None and self.ema_eval else self.model

    def configure_model(self) -> None:
        """Shard and compile the network, in this order, before any state is loaded."""
        if self.prepared:  # Lightning calls this again for every further loop
            return
        self.prepared = True
        if (mesh := self.device_mesh) is not None:
            if self.ema is not None:
                raise ValueError(
                    "task.ema_decay keeps whole averaged weights, which a sharded network cannot update; set "
                    "task.ema_decay=null, or trainer=ddp"
                )
            shard(self.model, mesh["data_parallel"], self.entry_points)
        if self.compile_mode is not None:
            compile_network(self.model, self.compile_mode, self.entry_points)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient of an incomplete last group of batches the mean of that group.

        Lightning divides every loss by ``accumulate_grad_batches``, also where an epoch ends with fewer batches.
        """
        group = self.trainer.accumulate_grad_batches
        rest = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready % group
        if rest:
            gradients = (p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None)
            for gradient in gradients:
                gradient.mul_(group / rest)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimizer and then of the averaged weights, before any checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what the epoch in progress had logged."""
        self.so_far = checkpoint.get("epoch_so_far")

    def on_train_batch_end(self, *args: Any) -> None:
        """Join what the epoch logged before a resumed run went on to what it logs now."""
        self._join_so_far()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the epoch in progress has logged, which Lightning would forget, and what the optimizer is."""
        self._join_so_far()
        checkpoint["optimizer_args"] = self.optimizer_kind
        checkpoint["epoch_so_far"] = kept = {}
        for result in self.trainer.fit_loop.epoch_loop._results.values():
            if result.has_reset or not (result.is_tensor and result.meta.is_mean_reduction):
                continue
            sums = torch.stack([result.value.float(), result.cumulated_batch_size.float()])
            if result.meta.sync.should:  # the checkpoint is of all processes
                sums = self.trainer.strategy.reduce(sums, reduce_op="mean")
            kept[result.meta.name] = tuple(sums.tolist())

    def _join_so_far(self) -> None:
        if self.so_far is None:
            return
        former, self.so_far = self.so_far, None
        for result in self.trainer.fit_loop.epoch_loop._results.values():
            if result.meta.name in former and not result.has_reset:
                total, weight = former.pop(result.meta.name)
                # in the order of the uninterrupted run, so that the mean is equal to the last bit in one process
                result.value = total + result.value
                result.cumulated_batch_size = weight + result.cumulated_batch_size
                result._computed = None
        for name, (total, weight) in former.items():  # the learning rate, logged once at the epoch's start
            self.log(name, total / max(weight, 1), on_step=False, on_epoch=True, batch_size=1, rank_zero_only=True)
