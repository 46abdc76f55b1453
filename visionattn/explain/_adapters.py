"""What each kind of attention layer computes, brought to the form of ``Attention``.

An adapter takes the module and its inputs, in float32 at least, and gives the arguments of one ``Attention`` for each
kind of heads; ``width`` is the number of output channels that belong to it, ``make`` the class. Projections are the
module's own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.explain.attention import DynamicKernels, LinearAttention
from visionattn.layers import (
    ContextMixing,
    DualGatedAttention,
    HiLoAttention,
    NeighborhoodAttention,
    RoutingAttention,
    WindowAttention,
)
from visionattn.layers.context_mixing import _enlarge, _legal_size, _shrink
from visionattn.layers.dual_gated_attention import rotary_table
from visionattn.models.biformer import DenseAttention
from visionattn.models.davit import ChannelAttention
from visionattn.models.patnet import DistanceAttention, distance_buckets
from visionattn.ops import crop, pad_to_at_least, pad_to_multiple, region_mean, topk_regions
from visionattn.ops.neighborhood.reference import windows
from visionattn.ops.state.reference import rotate

Parts = list[dict[str, Any]]


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in float32 at least, whatever the model's precision; one of another class as it is."""
    if type(layer) is not nn.Linear:
        return layer(x).to(x.dtype)
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


def _routed(module: RoutingAttention, x: Tensor) -> Parts:
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


def _dense(module: DenseAttention, x: Tensor) -> Parts:
    q, k, v = (_split_heads(t, module.num_heads) for t in _linear(module.qkv, x).chunk(3, dim=-1))
    lepe, sides = _depthwise(module.lepe, x), _sides(x)

    def finish(mixed: Tensor) -> Tensor:
        return _linear(module.proj, mixed + lepe)

    found = dict(kind="dense", size=sides, padded=sides, scale=float(q.shape[3]) ** -0.5, finish=finish)
    return [found | dict(query=q, key=k, value=v)]


def _windowed(module: WindowAttention, x: Tensor) -> Parts:
    size, x = _sides(x), pad_to_multiple(x, module.window_size)
    padded, side = _sides(x), module.window_size
    q, k, v = (_split_heads(t, module.num_heads) for t in _linear(module.qkv, x).chunk(3, dim=-1))
    number = _cells(padded, (side, side), x.device)

    def finish(mixed: Tensor) -> Tensor:
        return _linear(module.proj, crop(mixed, *size))

    found = dict(kind="window", size=size, padded=padded, scale=float(q.shape[3]) ** -0.5, finish=finish)
    return [found | dict(query=q, key=k, value=v, mask=lambda queries: number[queries][:, None] == number)]


