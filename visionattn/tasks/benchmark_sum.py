"""Neighbourhood sum, the dynamic convolution of OverLoCK, beside windows in plain PyTorch."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from visionattn.layers import ContextMixing
from visionattn.ops import neighborhood_sum
from visionattn.ops.neighborhood.reference import windows
from visionattn.tasks.network_shapes import stage_modules
from visionattn.tasks.operator_forms import EAGER, OURS, Data, Form, Operator, Prepared, floors_ms, generator, output

WINDOWS = "windows"
NETWORKS = ("overlock_xt", "overlock_t", "overlock_s", "overlock_b")


class Shape(NamedTuple):
    """A call: batch, side of the map, sides of the windows, groups of each kernel, channels of a group."""

    batch: int
    side: int
    kernels: tuple[int, ...]
    groups: int
    dim: int

    def name(self) -> str:
        """The shape in words."""
        kernels = "+".join(map(str, self.kernels))
        return f"B{self.batch} {self.side}x{self.side} kernels {kernels} groups {self.groups}x{self.dim}"


# overlock_t at 224 and 512 pixels
SHAPES = {
    shape.name(): shape
    for shape in (
        Shape(128, 14, (5, 13), 8, 16),
        Shape(128, 7, (5, 7), 16, 16),
        Shape(16, 32, (5, 13), 8, 16),
        Shape(16, 16, (5, 7), 16, 16),
    )
}


def network_shapes() -> dict[str, Shape]:
    """Distinct calls of the published networks at 224 pixels and batch 128, under the first network that makes them."""
    found: dict[Shape, str] = {}
    for where, side, module in stage_modules(NETWORKS, ContextMixing):
        layer = cast(ContextMixing, module)
        dim = cast(nn.Conv2d, layer.query[0]).in_channels // (2 * layer.groups)
        shape = Shape(128, side, (layer.small_kernel, layer.kernel_size), layer.groups, dim)
        found.setdefault(shape, f"{where}: {shape.name()}")
    return {name: shape for shape, name in found.items()}


def ours(data: Data, shape: Shape) -> Prepared:
    """The operator of this package."""
    kernels = list(shape.kernels)
    return Prepared(
        list(data.leaves()), lambda logits, value, *tables: neighborhood_sum(logits, value, kernels, [*tables])
    )


def windows_form(data: Data, shape: Shape) -> Prepared:
    """What one writes without an operator: all windows as copies, a softmax, and a product for every pixel.

    Windows that lie within the map are views; rows and columns near a border then take those of their neighbours.
    """
    logits, value = data.batched
    count, places = len(shape.kernels), []
    for k in shape.kernels:
        near, relative = windows(shape.side, k, 1, value.device)
        entries = relative[:, None, :, None] * (2 * k - 1) + relative[None, :, None, :]  # [H, W, k, k]
        places.append((near[:, 0].contiguous(), entries.flatten(2).permute(2, 0, 1).contiguous()))
    value = value.unflatten(3, (count, shape.groups)).permute(3, 0, 4, 1, 2, 5).contiguous()  # [kernels, B, g, H, W, d]

    def attend(logits: Tensor, value: Tensor, *tables: Tensor) -> Tensor:
        outs = []
        taps = logits.split([k * k for k in shape.kernels], dim=2)
        for k, (start, entries), x, table, v in zip(shape.kernels, places, taps, tables, value, strict=True):
            p = (x + table.to(x.dtype).flatten(1)[:, entries]).softmax(dim=2)  # [B, g, taps, H, W]
            near = v.unfold(2, k, 1).unfold(3, k, 1).index_select(2, start).index_select(3, start)
            outs.append(near.flatten(5) @ p.permute(0, 1, 3, 4, 2)[..., None])  # [B, g, H, W, d, 1]
        return torch.stack(outs)

    def restore(out: Tensor) -> Tensor:
        return out.squeeze(-1).permute(1, 3, 4, 0, 2, 5).flatten(3, 4)

    return Prepared([logits.transpose(1, 2), value, *data.shared], attend, restore)


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    """Random logits ``[B, taps, groups, H, W]`` as OverLoCK lays them out, groups before taps; value; tables of bias.

    The tables are float32 beside half precision, as autocast leaves them.
    """
    drawn = generator(device)
    taps, side = sum(k * k for k in shape.kernels), shape.side

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(generator=drawn)

    logits = normal(shape.batch, shape.groups, taps, side, side).transpose(1, 2)
    value, weights = (normal(shape.batch, side, side, len(shape.kernels) * shape.groups, shape.dim) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    tables = tuple(normal(shape.groups, 2 * k - 1, 2 * k - 1, dtype=wide).requires_grad_() for k in shape.kernels)
    return Data((logits.requires_grad_(), value.requires_grad_()), weights, shared=tables)


def floors(shape: Shape, itemsize: int) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward, which has a gradient beside each tensor."""
    pixels = shape.batch * shape.side**2 * shape.groups
    weights = pixels * sum(k * k for k in shape.kernels)
    size = (weights + 2 * pixels * len(shape.kernels) * shape.dim) * itemsize
    return floors_ms(size, 2 * size, weights)


_EXACT = output(ours)
OPERATOR = Operator(
    sets={"default": lambda: SHAPES, "networks": network_shapes},
    forms={
        OURS: Form(ours, _EXACT, ours=True),
        EAGER: Form(ours, _EXACT, backend="eager"),
        WINDOWS: Form(windows_form, _EXACT),
    },
    inputs=inputs,
    floors=floors,
    published={},
)
