"""Loaders that a resumed run finds where it left them: what the data modules of all tasks share."""

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from visionattn.data.pipeline import EpochSampler

_WORKER_SECONDS = 60  # that a worker outlives a signal, at whose end the alarm's ends it


class WaitClock:
    """Seconds that training waited for batches.

    Without a GPU that is the time in which the process stands still until a batch is there (with no workers: reads it).
    On CUDA the process runs ahead of the device, and a wait that ends before the device has done its work costs
    nothing; so there it is the time between two events on the device, one behind all work that was queued when the
    batch was asked for, the other when it arrived: how long the device had nothing to do.

    Args:
        cuda: Whether the batches are for a CUDA device.
    """

    def __init__(self, cuda: bool = False):
        self.cuda, self.seconds = cuda, 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch, its wait counted."""
        if self.cuda:
            asked = self._event()
            batch = next(batches)
            self.events.append((asked, self._event()))
            return batch
        start = time.perf_counter()
        try:
            return next(batches)
        finally:
            self.seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since the last call; on CUDA waits for the device."""
        if self.events:
            self.events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self.events) / 1000
            self.events = []
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def _outlive_signals(worker: int) -> None:
    """Let a worker process go on for a minute when its whole group is told to stop, so that its run can save."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: signal.alarm(_WORKER_SECONDS))


class _Timed(Iterator[Any]):
    def __init__(self, batches: Iterator[Any], clock: WaitClock):
        self.batches, self.clock = batches, clock

    def __next__(self) -> Any:
        return self.clock.next(self.batches)


def check_same_batches(state: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on inside an epoch with other batches.

    Args:
        state: Of an ``EpochLoader`` in the checkpoint.
        now: The same of the present run, or what is known of it.

    Raises:
        ValueError: Another batch size, number of processes or of batches.
    """
    names = dict(batch_size="data.batch_size", world_size="processes", batches="batches of an epoch")
    differing = (key for key, value in now.items() if state.get(key, value) != value)
    changed = [f"{names[key]} {state[key]}, now {now[key]}" for key in differing]
    if changed:
        raise ValueError(
            f"the checkpoint is from inside an epoch with {'; '.join(changed)}; resume it with the same ones, or "
            f"from a checkpoint of an epoch's end"
        )


class EpochLoader(DataLoader):
    """A loader whose waits are counted and that goes on inside an epoch.

    Lightning sees that from its state, and asks for it only where a checkpoint is from inside an epoch.
    """

    clock: WaitClock | None = None
    world_size = 1

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.clock is None else _Timed(batches, self.clock)

    def state_dict(self) -> dict[str, Any]:
        """What must stay as it is for the same batches to follow; where they go on is in Lightning's own state."""
        return dict(batch_size=self.batch_size, world_size=self.world_size, batches=len(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the same batches follow.

        Raises:
            ValueError: Another batch size, number of processes or of batches.
        """
        check_same_batches(state, self.state_dict())


class EpochData(lightning.LightningDataModule):
    """Loaders of the training and validation split, whose order depends on (seed, epoch) alone.

    Args:
        config: The ``data`` group: ``batch_size``, ``workers``, and if given ``val_batch_size``, ``repeats``
            (repeated augmentation), ``epoch_steps``, the batches of an epoch however many images there are,
            ``prefetch``, batches that each worker has ready (2), ``pin_memory`` (on CUDA) and ``persistent_workers``,
            which live from epoch to epoch (false).
        train: Training samples by the keys of ``EpochSampler``.
        val: Validation samples.
        collate: Items to a batch.
        seed: Seed of the run.
    """

    def __init__(self, config: dict[str, Any], train: Any, val: Any, collate: Callable[[list[Any]], Any], seed: int):
        super().__init__()
        self.config, self.train, self.val, self.collate, self.seed = config, train, val, collate, seed
        self.clock = WaitClock()  # of training batches

    def _loader(self, samples: Any, train: bool) -> EpochLoader:
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
        epoch, done = trainer.fit_loop.epoch_progress.current.processed, 0
        if train and trainer.fit_loop.restarting:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        sampler.resume(epoch, done * size)
        cuda, workers = trainer.strategy.root_device.type == "cuda", self.config["workers"]
        loader = EpochLoader(
            samples,
            batch_size=size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=self.collate,
            drop_last=train and len(sampler) > size,
            pin_memory=self.config.get("pin_memory", cuda),
            # PyTorch refuses both where there are no workers
            worker_init_fn=_outlive_signals,
            prefetch_factor=self.config.get("prefetch") if workers else None,
            persistent_workers=bool(workers and self.config.get("persistent_workers", False)),
        )
        loader.world_size = trainer.world_size
        if train:
            self.clock.cuda, loader.clock = cuda, self.clock
        return loader

    def train_dataloader(self) -> EpochLoader:
        """Shuffled, augmented batches."""
        return self._loader(self.train, True)

    def val_dataloader(self) -> EpochLoader:
        """Every validation sample once, in order."""
        return self._loader(self.val, False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images ``[B, C, H, W]`` in the memory format of the weights."""
        if not getattr(self.trainer.lightning_module, "channels_last", False):
            return batch
        return apply_to_collection(batch, Tensor, _channels_last)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
