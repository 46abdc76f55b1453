"""Training a Pointer Network on convex hulls."""

from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from visionattn.data.hull import RandomHulls, collate_points
from visionattn.data.pipeline import EpochSampler
from visionattn.heads.pointer_network import PointerNetwork
from visionattn.tasks.networks import head_class
from visionattn.tasks.training import Training


class Hull(Training):
    """``val/exact`` is the share of validation items whose whole sequence is right.

    Args:
        model: ``visionattn.heads.pointer_network.PointerNetwork``.
        num_classes: Not used.
        seed: Seed of the run.
        epochs: Length of the schedule.
        opt: Optimizer, a name of ``timm.optim``.
        lr: Peak learning rate.
        weight_decay: On matrices.
        warmup_epochs: Epochs of linear warm-up.
        min_lr: Learning rate at the end.
        ema_decay: Decay of an exponential moving average of the weights.
        ema_eval: Validate the averaged weights.
        hparams: Plain values that a checkpoint keeps.
    """

    monitors = ("val/exact", "val/loss")
    kind = "hull"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        epochs: int,
        opt: str,
        lr: float,
        weight_decay: float,
        warmup_epochs: int,
        min_lr: float,
        ema_decay: float | None,
        ema_eval: bool,
        hparams: dict[str, Any],
    ):
        args = dict(opt=opt, lr=lr, weight_decay=weight_decay)
        super().__init__(model, epochs, args, warmup_epochs, min_lr, min_lr, ema_decay, ema_eval)
        self.save_hyperparameters(hparams)

    def _loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        return model.loss(batch["image"], batch["counts"], batch["path"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self._loss(self.model, batch)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["image"]), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and exact sequences of a batch."""
        model: Any = self.evaluated
        found = model.generate(batch["image"], batch["counts"], batch["image"].shape[1] + 1)
        true = [[i for i in row if i >= 0] for row in batch["path"].tolist()]
        exact = sum(p == t for p, t in zip(found, true, strict=True)) / len(true)
        size = len(true)
        self.log("val/loss", self._loss(model, batch), batch_size=size, sync_dist=True)
        self.log("val/exact", exact, batch_size=size, sync_dist=True)


class HullData(lightning.LightningDataModule):
    """Loaders of the training and validation split.

    Args:
        config: The ``data`` group.
        train: Training items.
        val: Validation items.
        seed: Seed of the run.
    """

    def __init__(self, config: dict[str, Any], train: RandomHulls, val: RandomHulls, seed: int):
        super().__init__()
        self.config, self.train, self.val, self.seed = config, train, val, seed

    def _loader(self, source: Any, train: bool) -> DataLoader:
        trainer, size = self.trainer, self.config["batch_size"]
        sampler = EpochSampler(source, train, self.seed, 1, trainer.global_rank, trainer.world_size)
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
        whole = train and len(sampler) > size
        return DataLoader(source, batch_size=size, sampler=sampler, collate_fn=collate_points, drop_last=whole)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader(self.train, True)

    def val_dataloader(self) -> DataLoader:
        """Every validation item once."""
        return self._loader(self.val, False)


def make_network(arguments: dict[str, Any]) -> PointerNetwork:
    """The network of a ``model`` group.

    Raises:
        ValueError: It is no Pointer Network.
    """
    found = head_class(str(arguments.get("_target_")))
    if not issubclass(found, PointerNetwork):
        raise ValueError(f"model._target_={arguments['_target_']} is no Pointer Network; choose model=pointer_network")
    return found(**{key: value for key, value in arguments.items() if not key.startswith("_")})


def prepare_hulls(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, HullData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs (which counts for nothing).

    Raises:
        ValueError: Another source or network.
    """
    if not isinstance(source, RandomHulls):
        raise ValueError(f"data.source={config.data.source._target_} has no hulls; choose data=hulls")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    group: Any = OmegaConf.to_container(config.data, resolve=True)
    kept = dict(task="hull", model=arguments, data={"sizes": list(group["source"]["sizes"])})
    return make_network(arguments), HullData(group, source, val, config.seed), kept, 1
