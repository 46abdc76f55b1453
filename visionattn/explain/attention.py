"""The weights of attention layers, recomputed from their inputs and their own projections.

Fused kernels never form these weights, so nothing can be read from them. Every layer here is brought to one form: over
the pixels of the layer's (padded) map a query has scores with all keys, some are masked, a bias may be added, and a
softmax follows. Rows of the matrix are made when they are asked for; all of it would be large.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.layers import RoutingAttention
from visionattn.models.biformer import DenseAttention
from visionattn.ops import crop, pad_to_multiple, region_mean, topk_regions

ROWS = 256  # of the matrix of weights at once: 256 queries of a map of 128 x 128 are 16 MB per head


@dataclass
class Attention:
    """Attention weights of one layer for one batch.

    Shapes: ``N = H_pad * W_pad`` pixels of the padded map, row by row.

    Args:
        layer: Name of the module in the model.
        stage: Stage of the module, counted from 1; 0 for modules outside the stages.
        kind: ``routed``, ``dense``, ``neighbourhood``, ``window``, ``high``, ``low``, ``distance`` or ``linear``.
        size: Height and width of the map.
        padded: Height and width of the padded map.
        query: ``[B, heads, N, head_dim]``.
        key: ``[B, heads, N, head_dim]``.
        value: ``[B, heads, N, value_dim]``.
        scale: Factor on the dot products.
        finish: From the mixed values ``[B, H_pad, W_pad, heads * value_dim]`` to the layer's output ``[B, H, W, C]``.
        expected: What the layer itself gave, ``[B, H, W, C]``.
        mask: From queries ``[Q]`` to the keys they see, bool, broadcastable to ``[B, heads, Q, N]``.
        bias: From queries to what is added to the scores, broadcastable to the same.
        table: Of routed attention the regions listed for each query region, ``[B, P, topk]``.
        region: Of routed attention the height and width of a region in pixels of the map.
    """

    layer: str
    stage: int
    kind: str
    size: tuple[int, int]
    padded: tuple[int, int]
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    finish: Callable[[Tensor], Tensor]
    expected: Tensor
    mask: Callable[[Tensor], Tensor] | None = None
    bias: Callable[[Tensor], Tensor] | None = None
    table: Tensor | None = None
    region: tuple[int, int] | None = None

    @property
    def heads(self) -> int:
        """Number of heads."""
        return self.query.shape[1]

    def weights(self, queries: Tensor) -> Tensor:
        """What each query attends to.

        Args:
            queries: Pixels of the padded map, numbered row by row, ``[Q]``.

        Returns:
            ``[B, heads, Q, H_pad, W_pad]``. The weights of a query sum to 1, but for linear attention, whose
            weights may also be negative. A key that stands for several pixels (``low``) is shared out among them.
        """
        return self._rows(queries).unflatten(-1, self.padded)

    def at(self, row: int, column: int) -> Tensor:
        """Weights of the query at one pixel of the map, over the map without its padding, ``[B, heads, H, W]``."""
        query = torch.tensor([row * self.padded[1] + column], device=self.query.device)
        return self.weights(query)[:, :, 0, : self.size[0], : self.size[1]]

    def output(self) -> Tensor:
        """The layer's output made from the recomputed weights, ``[B, H, W, C]``."""
        parts = []
        for queries in torch.arange(self.query.shape[2], device=self.query.device).split(ROWS):
            parts.append(self._rows(queries) @ self.value)
        mixed = torch.cat(parts, dim=2)  # [B, heads, N, value_dim]
        return self.finish(mixed.transpose(1, 2).flatten(2).unflatten(1, self.padded))

    def error(self) -> float:
        """Largest difference between ``output()`` and what the layer gave, over the latter's largest value."""
        difference = (self.output() - self.expected).abs().max()
        return (difference / self.expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)).item()

    def _rows(self, queries: Tensor) -> Tensor:
        """Weights ``[B, heads, Q, N]``."""
        scores = self.scale * self.query[:, :, queries] @ self.key.transpose(2, 3)
        if self.bias is not None:
            scores = scores + self.bias(queries)
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask(queries), float("-inf"))
        return scores.softmax(dim=-1)


