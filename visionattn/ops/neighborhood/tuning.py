"""Tile sizes of the neighbourhood kernels: measured ones where there are some, else a rule, a search on request."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from visionattn.ops.neighborhood import geometry

WHOLE = 256  # columns of a halo that may be taken whole: more unrolled steps take the compiler long
_SIZES = ((64, 64, 4), (64, 128, 4), (32, 32, 2), (32, 64, 2), (32, 128, 2), (16, 32, 1), (128, 64, 8))


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
    """A line of the table: a kernel, its head dim at most, the rows of a tile and the rest of it.

    It is for dilation groups of at most ``group`` pixels, windows of at most ``window`` and, if ``biased`` is given,
    for calls with a bias or for those without.
    """

    kernel: str
    head_dim: int
    rows: int
    columns: int
    warps: int
    stages: int
    images: int = 1
    registers: int | None = None
    whole: int = 0
    group: int = 1 << 30
    window: int = 1 << 30
    biased: bool | None = None


# for 16-bit numbers on GPUs of compute capability 9, measured on an H100; the first line that fits counts
_TUNED = [
    Row("forward", 32, 64, 64, 4, 3, 4, 168, WHOLE, group=64),
    Row("forward", 32, 32, 128, 2, 2, 4, 168, WHOLE, group=256, window=81),
    Row("forward", 32, 32, 128, 2, 2, 4, 168, WHOLE, window=81, biased=True),
    Row("forward", 32, 16, 32, 1, 2, 4, None, WHOLE, group=900, window=81),
    Row("forward", 32, 32, 64, 2, 2, 8, 128, WHOLE, window=81),
    Row("forward", 32, 64, 64, 4, 2, 4, 128),
    Row("forward", 64, 64, 32, 4, 3, 1, 128),
    Row("forward", 128, 64, 32, 4, 2, 1, 168),
    Row("query_grad", 32, 64, 64, 4, 2, 4, 128, WHOLE, group=64, biased=False),
    Row("query_grad", 32, 32, 32, 2, 2, 4, 168, WHOLE, group=256, window=81, biased=False),
    Row("query_grad", 32, 16, 32, 1, 2, 4, None, WHOLE, window=81, biased=False),
    Row("query_grad", 32, 64, 64, 4, 2, 32, None, WHOLE, group=64, biased=True),
    Row("query_grad", 32, 32, 32, 2, 2, 16, None, WHOLE, group=256, window=81, biased=True),
    Row("query_grad", 32, 32, 32, 2, 2, 32, None, WHOLE, group=900, window=81, biased=True),
    Row("query_grad", 32, 32, 32, 2, 2, 16, None, WHOLE, window=81, biased=True),
    Row("query_grad", 32, 64, 64, 4, 2, 4, 128),
    Row("query_grad", 64, 64, 64, 4, 2, 1, 168),
    Row("query_grad", 128, 64, 32, 4, 3),
    Row("key_grad", 32, 64, 64, 4, 2, 4, 128, WHOLE, group=64),
    Row("key_grad", 32, 32, 64, 2, 2, 4, None, WHOLE, window=81),
    Row("key_grad", 32, 64, 64, 4, 2, 4, 128),
    Row("key_grad", 64, 64, 64, 4, 3),
    Row("key_grad", 128, 64, 64, 4, 2),
    Row("bias_grad", 64, 64, 64, 4, 3),
    Row("bias_grad", 128, 64, 32, 4, 2),
]


def _extent(n: int, kernel: int, size: int, by_key: bool, stride: int) -> tuple[int, int]:
    """Tiles along one axis of a dilation group, and what their windows reach."""
    if stride == 1:
        return -(-n // size), min(size + kernel - 1, n)
    return geometry.extent(n, kernel, size, by_key, stride)


def _halo(
    tile: tuple[int, int], group: tuple[int, int], kernel: tuple[int, int], by_key: bool, stride: tuple[int, int]
) -> int:
    """Pixels that a tile's windows reach."""
    reach = [_extent(group[i], kernel[i], tile[i], by_key, stride[i])[1] for i in range(2)]
    return reach[0] * reach[1]


