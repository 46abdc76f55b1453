"""Speed and memory of whole models side by side: inference, feature maps, and steps of training."""

import logging
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visionattn
from visionattn.tasks.benchmark_heads import head_loss, head_network, is_detector
from visionattn.tasks.benchmark_plot import check_plot, plot_models
from visionattn.tasks.records import ORIGIN, markdown, origin
from visionattn.tasks.row_files import row_file
from visionattn.tasks.timing import capture, times_in_turn

_logger = logging.getLogger("visionattn")
FOLDED = ":folded"
MODES = ("inference", "training", "features")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SETTINGS = ("batch", "rounds", "dtype", "autocast", "channels_last", "compile", "cuda_graph", "model_kwargs")
_PERCENTILES = dict(median_ms=50, p90_ms=90, p99_ms=99, fastest_ms=0)
_FACTS = ("one_image_ms", "peak_gib", "parameters_m", "gmacs")
_FIGURES = (*_PERCENTILES, "images_per_s", *_FACTS)
COLUMNS = ("model", "mode", "height", "width", *_SETTINGS, *_FIGURES)


@dataclass(frozen=True)
class Settings:
    """How models are timed.

    Args:
        modes: Of ``MODES``; ``features`` is the forward pass of ``features_only=True``.
        batch: Images at once.
        size: Height and width of the images in pixels; each model's own by default.
        rounds: Times that each step is timed, after five for warming up.
        device: ``cpu`` or ``cuda``.
        dtype: Of ``DTYPES``.
        autocast: Keep the weights in float32 and let autocast choose; else weights and images have ``dtype``.
        channels_last: Memory format of weights and images; by default only on a CUDA device.
        compile: Mode of ``torch.compile``, of ``COMPILE_MODES``, for each size anew; not compiled without one.
        cuda_graph: Replay steps from a CUDA graph, those of training with their backward pass and optimizer.
        model_kwargs: Further arguments of every model.

    Raises:
        ValueError: An unknown mode, a number that is not positive, no CUDA device, or a graph without one.
    """

    modes: tuple[str, ...] = ("inference",)
    batch: int = 1
    size: tuple[int, int] | None = None
    rounds: int = 30
    device: str = "cpu"
    dtype: str = "fp32"
    autocast: bool = True
    channels_last: bool | None = None
    compile: str | None = None
    cuda_graph: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := [mode for mode in self.modes if mode not in MODES]:
            raise ValueError(f"unknown mode {unknown[0]!r}; choose of {','.join(MODES)}")
        if self.batch < 1 or self.rounds < 1 or min(self.size or (1,)) < 1:
            raise ValueError(f"batch {self.batch}, rounds {self.rounds} and size {self.size} must be at least 1")
        if self.compile and self.compile not in COMPILE_MODES:
            raise ValueError(f"compile={self.compile!r} is not a mode of torch.compile; use {', '.join(COMPILE_MODES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no CUDA device; use --device cpu")
        if self.cuda_graph and self.device != "cuda":
            raise ValueError("--cuda-graph needs --device cuda; leave it out")
        if self.channels_last is None:
            object.__setattr__(self, "channels_last", self.device == "cuda")

    @property
    def memory_format(self) -> torch.memory_format:
        """Order of weights and images in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def weights_dtype(self) -> torch.dtype:
        """Type of weights and images."""
        return torch.float32 if self.autocast else DTYPES[self.dtype]

    def cast(self) -> torch.autocast:
        """Autocast, if it was chosen."""
        mixed = self.autocast and self.dtype != "fp32"
        return torch.autocast(self.device, dtype=DTYPES[self.dtype] if mixed else None, enabled=mixed)


def _create(text: str, mode: str, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model in its mode, and the shape of its images."""
    network, shape = _headed(text, mode, settings) or _classifier(text, mode, settings)
    network = network.train(mode == "training")
    return network.to(settings.device, settings.weights_dtype, memory_format=settings.memory_format), shape


def _headed(text: str, mode: str, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]] | None:
    found = head_network(text, settings.model_kwargs)
    if found and mode == "features":
        raise ValueError(f"{text} has a head; leave out the mode features")
    return found and (found[0], (3, *(settings.size or found[1])))


