"""Where a run starts, and whether a checkpoint fits it: all that is known before anything in its folder changes."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from visionattn.tasks.checkpoints import read_torch_file
from visionattn.tasks.loaders import check_same_batches
from visionattn.tasks.stopping import EpochCheckpoint
from visionattn.tasks.training import Training


def _at_stake(folder: Path) -> Path | None:
    """A file that a new run in this folder would destroy, or None.

    The log of a run that ended before its first checkpoint is worth nothing; one that no run wrote may be.
    """
    names = ["checkpoints", "metrics.json"]
    if not (folder / "run.json").is_file():
        names += ["logs", "tensorboard"]
    found = (path for name in names for path in (folder / name, *sorted((folder / name).rglob("*"))))
    return next((path for path in found if path.is_file() and path.suffix != ".part"), None)


def goes_on(path: Path | None, folder: Path) -> bool:
    """Whether a run that starts from the checkpoint ``path`` goes on with the run of this folder."""
    if path is None:
        return False
    # also where the folder of checkpoints is a link to another disk
    named = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
    return named or path.resolve().is_relative_to(folder.resolve())


def starting_point(config: DictConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    Args:
        config: ``configs/train.yaml`` with its groups.
        folder: The run's folder.

    Raises:
        ValueError: The folder holds another run, or files of anything else, and nothing says that they may go.
        FileNotFoundError: There is no such checkpoint.
    """
    best, last = (folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    path = None
    if config.ckpt_path == "auto":  # a run that was killed between its first two checkpoints has the first
        path = next((file for file in (last, best) if file.is_file()), None)
    elif config.ckpt_path is not None:
        path = last if config.ckpt_path == "last" else Path(config.ckpt_path)
        if not path.is_file():
            raise FileNotFoundError(f"ckpt_path={config.ckpt_path}: no checkpoint at {path}; start without ckpt_path")
    if not goes_on(path, folder) and not config.overwrite and (kept := _at_stake(folder)):
        own = "last" if last.is_file() else best if best.is_file() else "PATH"
        raise ValueError(
            f"{folder} holds a run ({kept.relative_to(folder)}); resume it with ckpt_path={own}, or set name=... or "
            f"overwrite=true"
        )
    return path


def _epochs_done(saved: dict[str, Any]) -> int:
    return saved["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def read_saved(path: Path, classes: list[str]) -> dict[str, Any]:
    """Content of the checkpoint of a training run on data of these classes.

    Args:
        path: The checkpoint.
        classes: Names of the classes in label order.

    Raises:
        ValueError: It is no such checkpoint, or one of other classes.
    """
    saved = read_torch_file(path)
    try:
        known, _, _ = saved["hyper_parameters"]["classes"], saved["state_dict"], _epochs_done(saved)
    except (KeyError, TypeError) as error:
        raise ValueError(f"ckpt_path={path} is no checkpoint of a training run ({type(error).__name__})") from error
    if known != classes:
        raise ValueError(
            f"{path} was trained on {len(known)} classes ({', '.join(known[:3])}, ...), the data has {len(classes)} "
            f"({', '.join(classes[:3])}, ...); resume with the same data, or start anew"
        )
    return saved


def _changes(group: str, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = (key for key in {**saved, **now} if saved.get(key) != now.get(key))
    return [f"{group}.{key}={saved.get(key)}, now {now.get(key)}" for key in keys]


def _is_averaged(weights: dict[str, Any]) -> bool:
    return any(key.startswith("ema.") for key in weights)


def _groups(optimizer: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer["param_groups"]]


def check_fit(path: Path, saved: dict[str, Any], task: Training, epochs: int, batches: dict[str, Any]) -> None:
    """Refuse a checkpoint that the training cannot go on from.

    Args:
        path: The checkpoint.
        saved: Its content.
        task: The training.
        epochs: How many there are to be.
        batches: What is known of its loader, as for ``check_same_batches``.

    Raises:
        ValueError: Another network, averaged weights in only one of them, another optimizer, more epochs than there are
            to be, or, inside an epoch, other batches.
    """
    weights, now = saved["state_dict"], task.state_dict()
    changed: list[str] = []
    if _is_averaged(weights) != _is_averaged(now):
        kept = "with averaged weights", "without them (task.ema_decay=null)"
        changed = [", now ".join(kept if _is_averaged(weights) else reversed(kept))]
    elif {k: x.shape for k, x in weights.items()} != {k: x.shape for k, x in now.items()}:
        model = saved["hyper_parameters"].get("model"), task.hparams.get("model")
        changed = _changes("model", *(m if isinstance(m, dict) else {} for m in model)) or ["another network"]
    # checkpoints of former versions do not say it
    changed += _changes("task", saved.get("optimizer_args") or task.optimizer_kind, task.optimizer_kind)
    if not changed and _groups(saved["optimizer_states"][0]) != _groups(task.make_optimizer().state_dict()):
        changed = ["other groups of parameters, as frozen ones change them"]
    if changed:
        raise ValueError(
            f"{path} is of another training: {'; '.join(changed)}; resume it with the same settings, or start "
            f"anew with another name=..."
        )
    if (done := _epochs_done(saved)) > epochs:
        raise ValueError(
            f"{path} is of a run after {done} epochs, more than trainer.max_epochs={epochs}; set it to {done} or more"
        )
    for state in saved["loops"]["fit_loop"]["state_dict"].get("combined_loader", ()):
        check_same_batches(state, batches)


def check_monitor(path: Path, saved: dict[str, Any], monitor: str) -> None:
    """Refuse to go on with the best checkpoint of a run by another score, which its former epochs do not have.

    Args:
        path: The checkpoint, of the run's own folder.
        saved: Its content.
        monitor: What the best checkpoint is to be the best in.

    Raises:
        ValueError: It was the best in something else.
    """
    for key, state in saved.get("callbacks", {}).items():
        if not key.startswith(EpochCheckpoint.__qualname__) or state["best_model_score"] is None:
            continue
        if state["monitor"] not in (None, monitor):
            raise ValueError(
                f"the best checkpoint beside {path} is the best in monitor={state['monitor']}, now monitor={monitor}; "
                f"resume with the former, or choose by the other from here on in a folder of its own: name=... "
                f"ckpt_path={path}"
            )
