"""Data and network of a scanpath run from its configuration."""

from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from visionattn.data.pipeline import EpochSampler
from visionattn.data.scanpath_pipeline import ScanpathSamples, SceneTransform, collate_scenes
from visionattn.heads.oat import OAT
from visionattn.tasks.networks import head_class


def make_network(arguments: dict[str, Any]) -> OAT:
    """The network of a ``model`` group.

    Args:
        arguments: ``_target_``, ``visionattn.heads.oat.OAT``, and its arguments.

    Raises:
        ValueError: Another ``_target_``.
    """
    found = head_class(str(arguments.get("_target_")))
    if not issubclass(found, OAT):
        raise ValueError(f"model._target_={arguments['_target_']} gives no scanpaths; choose model=oat")
    return found(**{key: value for key, value in arguments.items() if not key.startswith("_")})


class ScanpathData(lightning.LightningDataModule):
    """Loaders of the training and validation split.

    Args:
        config: The ``data`` group.
        train: Source of training trials.
        val: Source of validation trials.
        seed: Seed of the run.
    """

    def __init__(self, config: dict[str, Any], train: Any, val: Any, seed: int):
        super().__init__()
        self.config, self.seed = config, seed
        kwargs = dict(seed=seed, on_error=config["on_error"])
        transform = SceneTransform(**config["transform"])
        self.train = ScanpathSamples(train, transform, **kwargs)
        self.val = ScanpathSamples(val, transform, replace=False, **kwargs)

    def _loader(self, samples: ScanpathSamples, train: bool) -> DataLoader:
        trainer, size = self.trainer, self.config["batch_size"]
        sampler = EpochSampler(samples, train, self.seed, 1, trainer.global_rank, trainer.world_size)
        # workers read ahead before the trainer says which epoch it resumes
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
        return DataLoader(
            samples,
            batch_size=size,
            sampler=sampler,
            num_workers=self.config["workers"],
            collate_fn=collate_scenes,
            drop_last=train and len(sampler) > size,
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader(self.train, True)

    def val_dataloader(self) -> DataLoader:
        """Every validation trial once."""
        return self._loader(self.val, False)


def prepare_scanpaths(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, ScanpathData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs (which counts for nothing).

    Raises:
        ValueError: A source without scanpaths, or a network that gives none or takes other objects than the data gives.
    """
    if not hasattr(source, "trials"):
        raise ValueError(f"data.source={config.data.source._target_} has no scanpaths; choose data=scanpaths")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    group: Any = OmegaConf.to_container(config.data, resolve=True)
    mode = arguments.get("objects", "crops")
    if group["transform"].get("objects", "crops") != mode:
        raise ValueError(
            f"model.objects={mode}, but data.transform.objects={group['transform'].get('objects')}; set both"
        )
    kept = dict(
        task="scanpath",
        model={
            **{k: v for k, v in arguments.items() if k != "backbone_kwargs"},
            "backbone_kwargs": {k: v for k, v in (arguments.get("backbone_kwargs") or {}).items() if k != "pretrained"},
        },
        data=group["transform"],
        max_length=source.longest(),
    )
    return make_network(arguments), ScanpathData(group, source, val, config.seed), kept, 1
