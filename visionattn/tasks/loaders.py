"""Loaders that a resumed run finds where it left them: what the data modules of all tasks share."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from visionattn.data.pipeline import EpochSampler


class EpochData(lightning.LightningDataModule):
    """Loaders of the training and validation split, whose order depends on (seed, epoch) alone.

    Args:
        config: The ``data`` group: ``batch_size``, ``workers``, and if given ``val_batch_size``, ``repeats``
            (repeated augmentation) and ``epoch_steps``, the batches of an epoch however many images there are.
        train: Training samples by the keys of ``EpochSampler``.
        val: Validation samples.
        collate: Items to a batch.
        seed: Seed of the run.
    """

    def __init__(self, config: dict[str, Any], train: Any, val: Any, collate: Callable[[list[Any]], Any], seed: int):
        super().__init__()
        self.config, self.train, self.val, self.collate, self.seed = config, train, val, collate, seed

    def _loader(self, samples: Any, train: bool) -> DataLoader:
        trainer, size = self.trainer, self.config["batch_size"]
        if not train:
            size = self.config.get("val_batch_size", size)
        repeats = self.config.get("repeats", 1) if train else 1
        steps = self.config.get("epoch_steps") if train else None
        count = None if steps is None else steps * size
        sampler = EpochSampler(samples, train, self.seed, repeats, trainer.global_rank, trainer.world_size, count)
        if train and sampler.own is not None and len(sampler) < size:
            raise ValueError(
                f"{len(samples)} images for {trainer.world_size} processes are {len(sampler)} each, less than "
                f"data.batch_size={size}; use fewer processes or a smaller batch"
            )
        # workers read ahead before the trainer says which epoch it resumes
        sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)
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
        """Every validation sample once, in order."""
        return self._loader(self.val, False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images ``[B, C, H, W]`` in the memory format of the weights."""
        if not getattr(self.trainer.lightning_module, "channels_last", False):
            return batch
        return apply_to_collection(batch, Tensor, _channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
