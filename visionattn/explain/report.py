"""Everything that can be shown of one model and one picture, as figures and arrays in a folder."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visionattn._figures import save_figure
from visionattn._writing import replaced
from visionattn.explain import figures
from visionattn.explain._need import frozen
from visionattn.explain.attention import Attention
from visionattn.explain.class_activation import grad_cam
from visionattn.explain.distance import attention_distances
from visionattn.explain.figures import Panel
from visionattn.explain.grid import check_position
from visionattn.explain.pictures import overlay
from visionattn.explain.receptive_field import receptive_fields
from visionattn.explain.recording import Recording, record, watched_modules
from visionattn.explain.routing import regions_at
from visionattn.layers import RoutingAttention

Found = tuple[Any, dict[str, Any]]  # a figure, and arrays by name


@dataclass
class Subject:
    """What is explained.

    Args:
        model: The model, in evaluation mode.
        image: Normalised image, ``[1, C, H, W]``.
        picture: The same for the eye, ``H`` x ``W``.
        position: Column and row of the chosen position in pixels of ``image``.
        classes: Names of the classes, or none.
        target: Class for Grad-CAM; the most likely one by default.
        samples: Random images for the receptive fields.
    """

    model: nn.Module
    image: Tensor
    picture: Image.Image
    position: tuple[int, int]
    classes: Sequence[str] = ()
    target: int | None = None
    samples: int = 8

    @cached_property
    def recording(self) -> Recording:
        """The recorded call."""
        with torch.no_grad(), record(self.model) as recording:
            self.model(self.image)
        return recording

    def on_picture(self, stage: int, heat: Tensor) -> Image.Image:
        """The picture under a map ``[h, w]`` of a stage."""
        grid = self.recording.grid(stage, (heat.shape[0], heat.shape[1]))
        return overlay(self.picture, grid.spread(heat, shared=False))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _original(subject: Subject) -> Panel:
    return Panel("picture", subject.picture)


def _where(layer: str, stage: int) -> str:
    """A title of two lines: stage, and module inside its backbone."""
    return (f"stage {stage}\n" if stage else "") + figures.inside(layer)


def _routing(subject: Subject) -> Found:
    found, items = {}, [_original(subject)]
    for entry in regions_at(subject.recording, *subject.position):
        boxes = [(box, figures.ROUTED) for box in entry.regions] + [(entry.query, figures.QUERY)]
        items.append(Panel(_where(entry.layer, entry.stage), overlay(subject.picture, entry.mask), boxes))
        found[f"{entry.layer}.mask"] = _array(entry.mask)
        found[f"{entry.layer}.regions"] = np.array(entry.regions)
        found[f"{entry.layer}.query"] = np.array(entry.query)
    caption = (
        "The regions that the region of the chosen position is routed to in each layer, and how the position's own "
        "attention spreads over them (mean of the heads). Outside them it is zero."
    )
    keys = {"its region": figures.QUERY, "regions routed to": figures.ROUTED}
    return figures.panels(items, caption, subject.position, "share of the attention", keys), found


def _maps(subject: Subject, layers: Sequence[Attention], what: str, parts: str) -> Found:
    """Weights of the chosen position over the picture, mean of the layers' ``parts``."""
    found, items = {}, [_original(subject)]
    for layer in layers:
        cell = subject.recording.grid(layer.stage, layer.size).cell(*subject.position, layer.size)
        weights = layer.at(*cell)[0]  # [heads, H, W]
        title = f"stage {layer.stage}, {layer.kind}\n{figures.inside(layer.layer)}"
        items.append(Panel(title, subject.on_picture(layer.stage, weights.abs().mean(0))))
        found[layer.name] = _array(weights)
    return figures.panels(items, what, subject.position, f"weight (mean of the {parts})", {}), found


def _attention(subject: Subject) -> Found:
    layers = subject.recording.attention()
    what = (
        "What the chosen position attends to in each layer (mean of the heads); colours are scaled for each panel. The "
        "arrays hold every head."
    )
    if any(layer.kind == "linear" for layer in layers):
        what += " Of linear attention, whose weights may be negative, sizes are shown."
    return _maps(subject, layers, what, "heads")