def _classifier(text: str, mode: str, settings: Settings) -> tuple[nn.Module, tuple[int, int, int]]:
    name = text.removesuffix(FOLDED)
    if text != name and mode == "training":
        raise ValueError(f"{text} is a form for inference; leave out {FOLDED} for training")
    cfg = timm.get_pretrained_cfg(name.split(".")[0])  # an unknown tag is named below
    kwargs = dict(settings.model_kwargs)
    if settings.size and cfg is not None and cfg.fixed_input_size:
        kwargs["img_size"] = settings.size
    if mode == "features":
        kwargs["features_only"] = True
    try:
        model: Any = visionattn.create_model(name, **kwargs)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} does not take {kwargs}: {error}") from error
    if text != name:
        model = reparameterize_model(model.eval())
    channels, *own = model.pretrained_cfg["input_size"]
    return model, (channels, *(settings.size or own))


def _classification_loss(classes: int, images: Tensor) -> Callable[[Any], Tensor]:
    labels = torch.randint(classes, (len(images),), device=images.device)

    def loss(output: Any) -> Tensor:
        outputs = output if isinstance(output, tuple) else (output,)  # some have further classifiers
        return torch.stack([F.cross_entropy(x, labels) for x in outputs]).sum()

    return loss


def _step(model: Any, mode: str, images: Tensor, settings: Settings, text: str = "") -> Callable[[], object]:
    """What is timed: a forward pass, or a step of training with its loss and AdamW."""

    def infer() -> object:
        with torch.inference_mode(), settings.cast():
            return model(images)

    if mode != "training":
        return infer
    cuda = settings.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), fused=cuda, capturable=settings.cuda_graph)
    if hasattr(model, "pretrained_cfg"):
        loss_of = _classification_loss(model.num_classes, images)
    else:
        loss_of = head_loss(text, (torch.rand_like(images[:, :1], dtype=torch.float32) > 0.5).float())

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with settings.cast():
            loss = loss_of(model(images))
        loss.backward()
        optimizer.step()

    return train


def _replay(graph: torch.cuda.CUDAGraph, step: object) -> None:
    """Replay a graph of ``step``, which holds the tensors that the graph works on."""
    graph.replay()


def macs(model: nn.Module, size: tuple[int, int, int]) -> float:
    """Multiply-adds of the convolutions, products and attention for one image ``[C, H, W]``; model on ``meta``."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops() / 2


def _peak_gib(step: Callable[[], object], before: int) -> float:
    """Peak memory of a step beyond ``before`` bytes: with weights, images and, in training, the optimizer's state."""
    for _ in range(2):  # compiles, chooses kernels, makes the optimizer's state
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def _prepare(text: str, mode: str, settings: Settings) -> tuple[dict[int, Callable[[], object]], dict[str, Any]]:
    """Steps by number of images, which is one as well for inference, and what is known of the model without a clock.

    Raises:
        ValueError: The model does not take the arguments, the size or the batch.
    """
    cuda = settings.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    model, shape = _create(text, mode, settings)
    images = torch.randn(settings.batch, *shape, device=settings.device, dtype=settings.weights_dtype)
    images = images.contiguous(memory_format=settings.memory_format)
    facts: dict[str, Any] = dict(model=text, mode=mode, height=shape[1], width=shape[2])
    facts["parameters_m"] = sum(p.numel() for p in model.parameters()) / 1e6
    runner = torch.compile(model, dynamic=False, mode=settings.compile) if settings.compile else model
    numbers = {settings.batch} if mode == "training" else {settings.batch, 1}
    steps = {n: _step(runner, mode, images[:n], settings, text) for n in numbers}
    try:
        if cuda:
            facts["peak_gib"] = _peak_gib(steps[settings.batch], before)
        else:
            steps[settings.batch]()
        if settings.cuda_graph:
            steps = {n: partial(_replay, capture(step), step) for n, step in steps.items()}
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{text} cannot do {mode} of {settings.batch} images of {shape}: {error}") from error
    if mode != "training":
        with suppress(RuntimeError):  # not every model of timm runs on it
            facts["gmacs"] = macs(deepcopy(model).float().to("meta"), shape) / 1e9
    return steps, facts


