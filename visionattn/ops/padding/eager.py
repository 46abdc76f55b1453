"""``visionattn::pad_to`` and ``visionattn::crop``: registered operators, each the other's adjoint."""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops.padding import reference


@torch.library.custom_op("visionattn::pad_to", mutates_args=())
def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B, height, width, C]`` with zeros below and to the right."""
    if height < x.shape[1] or width < x.shape[2]:
        raise ValueError(f"pad_to: {height}x{width} is smaller than the map {x.shape[1]}x{x.shape[2]}; use crop")
    # contiguous() would hand back the input itself where nothing is added; an operator must not alias
    return reference.pad_to(x, height, width).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("visionattn::crop", mutates_args=())
def crop(x: Tensor, height: int, width: int) -> Tensor:
    """``[B, H, W, C]`` to its top left ``[B, height, width, C]``, contiguous."""
    if height > x.shape[1] or width > x.shape[2]:
        raise ValueError(f"crop: {height}x{width} is larger than the map {x.shape[1]}x{x.shape[2]}; use pad_to")
    return reference.crop(x, height, width).clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty((x.shape[0], height, width, x.shape[3]))


def _save_size(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = inputs[0].shape[1], inputs[0].shape[2]


def _pad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return crop(grad, *ctx.size), None, None


def _crop_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return pad_to(grad, *ctx.size), None, None


pad_to.register_fake(_fake)
crop.register_fake(_fake)
pad_to.register_autograd(_pad_backward, setup_context=_save_size)
crop.register_autograd(_crop_backward, setup_context=_save_size)
