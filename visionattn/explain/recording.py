"""One hook for every picture of what a model looks at: run the model once, then ask."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.explain._adapters import ADAPTERS, KERNELS, channel_mixing
from visionattn.explain.attention import Attention, ChannelMixing, DynamicKernels
from visionattn.explain.gates import CHANNEL_GATES, GATES, Gate, whole_module
from visionattn.explain.grid import Grid
from visionattn.models.davit import ChannelAttention
from visionattn.models.overlock import DynamicConvBlock, OverviewStage


@dataclass
class Watched:
    """A module that a recording watches.

    Args:
        name: Name in the model.
        module: The module.
        role: ``attention``, ``kernels``, ``channels``, ``gate``, ``channel gate`` or ``context``.
        adapter: What turns module and inputs into what was asked.
    """

    name: str
    module: nn.Module
    role: str
    adapter: Callable[..., Any]

    @property
    def stage(self) -> int:
        """Stage of the module by its name, counted from 1; 0 for modules outside the stages."""
        found = re.search(r"(?:^|\.)stages[._](\d+)(?:\.|$)", self.name)
        return int(found[1]) + 1 if found else 0


@dataclass
class Call:
    """One call of a watched module.

    Args:
        watched: The module.
        inputs: Its positional inputs.
        output: Its output; of a list of maps all of them.
    """

    watched: Watched
    inputs: tuple[Any, ...]
    output: Any


def watched_modules(model: nn.Module) -> list[Watched]:
    """Modules of a model that a recording watches, in their order in the model."""
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind in ADAPTERS:
            found.append(Watched(name, module, "attention", ADAPTERS[kind]))
        elif kind in KERNELS:
            found.append(Watched(name, module, "kernels", KERNELS[kind]))
        elif kind is ChannelAttention:
            found.append(Watched(name, module, "channels", channel_mixing))
        elif kind is OverviewStage:
            found.append(Watched(f"{name}.context", module, "context", lambda module, maps: maps[1]))
        elif kind is DynamicConvBlock:
            found.append(Watched(f"{name}.gate", module.gate, "gate", whole_module))
        elif kind in CHANNEL_GATES:
            found.append(Watched(name, module, "channel gate", CHANNEL_GATES[kind]))
        elif kind in GATES:
            found.append(Watched(name, module, "gate", GATES[kind]))
    return found


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
        self._ran()
        assert self.image is not None
        height, width = self.image.shape[2:]
        return Grid((height, width), stage_stride(self.model, stage) or max(1, round(height / size[0])))

    def attention(self) -> list[Attention]:
        """Attention between pixels of every layer that has it, in the order of computation.

        Raises:
            ValueError: The model has not run, or was put into training mode.
        """
        return [part for call in self._of("attention") for part in self._parts(call, lambda x: x)]

    def kernels(self) -> list[DynamicKernels]:
        """Kernels of dynamic convolutions, small and large ones, in the order of computation.

        Raises:
            ValueError: As for ``attention``.
        """
        parts = [part for call in self._of("kernels") for part in self._parts(call, lambda x: x.permute(0, 2, 3, 1))]
        return [part for part in parts if isinstance(part, DynamicKernels)]

    @torch.no_grad()
    def channels(self) -> list[ChannelMixing]:
        """Attention between channels, in the order of computation.

        Raises:
            ValueError: As for ``attention``.
        """
        found = []
        for call in self._of("channels"):
            x = _full_precision(call.inputs[0])
            with torch.autocast(x.device.type, enabled=False):
                parts = call.watched.adapter(call.watched.module, x)
            expected = _full_precision(call.output)
            found.append(ChannelMixing(call.watched.name, call.watched.stage, expected=expected, **parts))
        return found

    @torch.no_grad()
    def gates(self) -> list[Gate]:
        """Gates of channels and pixels, in the order of computation, computed in the precision of the weights.

        Raises:
            ValueError: As for ``attention``.
        """
        found = []
        for call in self._of("gate", "channel gate"):
            watched, x = call.watched, call.inputs[0]
            parameter = next(watched.module.parameters(), x)
            with torch.autocast(x.device.type, enabled=False):
                values = watched.adapter(watched.module, x.to(parameter.dtype))
            found.append(Gate(watched.name, watched.stage, values))
        return found

    def context(self) -> list[tuple[str, Tensor]]:
        """Names and maps ``[B, K, h, w]`` of the contexts that a network makes first (OverLoCK's one).

        Raises:
            ValueError: As for ``attention``.
        """
        return [(c.watched.name, c.watched.adapter(c.watched.module, c.output)) for c in self._of("context")]

    @torch.no_grad()
    def _parts(self, call: Call, channels_last: Callable[[Tensor], Tensor]) -> list[Attention]:
        inputs = [_full_precision(x) if isinstance(x, Tensor) else x for x in call.inputs]
        expected, start, found = channels_last(_full_precision(call.output)), 0, []
        with torch.autocast(expected.device.type, enabled=False):
            for part in call.watched.adapter(call.watched.module, *inputs):
                width = part.pop("width", expected.shape[-1])
                own = expected[..., start : start + width]
                make = part.pop("make", Attention)
                found.append(make(layer=call.watched.name, stage=call.watched.stage, expected=own, **part))
                start += width
        return found

    def _of(self, *roles: str) -> list[Call]:
        self._ran()
        return [call for call in self.calls if call.watched.role in roles]

    def _ran(self) -> None:
        if self.image is None:
            raise ValueError("nothing was recorded: call the model inside `with record(model) as maps:`")
        if self.model.training:
            raise ValueError("the model was put into training mode; call model.eval() first")


def stage_stride(model: nn.Module, stage: int) -> int:
    """Pixels of the image per pixel of a stage's map by ``feature_info`` of it or its backbone; 0 without one."""
    for module in model.modules():
        info = getattr(module, "feature_info", None)
        rows = getattr(info, "info", info)
        if rows and 1 <= stage <= len(rows):
            return int(rows[stage - 1]["reduction"])
    return 0


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Watch attention, gates and dynamic kernels of a model while it runs.

    Nothing is read out of the operators: the inputs of the modules are kept, and weights are recomputed from them with
    the modules' own projections. So it works with whatever kernels run, and costs little before something is asked.
    Recomputation is in float32 at least; what runs under autocast or in half precision may route between nearly equal
    regions otherwise. Of several calls inside the block the last one is kept.

    Args:
        model: A backbone of this package, or a module that holds one, in evaluation mode; not compiled or scripted.

    Yields:
        The recording, filled when the model runs inside the block.

    Raises:
        ValueError: A compiled or scripted model, or one in training mode.

    Example:
        >>> with torch.no_grad(), record(model) as maps:
        ...     model(image)
        >>> maps.attention()[0].at(row=3, column=5)  # [B, heads, H, W]
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{type(model).__name__} is compiled or scripted and runs no hooks; record the model that it was made from"
        )
    recording, handles = Recording(model), []

    def start(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module.training:
            raise ValueError("only a model in evaluation mode can be recorded; call model.eval() first")
        recording.calls.clear()
        tensors = [x for x in (*inputs, *named.values()) if isinstance(x, Tensor)]
        recording.image = tensors[0].detach() if tensors else None

    def keep(watched: Watched) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            recording.calls.append(Call(watched, _detached(inputs), _detached(output)))

        return hook

    try:
        handles.append(model.register_forward_pre_hook(start, with_kwargs=True))
        for watched in watched_modules(model):
            handles.append(watched.module.register_forward_hook(keep(watched)))
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _detached(x: Any) -> Any:
    """Tensors without their graph, also inside lists."""
    if isinstance(x, Tensor):
        return x.detach()
    return tuple(_detached(y) for y in x) if isinstance(x, list | tuple) else x


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
