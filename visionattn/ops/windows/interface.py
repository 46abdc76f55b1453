"""Public window operators: check the arguments, pick an implementation, nothing else."""

import torch
from torch import Tensor

from visionattn.ops._dispatch import use_reference
from visionattn.ops.windows import eager, reference  # noqa: F401  (eager registers the operators)


def split_windows(x: Tensor, side: int) -> Tensor:
    """Cut a map into windows that do not overlap.

    Args:
        x: Map, ``[B, H, W, C]``.
        side: Side of a window in pixels; must divide ``H`` and ``W``.

    Returns:
        ``[B * windows, side * side, C]``: images, their windows and the pixels of a window, all row by row.

    Raises:
        ValueError: ``side`` does not divide the map.
    """
    if torch.jit.is_scripting():
        return torch.ops.visionattn.split_windows(x, side)
    if not torch.compiler.is_compiling() and (side < 1 or x.shape[1] % side or x.shape[2] % side):
        raise ValueError(
            f"side={side} must divide the map, got H={x.shape[1]}, W={x.shape[2]}; "
            "pad first, for example with visionattn.ops.pad_to_multiple"
        )
    if use_reference():
        return reference.split_windows(x, side)
    return torch.ops.visionattn.split_windows(x, side)


def join_windows(x: Tensor, side: int, batch: int, height: int, width: int) -> Tensor:
    """The way back from ``split_windows``.

    Args:
        x: Windows, ``[batch * windows, side * side, C]``.
        side: Side of a window in pixels.
        batch: Number of maps.
        height: Height of the map, a multiple of ``side``.
        width: Width of the map, a multiple of ``side``.

    Returns:
        ``[batch, height, width, C]``.

    Raises:
        ValueError: The windows do not make maps of that size.
    """
    if torch.jit.is_scripting():
        return torch.ops.visionattn.join_windows(x, side, batch, height, width)
    if not torch.compiler.is_compiling():
        wanted = (batch * (height // side) * (width // side), side * side)
        if height % side or width % side or x.shape[:2] != wanted:
            raise ValueError(f"windows {tuple(x.shape)} of side={side} do not make {batch} maps of {height}x{width}")
    if use_reference():
        return reference.join_windows(x, side, batch, height, width)
    return torch.ops.visionattn.join_windows(x, side, batch, height, width)
