"""Data and network of a segmentation run from its configuration."""

from typing import Any

import lightning
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from visionattn.data.pipeline import EpochSampler
from visionattn.data.segmentation_pipeline import SegmentationSamples, collate_samples
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.networks import head_class

_POOLING = ("upernet", "pan")  # have a batch norm of one pixel an image


def outputs(classes: list[str]) -> int:
    """Channels of the logits: one for two classes, else one for each."""
    if len(classes) < 2:
        raise ValueError(f"the data has the classes {classes}; expected the background and at least one more")
    return 1 if len(classes) == 2 else len(classes)


def make_network(arguments: dict[str, Any], classes: list[str], in_chans: int) -> nn.Module:
    """The network of a ``model`` group.

    Args:
        arguments: ``_target_``, a class of ``visionattn.heads``, and its arguments.
        classes: Names, the background first.
        in_chans: Channels of the image.

    Raises:
        ValueError: Another ``_target_``, for example a classifier's.
    """
    given = {key: value for key, value in arguments.items() if not key.startswith("_")}
    network = head_class(str(arguments.get("_target_")))
    return network(**given, num_classes=outputs(classes), in_chans=in_chans)


class MaskData(lightning.LightningDataModule):
    """Loaders of the training and validation split.

    Args:
        config: The ``data`` group.
        train: Source of training samples.
        val: Source of validation samples.
        seed: Seed of the run.
    """

    collate = staticmethod(collate_samples)

    def __init__(self, config: dict[str, Any], train: Any, val: Any, seed: int):
        super().__init__()
        self.config, self.seed = config, seed
        self.train, self.val = self._samples(train, True), self._samples(val, False)

    def _samples(self, source: Any, train: bool) -> SegmentationSamples:
        transform = SegmentationTransform(**self.config["transform"], train=train)
        return SegmentationSamples(source, transform, self.seed, self.config["on_error"], replace=train)

    def _loader(self, samples: SegmentationSamples, train: bool) -> DataLoader:
        trainer = self.trainer
        repeats = self.config.get("repeats", 1) if train else 1
        sampler = EpochSampler(samples, train, self.seed, repeats, trainer.global_rank, trainer.world_size)
        # workers read ahead before the trainer says which epoch it resumes
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
        size = self.config["batch_size"] if train else self.config.get("val_batch_size", 1)
        return DataLoader(
            samples,
            batch_size=size,
            sampler=sampler,
            num_workers=self.config["workers"],
            collate_fn=self.collate,
            drop_last=train and len(sampler) > size,
        )

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches."""
        return self._loader(self.train, True)

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, whole."""
        return self._loader(self.val, False)


def prepare_masks(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, MaskData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs.

    Raises:
        ValueError: A network that gives no masks, splits with other classes or a patient in both, or a batch of one
            image for a decoder that needs two.
    """
    if val.classes != source.classes:
        raise ValueError(f"the splits have other classes: {source.classes} and {val.classes}")
    if shared := sorted(set(getattr(source, "groups", ())) & set(getattr(val, "groups", ()))):
        raise ValueError(f"{len(shared)} patients are in training and validation, first {shared[0]!r}; divide them")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    if arguments.get("decoder") in _POOLING and min(config.data.batch_size, len(source)) < 2:
        raise ValueError(f"the decoder {arguments['decoder']} needs two images in a batch; set data.batch_size=2")
    model = make_network(arguments, source.classes, config.data.in_chans)
    group: Any = OmegaConf.to_container(config.data, resolve=True)
    data = MaskData(group, source, val, config.seed)
    kept = dict(
        task="segmentation",
        model={k: v for k, v in arguments.items() if k not in ("pretrained", "pretrained_backbone")},
        data=group["transform"],
    )
    return model, data, kept, outputs(source.classes)
