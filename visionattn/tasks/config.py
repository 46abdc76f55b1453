"""The Hydra configurations of the package, and files that are never seen half written."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

import visionattn
from visionattn.tasks.files import replaced


def config_folder() -> Path:
    """The configurations: inside an installed package, or beside it in a checkout."""
    package = Path(visionattn.__file__).parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def compose(overrides: list[str]) -> DictConfig:
    """``configs/train.yaml`` with its groups and changes, for example ``["experiment=digits", "seed=1"]``."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=overrides)


_NUMBERS = {  # the least that each may be, a whole number where that is one
    "seed": 0,
    "patience": 1,
    "trainer.max_epochs": 1,
    "trainer.accumulate_grad_batches": 1,
    "data.batch_size": 1,
    "data.workers": 0,
    "data.epoch_steps": 1,
    "task.epochs": 1,
    "task.lr": 0.0,
    "task.lr_batch": 1.0,
    "task.warmup_epochs": 0.0,
    "task.warmup_lr": 0.0,
    "task.min_lr": 0.0,
    "task.weight_decay": 0.0,
    "task.ema_decay": 0.0,
    "task.mixup": 0.0,
    "task.cutmix": 0.0,
}
_OPTIONAL = ("patience", "data.epoch_steps", "task.ema_decay")


def check_numbers(config: DictConfig) -> None:
    """Refuse what is no number, or too small, where a training counts with it.

    Args:
        config: ``configs/train.yaml`` with its groups; each task has only some of the settings.

    Raises:
        ValueError: Such a value.
    """
    for key, least in _NUMBERS.items():
        group, _, name = key.rpartition(".")
        node = config[group] if group else config
        if name not in node or (node[name] is None and key in _OPTIONAL):
            continue
        value, whole = node[name], isinstance(least, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= least:
            kinds = f"a {'whole number' if whole else 'number'} of at least {least:g}"
            text, or_null = "null" if value is None else value, ", or null" if key in _OPTIONAL else ""
            raise ValueError(f"{key}={text} must be {kinds}{or_null}")


def _own_source(target: Any) -> bool:
    """Whether ``target`` names a class that is defined in ``visionattn.data``."""
    module, _, name = str(target).rpartition(".")
    if not module.startswith("visionattn.data."):
        return False
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:  # a name inside a class, or no module
        return False
    return isinstance(found, type) and found.__module__ == module


def _targets(node: Any, key: str) -> dict[str, Any]:
    """Every ``_target_`` below a node by its dotted key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = {}
    for name, value in items:
        found |= {f"{key}._target_": value} if name == "_target_" else _targets(value, f"{key}.{name}")
    return found


def check_sources(config: DictConfig, path: Path, overrides: Sequence[str]) -> None:
    """Refuse a run's configuration that would call anything but this package's sources of data.

    Hydra calls whatever a ``_target_`` names, so that a run's folder from somebody else could run any program.

    Args:
        config: The file's with the changes of the command.
        path: The file, for the message.
        overrides: ``key=value`` of the command: what the user says is trusted.

    Raises:
        ValueError: A ``_target_`` below ``data`` that is neither a class of ``visionattn.data`` nor in ``overrides``.
    """
    said = {text.lstrip("+").partition("=")[0] for text in overrides}
    # resolved, since an interpolation may stand for a whole node
    data = OmegaConf.to_container(config.data, resolve=True) if "data" in config else {}
    for key, target in _targets(data, "data").items():
        if key not in said and not _own_source(target):
            raise ValueError(
                f"{path} names {key}={target}, which is no source of data of visionattn and was not called, since "
                f"it could run any program; if you trust it, say so: {key}={target}"
            )


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it.

    Raises:
        SavingError: It cannot be written there.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