def _kernels(subject: Subject) -> Found:
    what = (
        "The kernels that the convolutions make for the chosen position, laid where they are applied (mean of the "
        "groups of channels); colours are scaled for each panel. The arrays hold every group."
    )
    return _maps(subject, subject.recording.kernels(), what, "groups")


def _channels(subject: Subject) -> Found:
    layers = subject.recording.channels()
    matrices = [(_where(layer.layer, layer.stage), _array(layer.weights[0].mean(0))) for layer in layers]
    caption = (
        "Which channels of a group each output channel is mixed from, mean over the groups; one matrix for the whole "
        "picture. The arrays hold every group."
    )
    return figures.matrices_figure(matrices, caption), {layer.layer: _array(layer.weights[0]) for layer in layers}


def _gates(subject: Subject) -> Found:
    found, items = {}, [_original(subject)]
    for gate in subject.recording.gates():
        if gate.map is not None:
            low, high = gate.map[0].min(), gate.map[0].max()
            title = f"stage {gate.stage}, {low:.3g} to {high:.3g}\n{figures.inside(gate.layer)}"
            items.append(Panel(title, subject.on_picture(gate.stage, gate.map[0] - low), marked=False))
            found[gate.layer] = _array(gate.values[0])
    caption = (
        "Gates of pixels: factors on their features; where every channel has its own, the mean of their sizes. Colours "
        "go from the lowest to the highest value of each panel, which its title gives."
    )
    return figures.panels(items, caption, None, "gate", {}, ends=("low", "high")), found


def _channel_gates(subject: Subject) -> Found:
    found = {gate.layer: _array(gate.values[0]) for gate in subject.recording.gates() if gate.map is None}
    caption = "Gates of channels: factors between 0 (closed) and 1 (open) that the picture as a whole sets."
    return figures.curves_figure(list(found.items()), caption), found


def _context(subject: Subject) -> Found:
    found, items = {}, [_original(subject)]
    for name, prior in subject.recording.context():
        stride = subject.recording.grid(4, (prior.shape[2], prior.shape[3]))
        items.append(
            Panel("strength of the context", overlay(subject.picture, stride.spread(prior[0].norm(dim=0), False)))
        )
        colors = stride.spread(torch.from_numpy(_main_colors(_array(prior[0]))), False).permute(1, 2, 0).numpy()
        items.append(Panel("its three main directions\nas red, green, blue", colors))
        found[name] = _array(prior[0])
    caption = (
        "The context that the first look at the picture hands to the second: its size at each pixel of the coarsest "
        "map, and its main directions of change, so that like colours mean like context."
    )
    return figures.panels(items, caption, None, "length of the context vector", {}), found


def _main_colors(x: np.ndarray) -> np.ndarray:
    """``[K, h, w]`` to ``[3, h, w]`` in 0 to 1: projections on the three directions of largest variance."""
    flat = x.reshape(len(x), -1).T.astype(np.float64)
    flat = flat - flat.mean(0)
    parts = flat @ np.linalg.svd(flat, full_matrices=False)[2][:3].T
    low, high = parts.min(0), parts.max(0)
    colors = np.zeros((3, len(flat)))
    colors[: parts.shape[1]] = ((parts - low) / np.maximum(high - low, 1e-12)).T
    return colors.reshape(3, *x.shape[1:])


def _distance(subject: Subject) -> Found:
    distances = attention_distances(subject.recording)
    caption = (
        "How far from a pixel what it attends to lies, mean over the picture; a dot is a head. Bars: the distance if "
        "all pixels of the map counted alike."
    )
    found: dict[str, Any] = {entry.layer: _array(entry.pixels) for entry in distances}
    found["uniform"] = np.array([entry.uniform for entry in distances])
    return figures.distances_figure(distances, caption), found


def _grad_cam(subject: Subject) -> Found:
    found = grad_cam(subject.model, subject.image, subject.target)
    name = subject.classes[found.target] if subject.classes else str(found.target)
    title = f"{name}\n{found.probability:.1%}"
    items = [_original(subject), Panel(title, overlay(subject.picture, found.heat))]
    caption = f"Grad-CAM: where the map of {found.layer} speaks for the class {name!r}."
    arrays = {"heat": _array(found.heat), "target": found.target, "probability": found.probability}
    return figures.panels(
        [Panel(p.title, p.picture, marked=False) for p in items], caption, None, "evidence", {}
    ), arrays


