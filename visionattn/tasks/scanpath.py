"""Scanpaths: teacher forcing, and validation by the paths that greedy decoding gives."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.data.randomness import seed_all, seed_from
from visionattn.heads.object_encoders import Scenes
from visionattn.tasks.scanpath_metrics import behaviour, delta, sequence_score
from visionattn.tasks.training import Training


def scenes_of(batch: dict[str, Any]) -> Scenes:
    """The network's input in a batch of ``collate_scenes``."""
    return Scenes(*(batch[key] for key in Scenes._fields))


class Scanpath(Training):
    """Training of OAT.

    Every random choice of a step comes from generators seeded by (seed, epoch, batch, rank). ``val/sequence_score``
    is the mean over trials, ``val/delta`` that of the mean behaviours (of several processes the mean over them),
    ``val/loss`` the cross-entropy under teacher forcing.

    Args:
        model: ``visionattn.heads.oat.OAT``.
        num_classes: Not used; the number of classes is that of the objects.
        seed: Seed of the run.
        samples: Scanpaths drawn of each scene in an evaluation.
        hparams: Plain values that a checkpoint keeps under ``hyper_parameters``; ``max_length`` among them.
        **training: Optimizer, schedule and averaged weights, see ``Training``.

    Raises:
        ValueError: An unknown schedule.
    """

    monitors = ("val/sequence_score", "val/delta", "val/loss")
    entry_points = ("loss", "encode", "teacher", "path_loss", "decode", "generate")
    kind = "scanpath"

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        seed: int,
        samples: int,
        hparams: dict[str, Any],
        **training: Any,
    ):
        super().__init__(model, **training)
        self.seed, self.samples, self.max_length = seed, samples, int(hparams["max_length"])
        self.behaviours: list[np.ndarray] = []
        self.save_hyperparameters(hparams)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        seed_all(seed_from(self.seed, self.current_epoch, batch_idx, self.global_rank))
        model: Any = self.model
        loss = model.loss(scenes_of(batch), batch["path"])
        size = len(batch["target"])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the behaviours."""
        self.behaviours = []

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Loss and greedy scanpaths of a batch."""
        if not len(batch["target"]):
            return
        model: Any = self.evaluated
        memory = model.encode(scenes_of(batch))
        tokens, classes = model.teacher(batch["path"], batch["mask"].shape[1])
        loss = model.path_loss(model.decode(memory, tokens), classes)
        found = model.generate(memory, self.max_length)
        true = [[i for i in row if i >= 0] for row in batch["path"].tolist()]
        targets = [t if t >= 0 else None for t in batch["target"].tolist()]
        score = float(np.mean([sequence_score(p, t) for p, t in zip(found, true, strict=True)]))
        pairs = zip(found, true, targets, strict=True)
        self.behaviours += [np.stack([behaviour(p, aim), behaviour(t, aim)]) for p, t, aim in pairs]
        size = len(true)
        self.log("val/loss", loss, batch_size=size, sync_dist=True)
        self.log("val/sequence_score", score, prog_bar=True, batch_size=size, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log delta of the mean behaviours."""
        predicted, true = np.mean(self.behaviours, 0) if self.behaviours else np.full((2, 5), np.nan)
        value = torch.tensor(delta(predicted, true), dtype=torch.float32, device=self.device)
        self.log("val/delta", value, sync_dist=True)
