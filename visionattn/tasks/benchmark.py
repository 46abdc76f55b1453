"""Speed of attention layers side by side, on whatever machine this is."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from visionattn.layers import HiLoAttention, WindowAttention, multi_head_attention
from visionattn.tasks.benchmark_models import DTYPES
from visionattn.tasks.records import markdown, origin
from visionattn.tasks.timing import times_in_turn


class SpatialReductionAttention(nn.Module):
    """Attention of every pixel to the map convolved with a stride, as in PVT (arXiv:2102.12122); a peer to time."""

    def __init__(self, dim: int, num_heads: int, reduction: int = 2):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduce, self.norm = nn.Conv2d(dim, dim, reduction, stride=reduction), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.norm(self.reduce(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
        k, v = self.kv(reduced).chunk(2, dim=-1)
        out = multi_head_attention(self.q(x).flatten(1, 2), k, v, self.num_heads)
        return self.proj(out).view(x.shape)


class DenseAttention(nn.Module):
    """Attention of every pixel to the whole map; a peer to time."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        return self.proj(multi_head_attention(q, k, v, self.num_heads)).view(x.shape)


def benchmark_attention(size: int, dim: int, num_heads: int, batch: int, rounds: int, device: str, dtype: str) -> str:
    """Time HiLo attention beside attention in windows, with spatial reduction, and over the whole map.

    Args:
        size: Side of the map.
        dim: Channels.
        num_heads: Attention heads.
        batch: Maps at once.
        rounds: Times that each layer is called.
        device: ``cpu`` or ``cuda``.
        dtype: Name of the numbers' type.

    Returns:
        A Markdown table.
    """
    layers: dict[str, nn.Module] = {
        "windows of 7": WindowAttention(dim, num_heads, 7),
        "HiLo, alpha 0.9": HiLoAttention(dim, num_heads, alpha=0.9),
        "HiLo, alpha 0.5": HiLoAttention(dim, num_heads, alpha=0.5),
        "spatial reduction by 2": SpatialReductionAttention(dim, num_heads),
        "whole map": DenseAttention(dim, num_heads),
    }
    x = torch.randn(batch, size, size, dim, device=device, dtype=DTYPES[dtype])
    for layer in layers.values():
        layer.eval().to(device, DTYPES[dtype])
    calls: dict[str, Callable[[], object]] = {name: lambda layer=layer: layer(x) for name, layer in layers.items()}
    with torch.inference_mode():
        seconds = times_in_turn(calls, rounds, device)
    first = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        figures = 1e3 * median, 1e3 * min(values), batch / median, first / median
        rows.append([f"`{name}`", *(f"{x:.{1 if i == 2 else 2}f}" for i, x in enumerate(figures))])
    table = markdown(("", "median ms", "fastest ms", "maps/s", "times as fast as the first"), rows)
    what = f"Map {size}x{size}, {dim} channels, {num_heads} heads, batch {batch}, {dtype}"
    where = origin(device)
    return f"{table}\n\n{what}, {where['device']}, {rounds} rounds in turn; PyTorch {where['torch']}."
