"""Models and runs that the web page offers, found without a network."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch

import visionattn
from visionattn.models._weights import download_folder, download_name
from visionattn.tasks.checkpoints import verify_checkpoint
from visionattn.tasks.inference import load_model, load_run, read_checkpoint
from visionattn.tasks.kinds import function, kind_of

_LOADERS = {
    "segmentation": "visionattn.tasks.segmentation_inference:load_masker",
    "semantic": "visionattn.tasks.semantic_inference:load_labeller",
    "detection": "visionattn.tasks.detection_inference:load_finder",
    "grounding": "visionattn.tasks.grounding_inference:load_grounder",
}
_RUNS = ("*/checkpoints/best.ckpt", "*/*/checkpoints/best.ckpt")  # the second of trainings of several models
_LOADED = 4  # models kept in memory


@dataclass(frozen=True)
class Choice:
    """An entry of the page's list of models.

    Args:
        label: What the list shows.
        kind: Kind of task, as in ``visionattn.tasks.kinds``, or ``"classification"``.
        run: Folder of a run, or a checkpoint of one.
        model: Name of a backbone, where there is no run.
        checkpoint: File of the backbone's weights; without one they are random.
    """

    label: str
    kind: str = "classification"
    run: Path | None = None
    model: str | None = None
    checkpoint: Path | None = None

    @property
    def random(self) -> bool:
        """Whether the weights are those of a new model."""
        return self.run is None and self.checkpoint is None


def find_runs(folder: str | Path = "outputs") -> list[Path]:
    """Folders of finished runs below a folder, sorted."""
    return sorted(path.parent.parent for pattern in _RUNS for path in Path(folder).glob(pattern))


def run_choices(runs: Sequence[str | Path], report: Callable[[str], None] | None = None) -> list[Choice]:
    """Entries of runs.

    Args:
        runs: Folders, or checkpoints.
        report: Gets a line for each run that cannot be shown; without it the first of them raises.

    Raises:
        FileNotFoundError: A run without a checkpoint.
        ValueError: A damaged checkpoint, or a task that the page does not show.
        ImportError: Packages of its task are missing.
    """
    found = []
    for run in dict.fromkeys(Path(run) for run in runs):
        try:
            kind = _kind(run)
        except (ValueError, FileNotFoundError, ImportError) as error:
            if report is None:
                raise
            report(f"left out: {error}")
        else:
            found.append(Choice(f"{run} ({kind} run)", kind, run))
    return found


def _kind(run: Path) -> str:
    read_checkpoint(run, None)  # says what is wrong with it
    kind = kind_of(run)
    if kind != "classification" and kind not in _LOADERS:
        raise ValueError(
            f"{run} is of the task {kind}, which the page does not show (but classification, {', '.join(_LOADERS)}); "
            f"use visionattn predict --run {run}"
        )
    return kind


def model_choices(patterns: Sequence[str] | None = None, checkpoints: Mapping[str, str] | None = None) -> list[Choice]:
    """Entries of backbones, those with weights first.

    Args:
        patterns: Names or shell patterns; by default all but the small models of tests.
        checkpoints: Files of weights by the names of their models, which are offered too.

    Raises:
        FileNotFoundError: There is no such file of weights.
        ValueError: A pattern without a model, or an unknown name.
    """
    given = {name: Path(file) for name, file in (checkpoints or {}).items()}
    names = [name for name in visionattn.list_models() if not name.startswith("test_")] if patterns is None else []
    for pattern in [*(patterns or ()), *given]:
        matching = visionattn.list_models(pattern)
        if not matching:
            everything = visionattn.list_models()
            near = difflib.get_close_matches(pattern, everything, n=3) or everything[:3]
            raise ValueError(f"no model matches {pattern!r}; did you mean {', '.join(near)}? All: visionattn list")
        names += matching
    found = []
    for name in dict.fromkeys(names):
        file = given.get(name)
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no weights at {file} (--checkpoint {name}={file}); give a .pth or .safetensors")
        if file is not None:
            found.append(Choice(f"{name} (weights of {file.name})", model=name, checkpoint=file))
        elif (file := published_file(name)) is not None:
            found.append(Choice(f"{name} (published weights)", model=name, checkpoint=file))
        else:
            found.append(Choice(f"{name} (random weights)", model=name))
    return sorted(found, key=lambda choice: choice.random)


def published_file(name: str, folder: str | Path = "checkpoints") -> Path | None:
    """Published weights of a model that are on this machine; None where there are none.

    Args:
        name: A registered model.
        folder: Where ``visionattn convert`` writes; then the folder that weights are downloaded to is searched.
    """
    cfg = timm.models.get_pretrained_cfg(name)
    if cfg is None or not cfg.tag:
        return None
    files = (Path(folder, f"{name}.{cfg.tag}.safetensors"), _downloaded(name))
    return next((file for file in files if file is not None and file.is_file()), None)


def _downloaded(name: str) -> Path | None:
    cfg = timm.models.get_pretrained_cfg(name)
    return download_folder() / download_name(cfg) if cfg and cfg.url else None


@lru_cache(maxsize=_LOADED)
def load(choice: Choice) -> Any:
    """The model of an entry with what is needed to use it; the last few are kept.

    Raises:
        FileNotFoundError: The run or file is gone.
        ValueError: It is damaged, of another model, or not what its index says.
    """
    if choice.kind != "classification":
        return function(_LOADERS[choice.kind])(choice.run)
    if choice.run is not None:
        return load_run(choice.run)
    if choice.checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return load_model(str(choice.model), pretrained=False)
    if choice.checkpoint == _downloaded(str(choice.model)):
        return load_model(str(choice.model))  # which checks what it downloaded
    if choice.checkpoint.parent.joinpath("index.csv").is_file():
        verify_checkpoint(choice.checkpoint)
    return load_model(str(choice.model), str(choice.checkpoint))
