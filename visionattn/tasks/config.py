"""The Hydra configurations of the package, and files that are never seen half written."""

import re
import shlex
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

import visionattn
from visionattn._writing import replaced
from visionattn.data.shard_cache import is_url

_KEY = re.compile(r"\$\{[^${}:]*\}")


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


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a node that is no mapping and no list, and all ``_args_``, by its dotted key."""
    if not isinstance(node, dict | list) or key.endswith("._args_"):
        yield key, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        yield from _leaves(value, f"{key}.{name}" if key else str(name))


def _without_keys(value: Any) -> Any:
    """A text without its ``${key}``, which stand for other values of the file; whatever else is taken as it is."""
    while isinstance(value, str) and (shorter := _KEY.sub("", value)) != value:
        value = shorter
    return value


def _fault(key: str, value: Any) -> str | None:
    """Why a value below ``data`` is none for a run of somebody else to choose, or None."""
    name = key.rpartition(".")[2]
    if "${" in str(value):
        return "which could read environment variables"
    if not value:
        return None
    if name == "_target_" and not _own_source(value):
        return "which is no source of data of visionattn and was not called, since it could run any program"
    if name == "_args_":
        return "whose names are not known"
    if name == "cache":
        return "a folder in which shards are written and removed"
    if name == "download":
        return "which would write what it fetches below a folder that the file chooses"
    if is_url(value):
        return "an address that would be asked over the network"
    return None


def check_sources(config: DictConfig, path: Path, overrides: Sequence[str]) -> None:
    """Refuse a run's configuration that would do more than read data from this machine.

    Hydra calls whatever a ``_target_`` names, and OmegaConf puts environment variables wherever ``${oc.env:NAME}``
    stands, so that a run's folder from somebody else could run any program and send what it finds.

    Args:
        config: The file's with the changes of the command.
        path: The file, for the message.
        overrides: ``key=value`` of the command: what the user says is trusted.

    Raises:
        ValueError: Unless ``overrides`` have it: an interpolation of anything but a key; and below ``data`` a
            ``_target_`` that is no class of ``visionattn.data``, ``_args_``, a URL, ``download`` or a ``cache``.
    """
    changes = OmegaConf.to_container(OmegaConf.from_dotlist([text.lstrip("+") for text in overrides]))
    said, raw = {key for key, _ in _leaves(changes)}, dict(_leaves(OmegaConf.to_container(config)))

    def check(key: str, value: Any, shown: Any) -> None:
        if fault := _fault(key, value):
            raise ValueError(
                f"{path} names {key}={shown}, {fault}; if you trust it, say so: {shlex.quote(f'{key}={shown}')}"
            )

    for key, value in raw.items():
        if key not in said and "${" in str(rest := _without_keys(value)):
            check(key, rest, value)
    # resolved, since an interpolation may stand for a whole node, and several for the parts of a text
    for key, value in _leaves(OmegaConf.to_container(config.data, resolve=True) if "data" in config else {}, "data"):
        if key not in said and not _repeats(key, raw.get(key), said):
            check(key, value, value)


def _repeats(key: str, value: Any, said: set[str]) -> bool:
    """Whether a value is another's of the same name, which the command says."""
    other = value[2:-1] if isinstance(value, str) and _KEY.fullmatch(value) else ""
    return other in said and other.rpartition(".")[2] == key.rpartition(".")[2]


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it.

    Raises:
        SavingError: It cannot be written there.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
