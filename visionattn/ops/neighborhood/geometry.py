"""Which rows of a tile meet which columns of its halo, worked out once for each shape.

A program of the kernels holds a tile of rows, which belong to one dilation group, and walks over the columns that any
of them meets, a rectangle of the same group: queries over the keys of their windows, or keys over the queries whose
windows they lie in. Windows move inward at borders and, with a stride, on by several pixels, so a key may have more
queries than a window has keys; but they are an interval of each axis too, and never none, for a query lies in its own
window. Tiles whose rows meet their columns alike (all inner ones do) form a class and share masks.

All tensors here are on the CPU, whatever PyTorch's default device is.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops.neighborhood.tiles import cuts, first_keys

FIELDS = 8  # of a tile in an axis's table: first row, rows, first column, columns, class, chunks of the halo, 0, 0


class Kind(NamedTuple):
    """What the tiles of one class share along an axis."""

    meets: tuple[tuple[int, int], ...]  # first and last column of every row, counted from the first column
    shift: int  # place of the first column minus that of the first row, in the dilation group

    @property
    def columns(self) -> int:
        """Columns that any row meets."""
        return self.meets[-1][1] + 1


class Axis(NamedTuple):
    """Tiles along one axis: pixels of their first row and column, and their class, a number in ``kinds``."""

    tiles: list[tuple[int, int, int]]
    kinds: list[Kind]

    @property
    def columns(self) -> int:
        """Most columns of a tile."""
        return max(kind.columns for kind in self.kinds)


Bounds = list[tuple[int, int]]


def _meets(n: int, kernel: int, stride: int, rows: range, by_key: bool) -> Bounds:
    """First and last member of a dilation group of ``n`` that its members ``rows`` meet."""
    starts = first_keys(n, kernel, stride)
    if by_key:
        return [(bisect_left(starts, j - kernel + 1), bisect_right(starts, j) - 1) for j in rows]
    return [(starts[i], starts[i] + kernel - 1) for i in rows]


@lru_cache(maxsize=256)
def _cut(n: int, kernel: int, size: int, by_key: bool, stride: int) -> list[tuple[int, Bounds]]:
    """Tiles of a dilation group: first member, and what each of its members meets.

    The ``kernel`` keys next to a border have more queries than others; tiles that keep them apart may spare columns,
    and with a stride so may tiles that begin where windows do.
    """
    options = [cuts(n, size, stride)]
    if by_key and stride > 1:
        options.append(cuts(n, size, stride, (stride // 2 - kernel // 2) % stride))
    elif by_key and n >= 2 * kernel:
        inner = [*range(kernel % size, kernel, size), *range(kernel, n - kernel, size), *range(n - kernel, n, size)]
        options.append(sorted({0, *inner}))
    choices = []
    for starts in options:
        rows = [range(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]
        tiles = [(r.start, _meets(n, kernel, stride, r, by_key)) for r in rows]
        columns = max(meets[-1][1] + 1 - meets[0][0] for _, meets in tiles)
        choices.append((len(tiles) * columns, tiles))
    return min(choices)[1]


def extent(n: int, kernel: int, size: int, by_key: bool, stride: int) -> tuple[int, int]:
    """Tiles of a dilation group of ``n``, and the most columns of one."""
    tiles = _cut(n, kernel, size, by_key, stride)
    return len(tiles), max(meets[-1][1] + 1 - meets[0][0] for _, meets in tiles)


def axis(length: int, kernel: int, dilation: int, size: int, by_key: bool, stride: int = 1) -> Axis:
    """Tiles of at most ``size`` rows that cover an axis; rows are keys if ``by_key``, else queries."""
    tiles: list[tuple[int, int, int]] = []
    kinds: dict[Kind, int] = {}
    for group in range(dilation):
        for first, meets in _cut((length - group + dilation - 1) // dilation, kernel, size, by_key, stride):
            origin = meets[0][0]
            kind = Kind(tuple((low - origin, high - origin) for low, high in meets), origin - first)
            number = kinds.setdefault(kind, len(kinds))
            tiles.append((group + dilation * first, group + dilation * origin, number))
    return Axis(tiles, list(kinds))


class Walk(NamedTuple):
    """Tiles of a map with the walks over their halos, which go row by row over ``width`` columns.

    A walk is some chunks of ``block`` columns, as many as the tile needs, and then ``parts``, the same for all tiles.
    """

    rows: Axis
    columns: Axis
    height: int
    width: int
    block: int
    parts: tuple[tuple[int, int], ...]  # first column, counted from the end of the chunks, and columns

    @property
    def whole(self) -> bool:
        """Whether there are no chunks."""
        return not any(map(self.chunks, self.rows.kinds))

    @property
    def rest(self) -> int:
        """Columns of all parts."""
        return sum(count for _, count in self.parts)

    @property
    def block_m(self) -> int:
        """Rows of a tile, with padding."""
        return max(16, 1 << (self.height * self.width - 1).bit_length())

    def chunks(self, kind: Kind) -> int:
        """Chunks in the walk of a tile of this class of the vertical axis."""
        return -(-max(0, kind.columns * self.columns.columns - self.rest) // self.block)

    @property
    def words(self) -> int:
        """Words of 32 columns in the longest walk."""
        return (max(map(self.chunks, self.rows.kinds)) * self.block + self.rest + 31) // 32

    @property
    def classes(self) -> int:
        """Pairs of a vertical and a horizontal class; number ``vertical * horizontal classes + horizontal``."""
        return len(self.rows.kinds) * len(self.columns.kinds)

    @property
    def tiles(self) -> int:
        """Tiles of the map."""
        return len(self.rows.tiles) * len(self.columns.tiles)


def walk(
    size: Sequence[int],
    kernel: Sequence[int],
    dilation: Sequence[int],
    tile: tuple[int, int],
    block: int,
    by_key: bool = False,
    whole: int = 0,
    stride: Sequence[int] = (1, 1),
) -> Walk:
    """Tiles of ``tile`` rows each way with walks of ``block`` columns a step.

    Of halos with at most ``whole`` columns everything is a part; of others what is left of the last step, if it is
    less than a step.
    """
    rows, columns = (axis(size[i], kernel[i], dilation[i], tile[i], by_key, stride[i]) for i in range(2))
    count = rows.columns * columns.columns
    if count <= whole:
        return Walk(rows, columns, *tile, block, _pieces(count, block))
    rest = max(16, 1 << (count % block - 1).bit_length()) if count % block else block
    return Walk(rows, columns, *tile, block, ((0, rest),) if rest < block else ())


def _pieces(count: int, block: int) -> tuple[tuple[int, int], ...]:
    """Parts of ``count`` columns and as few more as possible, powers of 2 from ``block`` down to 16."""
    full, rest = divmod(-(-count // 16) * 16, block)
    sizes = [block] * full + [1 << bit for bit in reversed(range(4, 31)) if rest & (1 << bit)]
    return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))


def table(walk: Walk, vertical: bool) -> Tensor:
    """An axis's tiles as the kernels read them, int32 ``[tiles, FIELDS]``."""
    tiles, kinds = walk.rows if vertical else walk.columns
    lines = []
    for row, column, number in tiles:
        kind = kinds[number]
        chunks = walk.chunks(kind) if vertical else 0
        lines.append([row, len(kind.meets), column, kind.columns, number, chunks, 0, 0])
    return torch.tensor(lines, dtype=torch.int32, device="cpu")


