"""The kinds of task, and where each keeps what the commands call."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from visionattn import _files


@dataclass(frozen=True)
class Kind:
    """One kind of task; functions are named ``module:function`` so that their packages load only when needed.

    Args:
        prepare: Configuration, training and validation source to network, data module, what the checkpoint keeps
            (``task``, ``model`` and ``data`` among it) and the number of outputs.
        evaluate: Run, overrides and ``averaged`` to a result of plain values, written below the run as well.
        table: Such a result to the text that is printed.
        predict: Parsed arguments of ``visionattn predict`` to the lines that are printed.
        packages: Modules that it needs beyond those of ``[train]``.
        extra: The extra of this package that installs them.
    """

    prepare: str
    evaluate: str
    table: str
    predict: str
    packages: tuple[str, ...]
    extra: str


KINDS = {
    "segmentation": Kind(
        prepare="visionattn.tasks.segmentation_data:prepare_masks",
        evaluate="visionattn.tasks.segmentation_inference:evaluate_masks",
        table="visionattn.tasks.segmentation_report:table",
        predict="visionattn.tasks.segmentation_inference:predict_command",
        packages=("monai", "tifffile", "segmentation_models_pytorch"),
        extra="seg",
    ),
    "semantic": Kind(
        prepare="visionattn.tasks.semantic_data:prepare_labels",
        evaluate="visionattn.tasks.semantic_inference:evaluate_labels",
        table="visionattn.tasks.semantic_report:table",
        predict="visionattn.tasks.semantic_inference:predict_command",
        packages=("monai", "tifffile", "segmentation_models_pytorch"),
        extra="seg",
    ),
    "scanpath": Kind(
        prepare="visionattn.tasks.scanpath_data:prepare_scanpaths",
        evaluate="visionattn.tasks.scanpath_inference:evaluate_scanpaths",
        table="visionattn.tasks.scanpath_report:table",
        predict="visionattn.tasks.scanpath_inference:predict_command",
        packages=("multimatch_gaze", "rapidfuzz"),
        extra="gaze",
    ),
    "detection": Kind(
        prepare="visionattn.tasks.detection_data:prepare_objects",
        evaluate="visionattn.tasks.detection_inference:evaluate_objects",
        table="visionattn.tasks.detection_report:table",
        predict="visionattn.tasks.detection_inference:predict_command",
        packages=("pycocotools",),
        extra="det",
    ),
    "hull": Kind(
        prepare="visionattn.tasks.hull:prepare_hulls",
        evaluate="visionattn.tasks.hull_inference:evaluate_hulls",
        table="visionattn.tasks.hull_inference:table",
        predict="visionattn.tasks.hull_inference:predict_command",
        packages=("scipy",),
        extra="gaze",
    ),
    "grounding": Kind(
        prepare="visionattn.tasks.grounding_data:prepare_questions",
        evaluate="visionattn.tasks.grounding_inference:evaluate_questions",
        table="visionattn.tasks.grounding_report:table",
        predict="visionattn.tasks.grounding_inference:predict_command",
        packages=("monai", "tifffile", "skimage"),
        extra="ground",
    ),
}
"""All but classification, which the commands know themselves."""


def function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def kind_of(run: str | Path) -> str:
    """The kind of a run's folder or checkpoint; classification where there is none that says otherwise.

    Raises:
        ImportError: Packages of that kind are missing.
    """
    path = Path(run)
    path = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if not path.is_file():
        return "classification"
    try:
        _files.check_archive(path)
        found = torch.load(path, map_location="cpu", weights_only=True)["hyper_parameters"].get("task")
    except Exception:  # loading it says what is wrong with it
        return "classification"
    if found not in KINDS:
        return "classification"
    missing = [name for name in KINDS[found].packages if find_spec(name) is None]
    if missing:
        install = f'pip install "visionattn[{KINDS[found].extra}]"'
        raise ImportError(f"{run} is of the task {found} ({', '.join(missing)} missing): {install}")
    return found
