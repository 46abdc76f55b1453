"""``visionattn::split_windows`` and ``visionattn::join_windows``: registered operators, each the other's adjoint."""

from typing import Any

import torch
from torch import Tensor

from visionattn.ops.windows import reference


def _fresh(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in memory of its own: an operator must not alias, and one window is the map itself."""
    return x.clone() if x.data_ptr() == like.data_ptr() else x


@torch.library.custom_op("visionattn::split_windows", mutates_args=())
def split_windows(x: Tensor, side: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B * windows, side * side, C]``, all row by row."""
    return _fresh(reference.split_windows(x, side), x)


@split_windows.register_fake
def _(x: Tensor, side: int) -> Tensor:
    count = x.shape[0] * (x.shape[1] // side) * (x.shape[2] // side)
    if not isinstance(count, int):  # a symbol of its own, about which nothing is known or asked
        count = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty((count, side * side, x.shape[3]))


@torch.library.custom_op("visionattn::join_windows", mutates_args=())
def join_windows(x: Tensor, side: int, batch: int, height: int, width: int) -> Tensor:
    """``[batch * windows, side * side, C]`` to ``[batch, height, width, C]``."""
    return _fresh(reference.join_windows(x, side, batch, height, width), x)


@join_windows.register_fake
def _(x: Tensor, side: int, batch: int, height: int, width: int) -> Tensor:
    return x.new_empty((batch, height, width, x.shape[2]))


def _split_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.side = inputs
    ctx.size = x.shape[:3]


def _split_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return join_windows(grad, ctx.side, *ctx.size), None


def _join_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.side = inputs[1]


def _join_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return split_windows(grad, ctx.side), None, None, None, None


split_windows.register_autograd(_split_vjp, setup_context=_split_setup)
join_windows.register_autograd(_join_vjp, setup_context=_join_setup)
