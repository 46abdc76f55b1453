"""Export of backbones and runs, compared with the model itself before a file is kept."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.utils import reparameterize_model
from torch import Tensor, nn

import visionattn
from visionattn._writing import replaced
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.checkpoints import full_name, sha256
from visionattn.tasks.config import write_text
from visionattn.tasks.export_formats import FREE, INPUT, OPSET, OUTPUT, WRITERS, Runner, weights_digest
from visionattn.tasks.inference import load_model, load_run, read_checkpoint
from visionattn.tasks.kinds import kind_of
from visionattn.tasks.networks import TIMM

TASKS = ("classification", "segmentation")
ORIGINS = ("published", "file", "random", "run")
TOLERANCE = 1e-3
_STATED = {"_target_", "model_name", "num_classes", "in_chans", "aux_head"}  # elsewhere, or of training alone
_WEIGHTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "onnxscript")


@dataclass
class Exportable:
    """A network with what a server needs to know of it.

    Args:
        name: Model or decoder and backbone.
        task: One of ``TASKS``.
        model: In evaluation mode, on the CPU; one tensor of logits from ``[B, C, H, W]``.
        classes: Names in the order of the logits.
        size: Height and width in pixels of the images that it was made for.
        fixed: Whether images of other sizes are refused.
        preprocessing: How a picture becomes the input.
        checkpoint: File of the weights, if it is known.
        threshold: Of a mask of one class: probability from which a pixel belongs to it.
        weights: Where they come from, one of ``ORIGINS``.
        arguments: Of ``timm.create_model`` beyond name, weights, classes and channels; None where it cannot build the
            network.
    """

    name: str
    task: str
    model: nn.Module
    classes: list[str]
    in_chans: int
    size: tuple[int, int]
    fixed: bool
    preprocessing: dict[str, Any]
    checkpoint: str | None = None
    threshold: float | None = None
    weights: str = "run"
    arguments: dict[str, Any] | None = None

    def resized(self, size: tuple[int, int]) -> "Exportable":
        """The same network for images of another height and width in pixels, as its preprocessing then makes them."""
        if size == self.size:
            return self
        change: dict[str, Any] = {}
        if self.task == "classification":
            change = dict(input_size=[self.in_chans, *size])
        elif self.preprocessing.get("resize"):
            change = dict(resize=list(size))
        return replace(self, size=size, preprocessing=self.preprocessing | change)


class _FirstOutput(nn.Module):
    """Networks for masks may return further outputs for their losses."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        output = self.network(images)
        return output[0] if isinstance(output, tuple) else output


def from_name(name: str, checkpoint: str | None = None, random_weights: bool = False) -> Exportable:
    """A model of timm or this package.

    Args:
        name: With or without a tag.
        checkpoint: File of weights; the published ones by default.
        random_weights: Take none.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: An unknown name, no published weights, or weights that do not fit.
    """
    if random_weights and checkpoint:
        raise ValueError("--random-weights and --checkpoint exclude each other")
    if random_weights:
        model: Any = visionattn.create_model(name).eval()
        classes = [str(i) for i in range(model.num_classes)]
        return _classifier(full_name(model), model, classes, resolve_model_data_config(model), None, "random", {})
    try:
        loaded = load_model(name, checkpoint)
    except ValueError as error:
        if "No pretrained weights" not in str(error):
            raise
        raise ValueError(f"{error}; give --checkpoint FILE, or --random-weights to try the format") from error
    weights = "file" if checkpoint else "published"
    return _classifier(loaded.name, loaded.model, loaded.classes, loaded.data_config, checkpoint, weights, {})


