"""One hook for every picture of what a model looks at: run the model once, then ask."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.explain.attention import ADAPTERS, Attention
from visionattn.explain.grid import Grid


@dataclass
class Call:
    """One call of a watched module: its name in the model, its inputs and its output."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    output: Tensor


class Recording:
    """What the watched modules of a model were given and gave, and what follows from it.

    Everything is computed when it is asked for, from the model's present weights: do not train in between.

    Attributes:
        image: Images of the call, ``[B, C, H, W]``; None before the model ran.
        calls: Calls of the watched modules in their order.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.image: Tensor | None = None
        self.calls: list[Call] = []

    def grid(self, stage: int, size: tuple[int, int]) -> Grid:
        """Where the pixels of a stage's map lie in the image.

        Args:
            stage: Stage, counted from 1.
            size: Height and width of the map.

        Raises:
            ValueError: The model has not run.
        """
        height, width = self._ran().shape[2:]
        return Grid((height, width), stage_stride(self.model, stage) or max(1, round(height / size[0])))

    @torch.no_grad()
    def attention(self) -> list[Attention]:
        """Attention over pixels of every layer that has it, in the order of computation.

        Raises:
            ValueError: The model has not run.
        """
        self._ran()
        found = []
        for call in self.calls:
            adapter = ADAPTERS.get(type(call.module))
            if adapter is None:
                continue
            x = _full_precision(call.inputs[0])
            expected, start = _full_precision(call.output), 0
            with torch.autocast(x.device.type, enabled=False):
                for part in adapter(call.module, x, *call.inputs[1:]):
                    width = part.pop("width", expected.shape[-1])
                    make = part.pop("make", Attention)
                    own = expected[..., start : start + width]
                    found.append(make(layer=call.name, stage=stage_of(call.name), expected=own, **part))
                    start += width
        return found

    def _ran(self) -> Tensor:
        if self.image is None:
            raise ValueError("nothing was recorded: call the model inside `with record(model) as maps:`")
        return self.image


def stage_of(name: str) -> int:
    """Stage of a module by its name, counted from 1; 0 for modules outside the stages."""
    found = re.search(r"(?:^|\.)stages[._](\d+)(?:\.|$)", name)
    return int(found[1]) + 1 if found else 0


def stage_stride(model: nn.Module, stage: int) -> int:
    """Pixels of the image per pixel of a stage's map, as the model's ``feature_info`` says; 0 if it does not."""
    info = getattr(model, "feature_info", None)
    rows = getattr(info, "info", info)
    if stage < 1 or not rows or len(rows) < stage:
        return 0
    return int(rows[stage - 1]["reduction"])


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Watch the attention and gates of a model while it runs.

    Nothing is read out of the kernels: the inputs of the modules are kept, and weights are recomputed from them with
    the modules' own projections. So it works with whatever operators run, and costs little before something is asked.
    Recomputation is in float32 at least; what runs under autocast or in half precision may route between nearly equal
    regions otherwise. Of several calls inside the block the last one is kept.

    Args:
        model: A backbone of this package, or a module that holds one. Not compiled or scripted.

    Yields:
        The recording, filled when the model runs inside the block.

    Raises:
        ValueError: A compiled or scripted model.

    Example:
        >>> with record(model) as maps:
        ...     model(image)
        >>> maps.attention()[0].at(row=3, column=5)  # [B, heads, H, W]
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} is compiled or scripted and runs no hooks; record the model that it was made from"
        )
    recording, handles = Recording(model), []

    def start(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        recording.calls.clear()
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor)]
        recording.image = tensors[0].detach() if tensors else None

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            kept = tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
            recording.calls.append(Call(name, module, kept, output.detach()))

        return hook

    try:
        handles.append(model.register_forward_pre_hook(start, with_kwargs=True))
        for name, module in model.named_modules():
            if type(module) in ADAPTERS:
                handles.append(module.register_forward_hook(keep(name)))
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