def _rows(names: list[str], mode: str, settings: Settings) -> list[dict[str, Any]]:
    """Figures of every model in one mode."""
    prepared = {}
    for name in names:
        start = time.perf_counter()
        prepared[name] = _prepare(name, mode, settings)  # compiles kernels, which can take minutes the first time
        _logger.info("%s, %s: ready after %.0f s", name, mode, time.perf_counter() - start)
    calls = {(name, n): step for name, (steps, _) in prepared.items() for n, step in steps.items()}
    seconds = times_in_turn(calls, settings.rounds, settings.device, report=partial(_logger.info, "%s: %s", mode))
    rows = []
    for name, (_, facts) in prepared.items():
        batch = seconds[name, settings.batch]
        row = {key: getattr(settings, key) for key in _SETTINGS} | facts
        row["model_kwargs"] = " ".join(f"{key}={value}" for key, value in settings.model_kwargs.items())
        row |= {key: 1e3 * float(np.percentile(batch, q)) for key, q in _PERCENTILES.items()}
        row["images_per_s"] = settings.batch / statistics.median(batch)
        _logger.info("%s, %s: %.0f images/s", name, mode, row["images_per_s"])
        if (name, 1) in seconds:
            row["one_image_ms"] = 1e3 * statistics.median(seconds[name, 1])
        rows.append({key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()})
    return rows


def _table(rows: list[dict[str, Any]], settings: Settings, where: dict[str, str]) -> str:
    """Rows of ``COLUMNS`` as Markdown; speeds beside that of the first model in the same mode."""
    first: dict[str, float] = {}
    lines = []
    for row in rows:
        ratio = first.setdefault(row["mode"], row["median_ms"]) / row["median_ms"]
        times = *(f"{row[key]:.2f}" for key in _PERCENTILES), f"{row['images_per_s']:.1f}", f"{ratio:.2f}"
        facts = [f"{row[key]:.2f}" if key in row else "-" for key in _FACTS]
        lines.append([f"`{row['model']}`", row["mode"], f"{row['height']}x{row['width']}", *times, *facts])
    columns = (
        "",
        "mode",
        "pixels",
        "median ms",
        "p90 ms",
        "p99 ms",
        "fastest ms",
        "images/s",
        "times as fast as the first",
    )
    table = markdown((*columns, "ms for one image", "peak GiB", "M parameters", "GMACs"), lines)
    words = [f"Batch {settings.batch}", settings.dtype if settings.autocast else f"{settings.dtype} weights"]
    words += [key.replace("_", " ") for key in ("channels_last", "cuda_graph") if getattr(settings, key)]
    words += [f"compiled ({settings.compile})"] if settings.compile else []
    words += [f"{key}={value}" for key, value in settings.model_kwargs.items()]
    versions = f"PyTorch {where['torch']}, timm {where['timm']}, Python {where['python']}"
    return f"{table}\n\n{', '.join(words)}, {where['device']}, {settings.rounds} rounds in turn; {versions}."


def benchmark_models(
    names: list[str], settings: Settings, path: Path | None = None, form: str | None = None, plot: Path | None = None
) -> str:
    """Time models in turn.

    Args:
        names: Names of timm or this package; ``NAME:folded`` for the form of ``timm.utils.reparameterize_model``;
            networks with heads as ``head_network`` takes them.
        settings: Modes, sizes and types.
        path: File to append to, row by row.
        form: Its format, as ``row_file`` takes it; by default that of its suffix.
        plot: Picture to draw.

    Returns:
        A Markdown table.

    Raises:
        ValueError: An unknown model, format or suffix, a model that does not take the arguments or sizes, or a file
            with other columns.
    """
    # convolutions are chosen by trying where sizes never change; a detector's objects are as many as it finds
    torch.backends.cudnn.benchmark = not any(is_detector(name) for name in names)
    file, where, rows = row_file(path, (*COLUMNS, *ORIGIN), form), origin(settings.device), []
    if plot:
        check_plot(plot)
    for mode in settings.modes:
        for row in _rows(names, mode, settings):
            file.append(row | where)
            rows.append(row)
    table = _table(rows, settings, where)
    if plot:
        plot_models(rows, table.rpartition("\n")[2], plot)
    return table
