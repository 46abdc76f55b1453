"""How far attention reaches: the mean distance between a query and what it attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from visionattn.explain.attention import ROWS, Attention, DynamicKernels
from visionattn.explain.recording import Recording


@dataclass
class AttentionDistance:
    """Mean attention distances of one layer.

    Args:
        layer: Name of the layer, with the kind of its heads where it has two.
        stage: Stage, counted from 1.
        pixels: Mean distance of each head in pixels of the image, ``[heads]``.
        uniform: The distance if every pixel attended to the whole map alike.
    """

    layer: str
    stage: int
    pixels: Tensor
    uniform: float


@torch.no_grad()
def attention_distances(recording: Recording) -> list[AttentionDistance]:
    """Mean attention distance of every head, dynamic kernels included.

    Distances between the middles of a query's and a key's pixel of the map are weighted by the attention and averaged
    over queries and images. Padding is left out, and the rest of a query's weights scaled to sum 1; negative weights
    (linear attention) count by their size.

    Args:
        recording: A recording of the model's call.

    Returns:
        One entry per layer, or half of it, in the order of computation; empty for models without attention.

    Raises:
        ValueError: The model has not run.

    Reference: Raghu et al., arXiv:2108.08810, after Dosovitskiy et al., arXiv:2010.11929.
    """
    layers = [*recording.attention(), *recording.kernels()]
    return [_distance(layer, recording.grid(layer.stage, layer.size).stride) for layer in layers]


def _distance(layer: Attention, stride: int) -> AttentionDistance:
    enlarged = isinstance(layer, DynamicKernels)  # works at another size, rather than on a map with padding
    H, W = layer.padded if enlarged else layer.size
    pitch = [stride * a / b if enlarged else stride for a, b in zip(layer.size, layer.padded, strict=True)]
    rows, columns = (torch.arange(n, device=layer.query.device) for n in (H, W))
    queries = (rows[:, None] * layer.padded[1] + columns).flatten()
    totals, uniform = layer.query.new_zeros(layer.heads), 0.0
    for part in queries.split(ROWS):
        weights = layer.weights(part)[..., :H, :W].abs()  # [B, heads, Q, H, W]
        weights = weights / weights.sum(dim=(3, 4), keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        dy = (part // layer.padded[1])[:, None] - rows
        dx = (part % layer.padded[1])[:, None] - columns
        distance = ((pitch[0] * dy[:, :, None]) ** 2 + (pitch[1] * dx[:, None, :]) ** 2).to(weights.dtype).sqrt()
        totals += (weights * distance).sum(dim=(3, 4)).mean(0).sum(-1)
        uniform += distance.mean(dim=(1, 2)).sum().item()
    return AttentionDistance(layer.name, layer.stage, totals / len(queries), uniform / len(queries))