def _meeting(kinds: list[Kind], rows: int, columns: int) -> Tensor:
    """Whether row and column of a class meet along one axis, ``[classes, rows, columns]``."""
    bounds = torch.tensor([[*kind.meets, *[(1, 0)] * (rows - len(kind.meets))] for kind in kinds], device="cpu")
    column = torch.arange(columns, device="cpu")
    return (bounds[..., :1] <= column) & (column <= bounds[..., 1:])


def words(walk: Walk, by_key: bool) -> Tensor:
    """Bit masks of the keys that a query meets, 32 a word, int32 ``[classes, words, queries]`` with padding.

    Keys are the columns, or the rows if ``by_key``.
    """
    width, length = walk.columns.columns, 32 * walk.words
    y = _meeting(walk.rows.kinds, walk.height, -(-length // width))
    x = _meeting(walk.columns.kinds, walk.width, width)
    padded = -(-walk.block_m // 32) * 32
    shape = (padded // 32, length) if by_key else (length // 32, padded)
    found, bit = torch.empty((walk.classes, *shape), dtype=torch.int32, device="cpu"), torch.arange(32, device="cpu")
    for number in range(walk.classes):  # one by one, for the bits are long
        one, other = y[number // len(x)], x[number % len(x)]
        meet = (one[:, None, :, None] & other[None, :, None, :]).flatten(2).flatten(0, 1)[:, :length]
        meet = torch.cat([meet, meet.new_zeros((padded - len(meet), length))])
        meet = meet.T if by_key else meet  # [queries, keys]
        bits = (meet.unflatten(1, (-1, 32)).long() << bit).sum(2)
        found[number] = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).T
    return found


class Order(NamedTuple):
    """Tiles class by class, for sums over all of a class: of every tile its place, then classes with shares."""

    places: Tensor  # int32 [vertical tiles * horizontal tiles]
    classes: Tensor  # as ``classes`` makes them, with first sum and number of sums


def order(walk: Walk, shares: int) -> Order:
    """Order of the tiles where ``shares`` programs leave a sum each for every tile."""
    across = len(walk.columns.kinds)
    numbers = [row[2] * across + column[2] for row in walk.rows.tiles for column in walk.columns.tiles]
    sums, first = [], 0
    for number in range(walk.classes):
        count = numbers.count(number) * shares
        sums.append((first, count))
        first += count
    by_class = sorted(range(len(numbers)), key=numbers.__getitem__)
    places = torch.empty(len(numbers), dtype=torch.int32, device="cpu")
    places[by_class] = torch.arange(len(numbers), dtype=torch.int32, device="cpu")
    return Order(places, classes(walk, sums))


class Splits(NamedTuple):
    """Work of the bias gradient: a split is some (tile, image) items of one class, tile by tile."""

    lists: Tensor  # int32 [tiles, 2], vertical and horizontal number of the tiles, class by class
    splits: Tensor  # int32 [splits, FIELDS]: first item, end, first tile of the class in ``lists``, class
    classes: Tensor  # as ``classes`` makes them, with first split and number of splits


def classes(walk: Walk, splits: Sequence[tuple[int, int]] = ()) -> Tensor:
    """Classes of tiles, int32 ``[classes, FIELDS]``: first split and splits, then shift and columns, each y and x."""
    pairs = [(y, x) for y in walk.rows.kinds for x in walk.columns.kinds]
    lines = [
        [*share, y.shift, x.shift, y.columns, x.columns, 0, 0]
        for (y, x), share in zip(pairs, splits or [(0, 0)] * len(pairs), strict=True)
    ]
    return torch.tensor(lines, dtype=torch.int32, device="cpu")


def splits(walk: Walk, batch: int, wanted: int) -> Splits:
    """Share all tiles of ``batch`` images among about ``wanted`` programs, at least one for each class."""
    lists: list[tuple[int, int]] = []
    found: list[list[int]] = []
    shares: list[tuple[int, int]] = []
    for y in range(len(walk.rows.kinds)):
        for x in range(len(walk.columns.kinds)):
            ys, xs = ([n for n, t in enumerate(a.tiles) if t[2] == c] for a, c in ((walk.rows, y), (walk.columns, x)))
            count = len(ys) * len(xs)
            share = min(batch * count, max(1, round(wanted * count / walk.tiles)))
            shares.append((len(found), share))
            for part in range(share):
                first, last = (batch * count * p // share for p in (part, part + 1))
                found.append([first, last, len(lists), len(shares) - 1, 0, 0, 0, 0])
            lists += [(ty, tx) for ty in ys for tx in xs]
    items, parts = (torch.tensor(x, dtype=torch.int32, device="cpu") for x in (lists, found))
    return Splits(items, parts, classes(walk, shares))
