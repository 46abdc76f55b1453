"""Tile sizes of the neighbourhood kernels: measured ones where there are some, else a rule, a search on request."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from visionattn.ops._tiles import Search, searching

__all__ = ["Search", "Tile", "candidates", "choose", "searching"]


class Tile(NamedTuple):
    """A program's rows each way, columns a step of its walk, warps, stages of its loads, images, registers a thread.

    Of images and registers these are the most. Halos of at most ``whole`` columns are not walked over, but taken whole.
    """

    height: int
    width: int
    columns: int
    warps: int
    stages: int
    images: int = 1
    registers: int | None = None
    whole: int = 0


class Row(NamedTuple):
    """A line of the table: a kernel, its head dim at most, the rows of a tile and the rest of it."""

    kernel: str
    head_dim: int
    rows: int
    columns: int
    warps: int
    stages: int
    images: int = 1
    registers: int | None = None
    whole: int = 0


# for 16-bit numbers on GPUs of compute capability 9, by their machine code; the first line that fits counts
_TUNED = [
    Row("forward", 64, 64, 64, 4, 2, 4),
    Row("forward", 128, 64, 64, 4, 1),
    Row("query_grad", 128, 64, 64, 4, 2),
    Row("key_grad", 128, 64, 64, 4, 2),
    Row("bias_grad", 64, 64, 64, 4, 2),
    Row("bias_grad", 128, 64, 32, 4, 2),
]


@lru_cache(maxsize=256)
def shape(rows: int, group: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
    """Height and width of at most ``rows`` pixels with which the fewest scores are computed."""

    def cost(height: int, width: int) -> tuple[int, int, int]:
        tiles = -(-group[0] // height) * -(-group[1] // width)
        halo = min(height + kernel[0] - 1, group[0]) * min(width + kernel[1] - 1, group[1])
        return tiles * -(-halo // 16), tiles * halo, -width

    heights = range(1, min(rows, group[0]) + 1)
    sizes = [(h, w) for h in heights for w in range(1, min(rows // h, group[1]) + 1)]
    return min(sizes, key=lambda size: cost(*size))


def _row(kernel: str, head_dim: int, itemsize: int) -> Row:
    """Tiles that need no more registers and shared memory than any GPU has."""
    if itemsize == 4:  # exact products of large tiles take the compiler long
        return Row(kernel, 64, 32, 32, 4, 1) if head_dim <= 64 else Row(kernel, 128, 16, 16, 2, 1)
    if head_dim <= 32:
        return Row(kernel, 32, 64, 64, 4, 2)
    return Row(kernel, 64, 32, 32, 2, 2) if head_dim <= 64 else Row(kernel, 128, 32, 32, 4, 2)


def choose(
    kernel: str,
    size: Sequence[int],
    window: tuple[int, int],
    dilation: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tile:
    """Tile for a map of this size.

    Args:
        kernel: Name of the kernel.
        size: Height and width of the map.
        window: The same of a window.
        dilation: Distance of a window's neighbouring pixels along both axes.
        head_dim: Channels of a head with padding.
        dtype: Of the queries.
        device: Where they are.
    """
    row = _row(kernel, head_dim, dtype.itemsize)
    group = -(-size[0] // dilation[0]), -(-size[1] // dilation[1])
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    if dtype.itemsize == 2 and major == 9:
        for line in _TUNED:
            if line.kernel == kernel and head_dim <= line.head_dim:
                row = line
                break
    height, width = shape(row.rows, group, window)
    return Tile(height, width, row.columns, row.warps, row.stages, row.images, row.registers, row.whole)


def candidates(tile: Tile, size: Sequence[int], window: tuple[int, int], dilation: Sequence[int]) -> list[Tile]:
    """Tiles to try in a search around ``tile``, itself first."""
    group = -(-size[0] // dilation[0]), -(-size[1] // dilation[1])
    found = [tile]
    for rows in (16, 32, 64, 128):
        for columns in (32, 64, 128):
            for warps in {max(1, rows // 16), max(1, rows // 32)}:
                if columns < 128 or rows >= 64:
                    found.append(Tile(*shape(rows, group, window), columns, warps, tile.stages))
    found += [tile._replace(stages=stages) for stages in (1, 2, 3, 4)]
    found += [tile._replace(images=images) for images in (1, 2, 4, 8)]
    found += [tile._replace(registers=registers) for registers in (80, 96, 128, 168)]
    return list(dict.fromkeys(found))
