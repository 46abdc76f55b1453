"""Checkpoints of training that survive what happens while they are written."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from visionattn._writing import replaced
from visionattn.tasks.checkpoints import read_torch_file


class DurableCheckpointIO(CheckpointIO):
    """Writes a checkpoint completely or not at all, and reads nothing but tensors and plain values.

    Lightning 2.6 neither waits for the disk before it renames nor passes on a refused permission (its issues 19970 and
    21800). Here the file is written under a temporary name and synced, renamed, and its folder synced; every error of
    the disk ends the run with the former checkpoint in place. The process needs the checkpoint's size in memory once
    more, as with Lightning's own.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What Lightning keeps of a run.
            path: File on a local or mounted disk.
            storage_options: Must be None.

        Raises:
            SavingError: A full or read-only disk, a folder without permission; the former file is intact.
            TypeError: ``storage_options`` were given.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options={storage_options!r}: checkpoints go to local disks, which have none")
        # in memory first: how much room it takes is then known, and PyTorch's own writer aborts on a full disk
        content = io.BytesIO()
        torch.save(checkpoint, content)
        data = content.getbuffer()
        with replaced(Path(path), needed=len(data)) as temporary, temporary.open("wb") as file:
            file.write(data)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, whatever ``weights_only`` says without unpickling objects.

        Args:
            path: File.
            map_location: As in ``torch.load``.
            weights_only: Ignored, since only True is safe.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds other objects than tensors and plain values.
        """
        return read_torch_file(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint that a better one has replaced."""
        Path(path).unlink(missing_ok=True)
