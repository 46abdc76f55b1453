"""Public padding operators: check the arguments, pick an implementation, nothing else."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visionattn.ops._dispatch import use_reference
from visionattn.ops.padding import eager, reference  # noqa: F401  (eager registers the operators)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad a map with zeros at the bottom and right until ``multiple`` divides both sides.

    Args:
        x: Map, ``[B, H, W, C]``.
        multiple: Wanted divisor of height and width, in pixels of the map.

    Returns:
        ``[B, ceil(H / multiple) * multiple, ceil(W / multiple) * multiple, C]``; ``x`` itself where nothing is missing.

    Raises:
        ValueError: ``multiple`` is below 1 or ``x`` has not four axes.
    """
    if multiple < 1 or x.dim() != 4:
        raise ValueError(f"pad_to_multiple wants multiple >= 1 and x [B, H, W, C], got {multiple} and {x.dim()} axes")
    H, W = x.shape[1], x.shape[2]
    height, width = (H + multiple - 1) // multiple * multiple, (W + multiple - 1) // multiple * multiple
    if torch.jit.is_scripting():
        return torch.ops.visionattn.pad_to(x, height, width)
    return _pad_to(x, height, width)


def pad_to_at_least(x: Tensor, height: int, width: int) -> Tensor:
    """Pad a map with zeros at the bottom and right to a smallest size.

    Args:
        x: Map, ``[B, H, W, C]``.
        height: Smallest number of rows.
        width: Smallest number of columns.

    Returns:
        ``[B, max(H, height), max(W, width), C]``; ``x`` itself where nothing is missing.

    Raises:
        ValueError: ``x`` has not four axes.
    """
    if x.dim() != 4:
        raise ValueError(f"pad_to_at_least wants x [B, H, W, C], got {x.dim()} axes")
    if torch.jit.is_scripting():
        return torch.ops.visionattn.pad_to(x, max(x.shape[1], height), max(x.shape[2], width))
    return _pad_to_at_least(x, height, width)


@torch.jit.unused
def _pad_to_at_least(x: Tensor, height: int, width: int) -> Tensor:
    return _pad_to(x, larger(x.shape[1], height), larger(x.shape[2], width))


@torch.jit.unused
def larger(a: int, b: int) -> int:
    """The larger of two sizes, without a guard where they are symbols: Dynamo knows that of ``max`` alone."""
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)  # type: ignore[return-value]


@torch.jit.unused
def smaller(a: int, b: int) -> int:
    """The smaller of two sizes; see ``larger``."""
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)  # type: ignore[return-value]


@torch.jit.unused
def _pad_to(x: Tensor, height: int, width: int) -> Tensor:
    # asks only what is known without adding a guard, so one compiled graph serves all sizes
    if statically_known_true(height == x.shape[1]) and statically_known_true(width == x.shape[2]):
        return x
    if use_reference():
        return reference.pad_to(x, height, width)
    return torch.ops.visionattn.pad_to(x, height, width)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Keep the top left corner of a map.

    Args:
        x: Map, ``[B, H, W, C]``.
        height: Rows to keep, at most ``H``.
        width: Columns to keep, at most ``W``.

    Returns:
        ``[B, height, width, C]``; ``x`` itself where nothing is cut.

    Raises:
        ValueError: ``x`` has not four axes, or is smaller than the wanted size.
    """
    if x.dim() != 4:
        raise ValueError(f"crop wants x [B, H, W, C], got {x.dim()} axes")
    if torch.jit.is_scripting():
        return torch.ops.visionattn.crop(x, height, width)
    if statically_known_true(height == x.shape[1]) and statically_known_true(width == x.shape[2]):
        return x
    if use_reference():
        if not torch.compiler.is_compiling() and (height > x.shape[1] or width > x.shape[2]):
            raise ValueError(f"crop: {height}x{width} is larger than the map {x.shape[1]}x{x.shape[2]}")
        return reference.crop(x, height, width)
    return torch.ops.visionattn.crop(x, height, width)
