"""Training a Pointer Network on convex hulls."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from visionattn.data.hull import RandomHulls, collate_points
from visionattn.heads.pointer_network import PointerNetwork
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import make_head
from visionattn.tasks.training import Training


class Hull(Training):
    """``val/exact`` is the share of validation items whose whole sequence is right.

    Args:
        model: ``visionattn.heads.pointer_network.PointerNetwork``.
        num_classes: Not used.
        seed: Seed of the run.
        hparams: Plain values that a checkpoint keeps.
        **training: Optimizer, schedule and averaged weights, see ``Training``.
    """

    monitors = ("val/exact", "val/loss")
    entry_points = ("loss", "generate")
    kind = "hull"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        hparams: dict[str, Any],
        **training: Any,
    ):
        super().__init__(model, **training)
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


def make_network(arguments: dict[str, Any]) -> PointerNetwork:
    """The network of a ``model`` group.

    Raises:
        ValueError: It is no Pointer Network, or arguments that one does not have.
    """
    return make_head(arguments, PointerNetwork, "model=pointer_network")


def prepare_hulls(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, EpochData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs (which counts for nothing).

    Raises:
        ValueError: Another source or network.
    """
    if not isinstance(source, RandomHulls):
        raise ValueError(f"data.source={config.data.source._target_} has no hulls; choose data=hulls")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    group: Any = OmegaConf.to_container(config.data, resolve=True)
    kept = dict(task="hull", model=arguments, data={"sizes": list(group["source"]["sizes"])})
    return make_network(arguments), EpochData(group, source, val, collate_points, config.seed), kept, 1
