"""Where the pixels of a layer's map lie in the image."""

from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[int, int, int, int]


def check_position(position: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The column and row of a position in an image.

    Args:
        position: Column ``x`` and row ``y`` in pixels, counted from the top left corner.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        ``(x, y)`` as integers.

    Raises:
        ValueError: The position is no pair of numbers or lies outside the image.
    """
    try:
        x, y = (int(value) for value in position)
    except (TypeError, ValueError) as error:
        raise ValueError(f"position {position!r}: expected x and y in pixels, for example (16, 20)") from error
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"position ({x}, {y}) lies outside the image of {width} x {height} pixels; "
            f"x must be in [0, {width - 1}] and y in [0, {height - 1}]"
        )
    return x, y


@dataclass(frozen=True)
class Grid:
    """A map over an image; cell ``(i, j)`` stands for the square of ``stride`` pixels that begins at its multiple.

    Overlapping stems see more than that square. Cells beyond the image (padding) have no pixels.

    Args:
        image: Height and width of the image in pixels.
        stride: Side of a cell in pixels of the image.
    """

    image: tuple[int, int]
    stride: int

    def cell(self, x: int, y: int, size: tuple[int, int]) -> tuple[int, int]:
        """Row and column of the cell of a pixel in a map of ``size``; the last one where the map ends before."""
        return min(y // self.stride, size[0] - 1), min(x // self.stride, size[1] - 1)

    def box(self, rows: tuple[int, int], columns: tuple[int, int]) -> Box:
        """Pixels ``(x0, y0, x1, y1)`` of half-open ranges of cells, cut at the image; ends are exclusive."""
        (y0, y1), (x0, x1) = (
            tuple(min(i * self.stride, side) for i in cells)
            for cells, side in zip((rows, columns), self.image, strict=True)
        )
        return x0, y0, x1, y1

    def spread(self, heat: Tensor, shared: bool = True) -> Tensor:
        """A map drawn at the size of the image.

        Args:
            heat: ``[..., H_map, W_map]``.
            shared: Divide each value among the pixels of its cell, which keeps sums; else every pixel gets it whole.

        Returns:
            ``[..., H, W]``, zero where the map ends before the image.
        """
        for axis, side in zip((-2, -1), self.image, strict=True):
            cells = torch.arange(side, device=heat.device) // self.stride
            known = cells < heat.shape[axis]
            counts = torch.bincount(cells[known], minlength=heat.shape[axis]).clamp(min=1)
            factor = known.to(heat.dtype)
            cells = cells.clamp(max=heat.shape[axis] - 1)
            if shared:
                factor = factor / counts[cells]
            heat = heat.index_select(axis, cells) * (factor[:, None] if axis == -2 else factor)
        return heat