def _classifier(
    name: str,
    model: Any,
    classes: list[str],
    data: dict[str, Any],
    checkpoint: str | None,
    weights: str,
    arguments: dict[str, Any] | None,
) -> Exportable:
    channels, height, width = data["input_size"]
    cfg = getattr(getattr(model, "backbone", model), "pretrained_cfg", None) or {}
    return Exportable(
        name=name,
        task="classification",
        model=model,
        classes=classes,
        in_chans=channels,
        size=(height, width),
        fixed=bool(cfg.get("fixed_input_size")),
        preprocessing={key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
        checkpoint=checkpoint,
        weights=weights,
        arguments=arguments,
    )


def _arguments(run: str | Path) -> dict[str, Any] | None:
    """``Exportable.arguments`` of a run of classification."""
    _, hparams, _ = read_checkpoint(run, averaged=None)
    model = dict(hparams["model"])
    if model.get("_target_", TIMM) != TIMM:
        return None
    return {k: v for k, v in model.items() if k not in _STATED | _WEIGHTS and v is not None}


def from_run(run: str | Path, averaged: bool | None = None) -> Exportable:
    """The best checkpoint of a run of a task of ``TASKS``.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: As in ``load_run``.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is of another task, or damaged.
        ImportError: Packages of its task are missing.
    """
    task = kind_of(run)
    if task == "classification":
        loaded = load_run(run, averaged)
        how = loaded.data_config
        arguments = _arguments(run)
        return _classifier(loaded.name, loaded.model, loaded.classes, how, loaded.checkpoint, "run", arguments)
    if task != "segmentation":
        raise ValueError(f"{run} is of the task {task}; runs of {' and '.join(TASKS)} can be exported")
    from visionattn.tasks.segmentation_inference import load_masker

    masker = load_masker(run, averaged)
    transform = SegmentationTransform(**masker.transform, train=False)
    mean, std = transform.statistics(masker.in_chans)
    how = dict(
        mean=mean,
        std=std,
        intensity=transform.intensity,
        resize=transform.size if transform.resizes else None,
        window=masker.window,
    )
    size = (int(transform.size[0]), int(transform.size[1]))
    model = _FirstOutput(masker.model.cpu()).eval()
    threshold = masker.threshold if len(masker.classes) == 2 else None
    return Exportable(
        masker.name, task, model, masker.classes, masker.in_chans, size, False, how, masker.checkpoint, threshold
    )


@dataclass(frozen=True)
class Difference:
    """How far a file's outputs are from the model's."""

    largest: float
    relative: float
    """In units of the RMS of the model's outputs."""
    shapes: list[list[int]]


@torch.no_grad()
def compare(
    model: Callable[[Tensor], Tensor], other: Runner, shapes: Sequence[Sequence[int]], seed: int = 0
) -> Difference:
    """Run both on the same random images of every shape ``[B, C, H, W]``.

    Raises:
        ValueError: The other cannot run a shape, or its output has another shape or is not finite.
    """
    generator, largest, relative = torch.Generator().manual_seed(seed), 0.0, 0.0
    for shape in shapes:
        images = torch.randn(tuple(shape), generator=generator)
        expected = model(images)
        try:
            found = other(images)
        except Exception as error:  # runtimes raise their own types
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"what was exported fails for images of {list(shape)}: {reason}") from error
        if found.shape != expected.shape:
            raise ValueError(
                f"what was exported gives {list(found.shape)} for {list(shape)}, expected {list(expected.shape)}"
            )
        error_here = float((found - expected).abs().max())
        if not math.isfinite(error_here):
            raise ValueError(f"what was exported gives values that are not finite for images of {list(shape)}")
        largest = max(largest, error_here)
        relative = max(relative, error_here / max(float(expected.square().mean().sqrt()), 1e-12))
    return Difference(largest, relative, [list(shape) for shape in shapes])


def folded(model: nn.Module, shape: Sequence[int], tolerance: float = TOLERANCE) -> tuple[nn.Module, bool]:
    """The model's form for inference, and whether that is another than its trained one.

    Raises:
        ValueError: The two give different outputs.
    """
    before = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    form = reparameterize_model(model)
    if {key: tuple(x.shape) for key, x in form.state_dict().items()} == before:
        return model, False
    found = compare(model, form, [shape])
    if found.relative > tolerance:
        raise ValueError(f"the folded form differs from the trained one by {found.relative:.1e} of the outputs' RMS")
    return form, True


