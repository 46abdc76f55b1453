"""Which regions of an image BiFormer routes a position to."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.explain._need import frozen
from visionattn.explain.attention import Attention
from visionattn.explain.grid import Box, Grid, check_position
from visionattn.explain.recording import Recording, record
from visionattn.layers import RoutingAttention


@dataclass
class RoutedRegions:
    """What one position of an image attends to in one layer.

    Boxes are ``(x0, y0, x1, y1)`` in pixels of the image, ends exclusive, cut at the image.

    Args:
        layer: Name of the attention module in the model.
        stage: Stage, counted from 1.
        query: Region of the position; in a layer that attends to everything its pixel of the map.
        regions: Regions that are attended to, best first; those that lie in the padding only are left out.
        mask: Share of the attention of the position's pixel of the map, mean over heads, that each pixel of the image
            gets, ``[H, W]``. It is zero outside the regions and sums to 1, less what goes to padding.
    """

    layer: str
    stage: int
    query: Box
    regions: tuple[Box, ...]
    mask: Tensor


def routed_regions(model: nn.Module, image: Tensor, position: tuple[int, int]) -> list[RoutedRegions]:
    """Regions that a position is routed to, for every attention layer of a BiFormer.

    The layers of the last stage attend to the whole map: one region.

    Args:
        model: A model with ``RoutingAttention``; its mode (training or evaluation) is restored.
        image: One normalised image, ``[1, C, H, W]``.
        position: Column ``x`` and row ``y`` in pixels of ``image``.

    Returns:
        One entry per layer in the order of computation.

    Raises:
        ValueError: A model without routed attention, more than one image, or a position outside it.

    Reference: BiFormer, arXiv:2303.08810.
    """
    if not any(isinstance(module, RoutingAttention) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no routed attention; routed regions are those of a BiFormer")
    if image.dim() != 4 or image.shape[0] != 1:
        raise ValueError(f"routed_regions takes one image [1, C, H, W], got shape {list(image.shape)}")
    x, y = check_position(position, image.shape[2], image.shape[3])
    with frozen(model), torch.no_grad():
        with record(model) as recording:
            model(image)
        return regions_at(recording, x, y)


def regions_at(recording: Recording, x: int, y: int) -> list[RoutedRegions]:
    """Routed regions of a recorded image for the pixel in column ``x`` and row ``y``, one entry per layer."""
    layers = [attention for attention in recording.attention() if attention.kind in ("routed", "dense")]
    return [_regions_of(layer, recording.grid(layer.stage, layer.size), x, y) for layer in layers]


def _regions_of(attention: Attention, grid: Grid, x: int, y: int) -> RoutedRegions:
    row, column = grid.cell(x, y, attention.size)
    mask = grid.spread(attention.at(row, column)[0].mean(0))
    if attention.table is None or attention.region is None:
        query = grid.box((row, row + 1), (column, column + 1))
        whole = grid.box((0, attention.size[0]), (0, attention.size[1]))
        return RoutedRegions(attention.layer, attention.stage, query, (whole,), mask)
    height, width = attention.region
    columns = attention.padded[1] // width

    def box(number: int) -> Box:
        i, j = divmod(number, columns)
        return grid.box((i * height, (i + 1) * height), (j * width, (j + 1) * width))

    own = row // height * columns + column // width
    boxes = [box(number) for number in attention.table[0, own].tolist()]
    seen = tuple(b for b in boxes if b[0] < b[2] and b[1] < b[3])
    return RoutedRegions(attention.layer, attention.stage, box(own), seen, mask)
