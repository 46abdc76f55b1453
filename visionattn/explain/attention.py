"""The weights of attention layers in one form, row by row.

Over the pixels of a layer's (padded) map a query has scores with all keys, some are masked, a bias may be added, and a
softmax follows. Rows of the matrix are made when they are asked for; all of it would be large.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of the matrix of weights at once: 256 queries of a map of 128 x 128 are 16 MB per head

HALVES = ("high", "low", "small kernel", "large kernel")


@dataclass
class Attention:
    """Attention weights of one layer for one batch.

    Shapes: ``N = H_pad * W_pad`` pixels of the padded map, row by row.

    Args:
        layer: Name of the module in the model.
        stage: Stage of the module, counted from 1; 0 for modules outside the stages.
        kind: ``routed`` or ``dense`` (BiFormer), ``neighbourhood`` (NAT), ``window`` (DaViT), ``high`` or ``low``
            (LITv2), ``distance`` (PATNet), ``linear`` (LGViT), ``small kernel`` or ``large kernel`` (OverLoCK).
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

    @property
    def name(self) -> str:
        """The layer, and which half of it where a layer has two kinds of heads."""
        return f"{self.layer}.{self.kind.replace(' ', '_')}" if self.kind in HALVES else self.layer

    @torch.no_grad()
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

    @torch.no_grad()
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
    turned features; ``bias`` gives the divisors, ``[B, heads, Q, 1]``.

    Reference: HER-Seg, arXiv:2504.06205.
    """

    def _rows(self, queries: Tensor) -> Tensor:
        assert self.bias is not None
        return self.scale * self.query[:, :, queries] @ self.key.transpose(2, 3) / self.bias(queries)


class DynamicKernels(Attention):
    """Kernels of a dynamic convolution as weights over the map, one kernel per pixel and group of channels.

    ``query`` holds logits of the taps, relative positions included, ``[B, groups, N, taps]``; ``key`` the pixels that
    the taps lie on, ``[N, taps]``. Windows are moved inward at the borders. Where the layer enlarges a small map,
    ``padded`` is the size that it works at.

    Reference: ContMix of OverLoCK, arXiv:2502.20087.
    """

    def kernel(self, row: int, column: int) -> Tensor:
        """The kernel at one pixel of the map, ``[B, groups, side, side]``; each sums to 1."""
        taps = self.query[:, :, self._number(row, column)].softmax(dim=-1)
        side = round(taps.shape[-1] ** 0.5)
        return taps.unflatten(-1, (side, side))

    def at(self, row: int, column: int) -> Tensor:
        """The kernel at one pixel where it lies on the map, ``[B, groups, H, W]``, sum 1."""
        weights = self.weights(torch.tensor([self._number(row, column)], device=self.query.device))[:, :, 0]
        if self.padded == self.size:
            return weights
        weights = F.adaptive_avg_pool2d(weights, self.size)
        return weights / weights.sum(dim=(2, 3), keepdim=True)

    def _number(self, row: int, column: int) -> int:
        """Pixel of the enlarged map in the middle of one of the map."""
        i, j = (int((n + 0.5) * b / a) for n, a, b in zip((row, column), self.size, self.padded, strict=True))
        return i * self.padded[1] + j

    def _rows(self, queries: Tensor) -> Tensor:
        taps = self.query[:, :, queries].softmax(dim=-1)
        rows = taps.new_zeros(*taps.shape[:3], self.padded[0] * self.padded[1])
        return rows.scatter_(3, self.key[queries].expand_as(taps), taps)


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

    @torch.no_grad()
    def output(self) -> Tensor:
        """The layer's output made from the recomputed weights, ``[B, H, W, C]``."""
        mixed = (self.query @ self.weights.transpose(2, 3)).transpose(1, 2).flatten(2)
        return self.finish(mixed.view(*self.expected.shape[:3], -1))