def _receptive_field(subject: Subject) -> Found:
    noise = torch.randn(
        subject.samples, *subject.image.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    fields = receptive_fields(subject.model, noise.to(subject.image))
    caption = (
        f"Effective receptive field of the middle of each map, mean over {subject.samples} random images. Titles: the "
        "share of the gradient in the smallest middle square, and its area over the image's."
    )
    arrays: dict[str, Any] = {f"map{entry.stage}": _array(entry.heat) for entry in fields}
    arrays["shares"] = np.array(list(fields[0].ratios))
    arrays["ratios"] = np.array([list(entry.ratios.values()) for entry in fields])
    return figures.fields_figure(fields, caption), arrays


METHODS: dict[str, Callable[[Subject], Found]] = {
    "routing": _routing,
    "attention": _attention,
    "channels": _channels,
    "kernels": _kernels,
    "context": _context,
    "gates": _gates,
    "channel_gates": _channel_gates,
    "distance": _distance,
    "gradcam": _grad_cam,
    "erf": _receptive_field,
}


def available_methods(model: nn.Module) -> list[str]:
    """Names of what can be shown of a model, in the order of ``METHODS``."""
    watched = watched_modules(model)
    roles = {entry.role for entry in watched}
    has = {
        "routing": any(isinstance(entry.module, RoutingAttention) for entry in watched),
        "attention": "attention" in roles,
        "channels": "channels" in roles,
        "kernels": "kernels" in roles,
        "context": "context" in roles,
        "gates": "gate" in roles,
        "channel_gates": "channel gate" in roles,
        "distance": bool({"attention", "kernels"} & roles),
        "gradcam": bool(getattr(model, "num_classes", 0)) and hasattr(model, "feature_info"),
        "erf": hasattr(model, "forward_intermediates"),
    }
    return [name for name in METHODS if has[name]]


def check_methods(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """The wanted methods, or all that a model has.

    Raises:
        ValueError: An unknown name, a method that the model has not, or a model that has none.
    """
    offered = available_methods(model)
    if wanted is None:
        if not offered:
            raise ValueError(f"{type(model).__name__} holds nothing that can be shown, such as attention or gates")
        return offered
    for name in wanted:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=2) or list(METHODS)
            raise ValueError(f"unknown method {name!r}; did you mean {', '.join(near)}? All: {', '.join(METHODS)}")
        if name not in offered:
            raise ValueError(f"{type(model).__name__} has no {name!r}; it has {', '.join(offered) or 'no method'}")
    return list(dict.fromkeys(wanted))


def explain(
    subject: Subject,
    output: str | Path,
    methods: Sequence[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write figures and arrays.

    Args:
        subject: Model, image and position.
        output: Folder, created if missing; of each method ``METHOD.png`` and ``METHOD.npz``, and ``summary.json``.
        methods: Names of ``METHODS``; all that the model has by default.
        report: Called with a line before each method.

    Returns:
        The files.

    Raises:
        ValueError: Methods that are unknown or that the model has not, a position outside the image, or an image of
            another shape.
        ImportError: A library of the extra ``explain`` is missing.
        SavingError: A file cannot be written.
    """
    if subject.image.dim() != 4 or len(subject.image) != 1:
        raise ValueError(f"one image [1, C, H, W] is explained at a time, got shape {list(subject.image.shape)}")
    if subject.samples < 1:
        raise ValueError(f"samples={subject.samples}: expected at least 1 random image")
    check_position(subject.position, *subject.image.shape[2:])
    names, folder, files = check_methods(subject.model, methods), Path(output), []
    with frozen(subject.model):
        for i, name in enumerate(names):
            report(f"{name} ({i + 1} of {len(names)})")
            figure, arrays = METHODS[name](subject)
            files += [folder / f"{name}.png", folder / f"{name}.npz"]
            save_figure(figure, files[-2])
            figures.save_arrays(arrays, files[-1])
    files.append(folder / "summary.json")
    summary = dict(
        model=type(subject.model).__name__,
        image=list(subject.image.shape[2:]),
        position=list(subject.position),
        methods=names,
    )
    with replaced(files[-1]) as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return files
