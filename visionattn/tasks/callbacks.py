"""What happens beside a training run: progress lines, and the list of unreadable images."""

import contextlib
import fcntl
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

_SCORES = ("val/ap", "val/ap50", "val/mask_ap", "val/sequence_score", "val/delta", "val/exact")
_SHARES = (
    ("top-1", "val/top1"),
    ("top-5", "val/top5"),
    ("Dice", "val/dice"),
    ("IoU", "val/iou"),
    ("mIoU", "val/miou"),
    ("aAcc", "val/aacc"),
)
TIMINGS = ("epoch_seconds", "data_share", "images_per_second", "peak_memory_gib")  # logged, and of no two runs the same
_BATCH_LINE_SECONDS = 60  # long epochs report that often
_DATA_SHARE = 0.2  # of an epoch's training in which waiting for data is worth a warning,
_DATA_SECONDS = 10  # unless it is short


class SkippedImages(Callback):
    """Writes each unreadable image once to ``skipped_images.txt`` in the run's folder, whichever process meets it.

    Args:
        folder: The run's folder, the same for all processes.
    """

    def __init__(self, folder: Path):
        self.path, self.seen, self.read = folder / "skipped_images.txt", set[str](), 0

    def _note(self, batch: dict[str, Any]) -> None:
        # one line each, since they are told apart by reading lines
        notes = dict.fromkeys(" ".join(note.splitlines()) for note in batch["skipped"])
        if self.seen.issuperset(notes):
            return
        with self.path.open("a+", encoding="utf-8", errors="surrogateescape") as file:
            # until the file is closed; where a file system has no locks, two processes may list the same image
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self.read)  # what other processes, and the run before a resume, have listed since
            self.seen.update(file.read().splitlines())
            file.writelines(note + "\n" for note in notes if note not in self.seen)
            self.seen.update(notes)
            self.read = file.tell()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the batch's unreadable images."""
        self._note(batch)

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        """Note the batch's unreadable images."""
        self._note(batch)

    def on_fit_end(self, trainer: Any, module: Any) -> None:
        """Say how many there were in all processes."""
        if trainer.is_global_zero and self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="surrogateescape")
            rank_zero_info(f"{len(text.splitlines())} unreadable images were skipped, listed in {self.path}")


class EpochLines(Callback):
    """One line of progress an epoch, and one a minute inside long epochs.

    Logs each epoch's seconds, share of waiting for data, training images per second and, on a GPU, the peak of the
    first process's memory since the start, in GiB. A resumed epoch's seconds, images per second and waits are of the
    part after the resume.
    """

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clocks, for an epoch that goes on too."""
        self._start(trainer)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Start the clocks."""
        self._start(trainer)

    def _start(self, trainer: Any) -> None:
        self.start = self.last = time.perf_counter()
        self.images, self.validation = 0, 0.0
        trainer.datamodule.clock.take()

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Stop the clock of training."""
        self.validation -= time.perf_counter()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Go on with the clock of training."""
        self.validation += time.perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images; a line once a minute."""
        self.images += len(batch["image"])
        now = time.perf_counter()
        if now - self.last > _BATCH_LINE_SECONDS:
            self.last = now
            speed = self.images * trainer.world_size / (now - self.start)
            rank_zero_info(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: "
                f"batch {batch_idx + 1}/{trainer.num_training_batches}, {speed:.0f} images/s"
            )

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """The epoch's line."""
        seconds = time.perf_counter() - self.start
        module.log("epoch_seconds", seconds, rank_zero_only=True)
        waited = trainer.datamodule.clock.take()
        share = min(waited / max(seconds - self.validation, 1e-9), 1.0)
        module.log("data_share", share, rank_zero_only=True)
        rate = self.images * trainer.world_size / max(seconds - self.validation, 1e-9)
        module.log("images_per_second", rate, rank_zero_only=True)
        if module.device.type == "cuda":
            module.log("peak_memory_gib", torch.cuda.max_memory_allocated(module.device) / 2**30, rank_zero_only=True)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [f"{name} {metrics[key]:.3f}" for name, key in (("loss", "train/loss"),) if key in metrics]
        parts += [f"{name} {metrics[key]:.1%}" for name, key in _SHARES if key in metrics]
        scores = [
            f"{key.removeprefix('val/').replace('_', ' ')} {metrics[key]:.3f}" for key in _SCORES if key in metrics
        ]
        parts += scores
        parts += [f"lr {metrics['lr']:.2g}"] if "lr" in metrics else []
        rank_zero_info(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {', '.join(parts)}, "
            f"data {share:.0%}, {seconds:.1f} s"
        )
        if share > _DATA_SHARE and waited > _DATA_SECONDS:
            rank_zero_warn(
                f"training waited {waited:.0f} s ({share:.0%}) of this epoch for data: raise data.workers "
                f"(now {trainer.datamodule.config['workers']}), read smaller images, or pack them in shards"
            )
