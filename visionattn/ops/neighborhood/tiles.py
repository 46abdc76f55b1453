"""Cutting a map into tiles of queries and the keys around them.

All queries of a tile belong to one dilation group, so the keys that their windows reach are a rectangle with a stride:
a plain slice of the map. Tiles whose windows lie alike (all inner ones do) form a class and are computed together.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """A tile along one axis."""

    query: slice
    key: slice


class Shape(NamedTuple):
    """What segments of one class share."""

    starts: tuple[int, ...]  # first key of each query's window, counted from the first key of the segment
    relative: tuple[int, ...]  # index of that key in the table of relative positions
    skip: int  # queries at the front that the segment before has already
    keys: int


class TileClass(NamedTuple):
    """Tiles whose windows lie alike, one for each pair of segments."""

    rows: Shape
    columns: Shape
    tiles: list[tuple[Segment, Segment]]


@lru_cache(maxsize=256)
def first_keys(members: int, kernel: int, stride: int) -> tuple[int, ...]:
    """First key of every query's window in a dilation group of so many members; see ``reference.windows``."""
    leaders = (min(i // stride * stride + stride // 2, members - 1) for i in range(members))
    return tuple(min(max(leader - kernel // 2, 0), members - kernel) for leader in leaders)


def cuts(members: int, size: int, stride: int, phase: int = 0) -> list[int]:
    """First members of tiles of at most ``size``: some groups of ``stride`` members each, or pieces of one.

    A tile that held parts of two groups would reach further than its size demands, and where the parts differ from
    tile to tile hardly two would be alike. Groups begin at ``phase`` modulo ``stride``.
    """
    step = max(size // stride, 1) * stride
    first = step - stride + phase if phase else step
    edges = sorted({0, *range(first, min(members, members + step - size), step), members})
    return [begin for low, high in pairwise(edges) for begin in range(low, high, size)]


def segments(length: int, kernel: int, dilation: int, size: int, stride: int = 1) -> dict[Shape, list[Segment]]:
    """Segments of at most ``size`` queries that cover an axis, by shape."""
    found: dict[Shape, list[Segment]] = {}
    for group in range(dilation):
        members = (length - group + dilation - 1) // dilation
        for first, end in pairwise([*cuts(members, size, stride), members]):
            # the last one overlaps the one before rather than being short, where that breaks no group
            begin = max(0, end - size) if stride == 1 else first
            starts = first_keys(members, kernel, stride)[begin:end]
            keys = starts[-1] + kernel - starts[0]
            shape = Shape(
                tuple(s - starts[0] for s in starts),
                tuple(s - p + kernel - 1 for p, s in enumerate(starts, begin)),
                first - begin,
                keys,
            )
            where = (
                slice(group + dilation * n, group + dilation * (n + count - 1) + 1, dilation)
                for n, count in ((begin, len(starts)), (starts[0], keys))
            )
            found.setdefault(shape, []).append(Segment(*where))
    return found


@lru_cache(maxsize=64)
def tile_classes(
    height: int,
    width: int,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
) -> list[TileClass]:
    """All tiles of a map, by class."""
    rows = segments(height, kernel[0], dilation[0], size[0], stride[0])
    columns = segments(width, kernel[1], dilation[1], size[1], stride[1])
    return [TileClass(y, x, [(sy, sx) for sy in rows[y] for sx in columns[x]]) for y in rows for x in columns]


def slots(kind: TileClass, kernel: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where the windows of a tile's queries lie.

    Returns:
        For each query and tap ``[queries, taps]`` (both row by row): the key's number in the tile and its index in the
        flattened table of relative positions. And which queries ``[queries]`` an earlier tile has.
    """

    def axis(shape: Shape, k: int) -> Iterator[Tensor]:
        tap = torch.arange(k, device=device)
        return (torch.tensor(v, device=device)[:, None] + tap for v in (shape.starts, shape.relative))

    (rows, rel_rows), (columns, rel_columns) = axis(kind.rows, kernel[0]), axis(kind.columns, kernel[1])

    def pair(y: Tensor, x: Tensor, width: int) -> Tensor:
        return (y[:, None, :, None] * width + x[None, :, None, :]).flatten(2, 3).flatten(0, 1)

    fresh = torch.ones((len(rows), len(columns)), dtype=torch.bool, device=device)
    fresh[: kind.rows.skip], fresh[:, : kind.columns.skip] = False, False
    key = pair(rows, columns, kind.columns.keys)
    return key, pair(rel_rows, rel_columns, 2 * kernel[1] - 1), ~fresh.flatten()
