"""Attention through a state, HER-Seg's over pixels and DaViT's between channels, beside plain PyTorch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import rotation_table, state_attention
from visionattn.tasks.operator_forms import EAGER, OURS, Data, Form, Operator, Prepared, floors_ms, generator, output

EINSUM, COMPILED = "einsum", "torch.compile"


class Shape(NamedTuple):
    """A call: batch, side of the map, heads, channels of a head, form, whether it has a rotation."""

    batch: int
    side: int
    heads: int
    dim: int
    mode: str = "linear"
    rotated: bool = True

    def name(self) -> str:
        """The shape in words."""
        rotated = " rotated" if self.rotated else ""
        return f"B{self.batch} {self.side}x{self.side} heads {self.heads}x{self.dim} {self.mode}{rotated}"

    def rotation(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The table of the rotation, if there is one."""
        return rotation_table(self.side, self.side, self.heads * self.dim, device=device) if self.rotated else None


SHAPES = {
    shape.name(): shape
    for shape in (
        Shape(16, 64, 12, 16),
        # the three groups of HER-Seg's encoder at 1024 pixels
        Shape(16, 64, 6, 16),
        Shape(16, 64, 12, 8),
        Shape(16, 64, 24, 4),
        # the four stages of davit_tiny at 224 pixels
        *(Shape(128, 56 >> i, 3 << i, 32, "channel_softmax", False) for i in range(4)),
    )
}


def ours(data: Data, shape: Shape) -> Prepared:
    """The operator of this package."""
    rotation = shape.rotation(data.batched[0].device)
    return Prepared(list(data.leaves()), lambda q, k, v: state_attention(q, k, v, mode=shape.mode, rotation=rotation))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.flatten(3).unflatten(3, (-1, 2)).unbind(-1)
    return torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).reshape(x.shape)


def _plain(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What one writes without an operator, in the dtype of the tensors."""
    rotation, pixels = shape.rotation(device), shape.side**2
    table = None if rotation is None else [x.to(dtype) for x in rotation]

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        z = 1 / (torch.einsum("bhwnd,bnd->bhwn", q, k.mean(dim=(1, 2))) + 1e-6)
        if table is not None:
            q, k = _turn(q, *table), _turn(k, *table)
        state = torch.einsum("bhwnd,bhwne->bnde", k / pixels, v)
        return torch.einsum("bhwnd,bnde->bhwne", q, state) * z[..., None]

    def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mix = torch.einsum("bhwnd,bhwne->bnde", k * shape.dim**-0.5, v).softmax(dim=-1)
        return torch.einsum("bhwne,bnde->bhwnd", q, mix)

    return linear if shape.mode == "linear" else channels


def einsum_form(data: Data, shape: Shape) -> Prepared:
    """Plain PyTorch, step by step."""
    x = data.batched[0]
    return Prepared(list(data.leaves()), _plain(shape, x.device, x.dtype))


def compiled_form(data: Data, shape: Shape) -> Prepared:
    """The same through ``torch.compile``."""
    x = data.batched[0]
    return Prepared(list(data.leaves()), torch.compile(_plain(shape, x.device, x.dtype)))


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    """Random tensors as the networks' projections leave them: HER-Seg packs query and key, DaViT all three."""
    drawn = generator(device)
    size = shape.batch, shape.side, shape.side

    def normal(count: int) -> tuple[Tensor, ...]:
        packed = torch.empty((*size, count, shape.heads, shape.dim), device=device, dtype=dtype)
        return packed.normal_(generator=drawn).unbind(3)

    batched = (*normal(2), *normal(1)) if shape.mode == "linear" else normal(3)
    return Data(tuple(x.requires_grad_() for x in batched), normal(1)[0])


def floors(shape: Shape, itemsize: int) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward: every tensor once in each.

    Forward reads three and writes one; backward reads these three and the output's gradient, and writes three.
    """
    count = shape.batch * shape.side**2 * shape.heads * shape.dim
    return floors_ms(4 * count * itemsize, 7 * count * itemsize, 2 * count if shape.mode == "linear" else 0)


_EXACT: Callable[[Data, Any], Tensor] = output(ours)
OPERATOR = Operator(
    sets={"default": lambda: SHAPES},
    forms={
        OURS: Form(ours, _EXACT, ours=True),
        EAGER: Form(ours, _EXACT, backend="eager"),
        EINSUM: Form(einsum_form, _EXACT),
        COMPILED: Form(compiled_form, _EXACT),
    },
    inputs=inputs,
    floors=floors,
    published={},
)