class LinearAttention(Attention):
    """Weights of linear attention: products of positive features, turned by the angles of their pixels, over a sum.

    The sum is taken before the turn, so weights may be negative and need not sum to 1. ``query`` and ``key`` are the
    turned features, ``bias`` gives the divisors ``[B, heads, Q, 1]``.
    """

    def _rows(self, queries: Tensor) -> Tensor:
        assert self.bias is not None
        return self.scale * self.query[:, :, queries] @ self.key.transpose(2, 3) / self.bias(queries)


@dataclass
class ChannelMixing:
    """Attention between the channels of one layer.

    Args:
        layer: Name of the module in the model.
        stage: Stage of the module, counted from 1; 0 for modules outside the stages.
        weights: Row ``i`` mixes the channels of a head's queries to its output channel ``i``,
            ``[B, heads, head_dim, head_dim]``; rows sum to 1.
        query: ``[B, heads, N, head_dim]``.
        finish: From the mixed queries ``[B, H, W, C]`` to the layer's output.
        expected: What the layer itself gave, ``[B, H, W, C]``.
    """

    layer: str
    stage: int
    weights: Tensor
    query: Tensor
    finish: Callable[[Tensor], Tensor]
    expected: Tensor

    def output(self) -> Tensor:
        """The layer's output made from the recomputed weights, ``[B, H, W, C]``."""
        mixed = (self.query @ self.weights.transpose(2, 3)).transpose(1, 2).flatten(2)
        return self.finish(mixed.view(*self.expected.shape[:3], -1))


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in float32 at least, whatever the model's precision."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _depthwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A depthwise convolution of ``[B, H, W, C]`` in the precision of ``x``."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    y = F.conv2d(x.permute(0, 3, 1, 2), layer.weight.to(x.dtype), bias, padding=layer.padding, groups=layer.groups)
    return y.permute(0, 2, 3, 1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B, heads, N, C / heads]``."""
    return x.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2)


def _sides(x: Tensor) -> tuple[int, int]:
    return x.shape[1], x.shape[2]


def _cells(padded: tuple[int, int], side: tuple[int, int], device: torch.device) -> Tensor:
    """Number of the window or region of every pixel, windows numbered row by row, ``[N]``."""
    rows, columns = (torch.arange(n, device=device) // s for n, s in zip(padded, side, strict=True))
    return (rows[:, None] * (padded[1] // side[1]) + columns).flatten()


def _routed(module: RoutingAttention, x: Tensor) -> list[dict[str, Any]]:
    map_size, x = _sides(x), pad_to_multiple(x, module.num_regions)
    padded, dim = _sides(x), x.shape[3]
    region = (padded[0] // module.num_regions, padded[1] // module.num_regions)
    qkv = _linear(module.qkv, x)
    means = region_mean(qkv[..., : 2 * dim].contiguous(), region).chunk(2, dim=-1)
    table = topk_regions(*means, module.topk)[:, 0].long()  # [B, P, topk]
    number = _cells(padded, region, x.device)
    listed = torch.zeros(len(table), table.shape[1], table.shape[1], dtype=torch.bool, device=x.device)
    listed.scatter_(2, table, True)
    q, k, v = qkv.chunk(3, dim=-1)
    lepe = _depthwise(module.lepe, v)

    def mask(queries: Tensor) -> Tensor:
        return listed[:, number[queries]][:, None, :, number]

    def finish(mixed: Tensor) -> Tensor:
        return _linear(module.proj, crop(mixed + lepe, *map_size))

    heads = [_split_heads(t, module.num_heads) for t in (q, k, v)]
    found = dict(kind="routed", size=map_size, padded=padded, scale=module.scale, finish=finish, mask=mask)
    return [found | dict(query=heads[0], key=heads[1], value=heads[2], table=table, region=region)]


def _dense(module: DenseAttention, x: Tensor) -> list[dict[str, Any]]:
    q, k, v = (_split_heads(t, module.num_heads) for t in _linear(module.qkv, x).chunk(3, dim=-1))
    lepe, sides = _depthwise(module.lepe, x), _sides(x)

    def finish(mixed: Tensor) -> Tensor:
        return _linear(module.proj, mixed + lepe)

    found = dict(kind="dense", size=sides, padded=sides, scale=float(q.shape[3]) ** -0.5, finish=finish)
    return [found | dict(query=q, key=k, value=v)]


ADAPTERS: dict[type, Callable[[Any, Tensor], list[dict[str, Any]]]] = {
    RoutingAttention: _routed,
    DenseAttention: _dense,
}
