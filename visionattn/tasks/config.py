"""The Hydra configurations of the package, and files that are never seen half written."""

import os
from pathlib import Path

import hydra
from omegaconf import DictConfig

import visionattn


def config_folder() -> Path:
    """The configurations: inside an installed package, or beside it in a checkout."""
    package = Path(visionattn.__file__).parent
    return next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())


def compose(overrides: list[str]) -> DictConfig:
    """``configs/train.yaml`` with its groups and changes, for example ``["experiment=digits", "seed=1"]``."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=overrides)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