def _neighborhood(module: NeighborhoodAttention, x: Tensor) -> Parts:
    size, span = _sides(x), module.kernel_size * module.dilation
    x = pad_to_at_least(x, span, span)
    padded = _sides(x)
    q, k, v = (_split_heads(t, module.num_heads) for t in _linear(module.qkv, x).chunk(3, dim=-1))
    # of every pair of positions of one axis: whether the second is in the first one's window, and at which offset
    seen, offset = [], []
    for length in padded:
        members, offsets = windows(length, module.kernel_size, module.dilation, x.device)
        seen.append(torch.zeros(length, length, dtype=torch.bool, device=x.device).scatter_(1, members, True))
        offset.append(torch.zeros(length, length, dtype=torch.long, device=x.device).scatter_(1, members, offsets))

    def axes(pair: list[Tensor], queries: Tensor) -> tuple[Tensor, Tensor]:
        return pair[0][queries // padded[1]][:, :, None], pair[1][queries % padded[1]][:, None, :]

    def mask(queries: Tensor) -> Tensor:
        rows, columns = axes(seen, queries)
        return (rows & columns).flatten(1)

    def bias(queries: Tensor) -> Tensor:
        return module.rpb.to(x.dtype)[:, *axes(offset, queries)].flatten(2)

    def finish(mixed: Tensor) -> Tensor:
        return _linear(module.proj, crop(mixed, *size))

    found = dict(kind="neighbourhood", size=size, padded=padded, scale=float(q.shape[3]) ** -0.5, finish=finish)
    return [found | dict(query=q, key=k, value=v, mask=mask, bias=bias)]


def _hilo(module: HiLoAttention, x: Tensor) -> Parts:
    size, side = _sides(x), module.window_size
    x = pad_to_multiple(x, side)
    padded = _sides(x)
    number = _cells(padded, (side, side), x.device)
    parts: Parts = []
    if module.high_qkv is not None:
        q, k, v = (_split_heads(t, module.high_heads) for t in _linear(module.high_qkv, x).chunk(3, dim=-1))
        parts.append(dict(kind="high", query=q, key=k, value=v, mask=lambda rows: number[rows][:, None] == number))
    if module.low_q is not None:
        pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        # every pixel gets its window's key: the softmax then gives it an equal share of the window's weight
        k, v = (
            _split_heads(t, module.low_heads)[:, :, number] for t in _linear(module.low_kv, pooled).chunk(2, dim=-1)
        )
        q = _split_heads(_linear(module.low_q, x), module.low_heads)
        parts.append(dict(kind="low", query=q, key=k, value=v))
    for part in parts:
        proj = module.high_proj if part["kind"] == "high" else module.low_proj

        def finish(mixed: Tensor, proj: nn.Module = proj) -> Tensor:
            return _linear(proj, crop(mixed, *size))

        scale = float(part["query"].shape[3]) ** -0.5
        part |= dict(size=size, padded=padded, scale=scale, finish=finish, width=proj.out_features)
    return parts


def _distance(module: DistanceAttention, x: Tensor) -> Parts:
    size = _sides(x)
    q, k, v = (_split_heads(t, module.num_heads) for t in _linear(module.qkv, x).chunk(3, dim=-1))
    buckets = distance_buckets(*size, x.device)

    def bias(queries: Tensor) -> Tensor:
        return module.bias_table.to(x.dtype)[:, buckets[queries]]

    def finish(mixed: Tensor) -> Tensor:
        return _linear(module.proj, mixed)

    found = dict(kind="distance", size=size, padded=size, scale=module.scale, bias=bias, finish=finish)
    return [found | dict(query=q, key=k, value=v)]


def _linear_attention(module: DualGatedAttention, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Parts:
    size, heads = _sides(x), module.num_heads
    q, k = (F.elu(t) + 1 for t in _linear(module.qk, x).chunk(2, dim=-1))
    v = _linear(module.v_expand, F.silu(_linear(module.v_reduce, x)))
    products = (q * k.mean(dim=(1, 2), keepdim=True)).unflatten(-1, (heads, -1)).sum(dim=-1)  # [B, H, W, heads]
    divisors = products.flatten(1, 2).transpose(1, 2)[..., None] + 1e-6
    cos, sin = (t.to(x.dtype) for t in rotation or rotary_table(x))
    q, k = (_split_heads(rotate(t.unflatten(-1, (heads, -1)), cos, sin).flatten(3), heads) for t in (q, k))
    lepe = _depthwise(module.lepe, v)

    found = dict(kind="linear", size=size, padded=size, scale=1 / (size[0] * size[1]), make=LinearAttention)
    found |= dict(query=q, key=k, value=_split_heads(v, heads))
    return [found | dict(bias=lambda queries: divisors[:, :, queries], finish=lambda mixed: mixed + lepe)]


def _context_mixing(module: ContextMixing, value: Tensor, query: Tensor, context: Tensor) -> Parts:
    size = value.shape[2], value.shape[3]
    H, W = _legal_size(*size, module.kernel_size)
    value, query, context = (_enlarge(x.contiguous(), H, W) for x in (value, query, context))
    groups, half = module.groups, value.shape[1] // 2
    q = _map_layers(module.query, query).flatten(2).unflatten(1, (groups, -1))  # [B, groups, C / 2g, N]
    k = _map_layers(module.key, context).flatten(2).unflatten(1, (groups, -1)) * module.scale
    logits = _linear(module.taps, q.transpose(2, 3) @ k)  # [B, groups, N, taps]
    parts: Parts = []
    sides = (module.small_kernel, module.kernel_size)
    for i, part in enumerate(logits.split([side**2 for side in sides], dim=-1)):
        (rows, y), (columns, x) = (windows(length, sides[i], 1, value.device) for length in (H, W))
        table = (module.bias_large if i else module.bias_small).to(value.dtype)
        bias = table[:, y[:, None, :, None], x[None, :, None, :]].flatten(3, 4).flatten(1, 2)  # [groups, N, taps]
        pixels = (rows[:, None, :, None] * W + columns[None, :, None, :]).flatten(2, 3).flatten(0, 1)  # [N, taps]
        own = value[:, i * half : (i + 1) * half].flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
        found = dict(kind="large kernel" if i else "small kernel", query=part + bias, key=pixels, value=own)
        parts.append(found | dict(size=size, padded=(H, W), scale=1.0, width=half, make=DynamicKernels))
    for part in parts:
        part["finish"] = lambda mixed: _shrink(mixed.permute(0, 3, 1, 2), *size).permute(0, 2, 3, 1)
    return parts


def channel_mixing(module: ChannelAttention, x: Tensor) -> dict[str, Any]:
    """The arguments of ``ChannelMixing`` for a layer ``[B, H, W, C]``."""
    q, k, v = (_split_heads(t, module.num_heads) for t in _linear(module.qkv, x).chunk(3, dim=-1))
    weights = (module.scale * k.transpose(2, 3) @ v).softmax(dim=-1)  # [B, heads, head_dim, head_dim]
    return dict(weights=weights, query=q, finish=lambda mixed: _linear(module.proj, mixed))


def _map_layers(layers: nn.Module, x: Tensor) -> Tensor:
    """Convolutions of ``[B, C, H, W]`` in the precision of ``x``, other layers as they are."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            x = F.conv2d(x, layer.weight.to(x.dtype), bias, layer.stride, layer.padding, groups=layer.groups)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, var, weight, bias = (
                t.to(x.dtype) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            )
            x = F.batch_norm(x, mean, var, weight, bias, eps=layer.eps)
        else:
            x = layer(x)
    return x


ADAPTERS: dict[type, Callable[..., Parts]] = {
    RoutingAttention: _routed,
    DenseAttention: _dense,
    WindowAttention: _windowed,
    NeighborhoodAttention: _neighborhood,
    HiLoAttention: _hilo,
    DistanceAttention: _distance,
    DualGatedAttention: _linear_attention,
}
"""Layers ``[B, H, W, C]`` whose pixels attend to pixels."""

KERNELS: dict[type, Callable[..., Parts]] = {ContextMixing: _context_mixing}
"""Layers ``[B, C, H, W]`` whose pixels have kernels of their own."""
