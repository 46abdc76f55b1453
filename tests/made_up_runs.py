"""The least trained runs of the embedded experiments, for what shows runs."""

from pathlib import Path

from helpers import train_run

_LEAST = ["trainer=cpu", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2"]
_LEAST += ["data.workers=0", "data.batch_size=4", "~logger.tensorboard", "trainer.log_every_n_steps=1"]
_CHANGES = {
    "digits": ["experiment=digits", "model=test_biformer"],
    "nuclei": ["experiment=embedded/nuclei", "data.transform.size=64"],
    "grounding": ["experiment=embedded/grounding", "data.source.count=4", "data.transform.size=64", "model.text.dim=8"],
}


def train_runs(folder: Path) -> None:
    """Train ``outputs/digits``, ``outputs/nuclei`` and ``outputs/grounding`` below a folder, a few steps each."""
    for name, changes in _CHANGES.items():
        train_run([*changes, *_LEAST], folder / "outputs", name)