@lru_cache(maxsize=256)
def shape(
    rows: int,
    group: tuple[int, int],
    kernel: tuple[int, int],
    by_key: bool = False,
    stride: tuple[int, int] = (1, 1),
) -> tuple[int, int]:
    """Height and width of at most ``rows`` pixels with which the fewest scores are computed.

    With a stride a side is some groups that share a window, or a piece of one.
    """
    sides = [
        {
            size: _extent(n, kernel[i], size, by_key, s)
            for size in range(1, min(rows, n) + 1)
            if size < s or size % s == 0 or size == n
        }
        for i, (n, s) in enumerate(zip(group, stride, strict=True))
    ]

    def cost(height: int, width: int) -> tuple[int, ...]:
        (down, high), (across, wide) = sides[0][height], sides[1][width]
        tiles, halo = down * across, high * wide
        # two windows without overlap are no fewer scores than one, but half of them do not count
        area = 0 if stride == (1, 1) else height * width
        return tiles * -(-halo // 16), tiles * halo, area, -width

    sizes = [(h, w) for h in sides[0] for w in sides[1] if h * w <= rows]
    return min(sizes, key=lambda size: cost(*size))


def _row(kernel: str, head_dim: int, itemsize: int) -> Row:
    """Tiles that need no more registers and shared memory than any GPU has."""
    if itemsize == 4:  # exact products of large tiles take the compiler long
        return Row(kernel, 64, 32, 32, 4, 1) if head_dim <= 64 else Row(kernel, 128, 16, 16, 2, 1)
    if head_dim <= 32:
        return Row(kernel, 32, 32, 32, 2, 2, 8, None, WHOLE)
    return Row(kernel, 64, 32, 32, 2, 2) if head_dim <= 64 else Row(kernel, 128, 32, 32, 4, 2)


def choose(
    kernel: str,
    size: Sequence[int],
    window: tuple[int, int],
    dilation: Sequence[int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    biased: bool,
    stride: tuple[int, int] = (1, 1),
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
        biased: Whether there is a bias.
        stride: Pixels along both axes that share a window.
    """
    row = _row(kernel, head_dim, dtype.itemsize)
    group = -(-size[0] // dilation[0]), -(-size[1] // dilation[1])
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    # windows without overlap are like maps of their own
    area = math.prod(window if stride == window else group)
    if dtype.itemsize == 2 and major == 9:
        for line in _TUNED:
            small = area <= line.group and window[0] * window[1] <= line.window
            if line.kernel == kernel and head_dim <= line.head_dim and small and line.biased in (None, biased):
                row = line
                break
    height, width = shape(row.rows, group, window, kernel == "key_grad", stride)
    return Tile(
        height, width, row.columns, _warps(row.warps, height * width), row.stages, row.images, row.registers, row.whole
    )


def _warps(most: int, pixels: int) -> int:
    """Warps of a tile, no more than have rows of their own: others made illegal accesses with Triton 3.6."""
    return min(most, max(16, 1 << (pixels - 1).bit_length()) // 16)


def candidates(
    tile: Tile,
    size: Sequence[int],
    window: tuple[int, int],
    dilation: Sequence[int],
    stride: tuple[int, int] = (1, 1),
    by_key: bool = False,
) -> list[Tile]:
    """Tiles to try in a search around ``tile``, itself first; of keys if ``by_key``, else of queries."""
    group = -(-size[0] // dilation[0]), -(-size[1] // dilation[1])
    rest = group, window, by_key, stride
    found = [tile]
    for rows, columns, most in _SIZES:
        height, width = shape(rows, *rest)
        warps = _warps(most, height * width)
        for whole, registers in ((0, 128), (WHOLE, None), (WHOLE, 128)):
            if not whole or _halo((height, width), *rest) <= whole:
                found.append(Tile(height, width, columns, warps, 2, tile.images, registers, whole))
    found += [tile._replace(stages=stages) for stages in (1, 2, 3)]
    found += [tile._replace(images=images) for images in (1, 4, 8, 32)]
    return list(dict.fromkeys(found))