def shapes_to_check(free: str, batch: int, channels: int, size: tuple[int, int]) -> list[list[int]]:
    """Shapes at which a file is compared: its own, and of what is free other batches, odd and larger sizes."""
    height, width = size
    shapes = [[batch, channels, height, width]]
    if free != "none":
        shapes += [[n, channels, height, width] for n in (1, 3) if n != batch]
    if free == "all":
        odd = (height - height // 4) | 1, (width + width // 4) | 1
        shapes += [[1, channels, *odd], [3, channels, width + 7, height], [1, channels, height + 32, width + 64]]
    return shapes


def _versions() -> dict[str, str]:
    found = {"visionattn": visionattn.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Settings:
    """How a model is exported.

    Args:
        format: Key of ``WRITERS``.
        free: Key of ``FREE``: the axes whose sizes stay open.
        size: Height and width in pixels; the model's own by default.
        batch: Images at once; what is traced with, where the batch is free (then at least 2).
        tolerance: Largest difference to the model that is accepted, in units of the RMS of its outputs.

    Raises:
        ValueError: An unknown format, or a number that is not positive.
    """

    format: str = "onnx"
    free: str = "none"
    size: tuple[int, int] | None = None
    batch: int = 1
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.format not in WRITERS or self.free not in FREE:
            raise ValueError(
                f"format={self.format}, free={self.free}: choose of {', '.join(WRITERS)}; {', '.join(FREE)}"
            )
        if self.batch < 1 or min(self.size or (1,)) < 1 or self.tolerance <= 0:
            raise ValueError(f"batch {self.batch}, size {self.size} and tolerance {self.tolerance} must be positive")


def _of_size(network: Exportable, settings: Settings) -> Exportable:
    size = settings.size or network.size
    if network.fixed and (settings.free == "all" or size != network.size):
        own = "x".join(map(str, network.size))
        raise ValueError(
            f"{network.name} takes images of {own} pixels only; leave out --size, and of --dynamic take batch"
        )
    return network.resized(size)


def facts_of(network: Exportable, settings: Settings, is_folded: bool, file: str) -> dict[str, Any]:
    """What lies in and beside a file: input, output, classes, preprocessing, versions and digest of the weights."""
    axes: list[Any] = [settings.batch, network.in_chans, *network.size]
    for axis in FREE[settings.free]:
        axes[axis] = {0: "batch", 2: "height", 3: "width"}[axis]
    facts: dict[str, Any] = dict(
        name=network.name,
        task=network.task,
        format=settings.format,
        form="folded" if is_folded else "trained",
        input=dict(name=INPUT, dtype="float32", layout="NCHW", shape=axes),
        output=dict(
            name=OUTPUT, dtype="float32", meaning="logits", layout="NK" if network.task == TASKS[0] else "NKHW"
        ),
        classes=network.classes,
        preprocessing=network.preprocessing,
        versions=_versions(),
        weights_sha256=sha256(network.checkpoint) if network.checkpoint else weights_digest(network.model),
    )
    if network.threshold is not None:
        facts["threshold"] = network.threshold
    if settings.format == "onnx":
        facts["opset"] = OPSET
    if settings.format == "torch" and settings.free == "all":
        facts["imports"] = ["visionattn"]  # its operators, see ``export_formats.trace``
    if settings.format == "safetensors" and network.arguments is not None:
        sizes = dict(num_classes=len(network.classes), in_chans=network.in_chans)
        # timm drops a classifier, and adapts a first layer, that the configuration of the weights does not state
        overlay = dict(file=file, num_classes=len(network.classes), input_size=[network.in_chans, *network.size])
        call = dict(model_name=network.name, pretrained=True, pretrained_cfg_overlay=overlay)
        facts["create_model"] = call | sizes | network.arguments
    return facts


def export(
    network: Exportable,
    settings: Settings,
    output: str | Path,
    change: Callable[[Path, Exportable], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a file and, beside it, ``FILE.json``; kept only if its outputs are the model's.

    Everything is written under a temporary name, read back and compared at every shape of ``shapes_to_check``; the name
    is changed only after that.

    Args:
        network: From ``from_name`` or ``from_run``.
        settings: Format, sizes and tolerance.
        output: The file.
        change: Rewrites the temporary file after the comparison (8 bits) and returns what to add to the JSON.

    Returns:
        The content of the JSON file.

    Raises:
        ImportError: Packages of the format are missing.
        SavingError: The file cannot be written there.
        ValueError: The model cannot be exported like this, or the file's outputs differ.
    """
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give the name of a file")
    if settings.format == "safetensors" and output.suffix != ".safetensors":
        raise ValueError(f"--output {output}: timm reads safetensors from names that end with .safetensors only")
    network = _of_size(network, settings)
    batch = max(settings.batch, 2) if settings.free != "none" else settings.batch
    shape = (batch, network.in_chans, *network.size)
    model: nn.Module = network.model.eval().requires_grad_(False)
    with replaced(output) as temporary:
        temporary.touch()  # a place that takes no file is named before the work
        keep = settings.format == "safetensors"
        form, is_folded = (model, False) if keep else folded(model, shape, settings.tolerance)
        facts = facts_of(network, settings, is_folded, output.name)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        run = WRITERS[settings.format](form, images, settings.free, temporary, json.dumps(facts))
        found = compare(model, run, shapes_to_check(settings.free, batch, network.in_chans, network.size))
        if found.relative > settings.tolerance:
            raise ValueError(
                f"not kept: the {settings.format} file's outputs differ from the model's by {found.relative:.1e} of "
                f"their RMS (largest difference {found.largest:.1e}), allowed {settings.tolerance:.0e}"
            )
        facts |= dict(largest_difference=found.largest, relative_difference=found.relative, compared_at=found.shapes)
        facts |= change(temporary, network) if change else {}
        facts |= dict(file=output.name, bytes=temporary.stat().st_size, sha256=sha256(temporary))
    write_text(output.with_name(output.name + ".json"), json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return facts
