"""The neighbourhood operators registered with PyTorch, with an eager kernel for every device.

The map is cut into tiles (``tiles.py``). Scores of a tile's queries with all keys that any of them reaches are one
matrix product; a tile of -inf and relative position bias is added to it. The backward pass recomputes them from
the log-sum-exp and adds the gradients of a tile's keys to a slice of the map. A step takes as many images and tiles at
once as fit, and tiles are made smaller where one alone would not, so the memory beyond inputs, outputs and gradients
stays below four times the size of key and value.

On a GPU ``visionattn::neighborhood_attention`` hands over to the Triton kernels (``launch.py``); autograd, autocast,
shape inference and FLOP formulas are the same for both.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.ops._dispatch import launcher, register_autocast, use_triton
from visionattn.ops.neighborhood.arguments import check_attention
from visionattn.ops.neighborhood.tiles import Segment, TileClass, slots, tile_classes

_SHARE = 1.5  # of the size of key and value that the buffers of a step may take


class _Step(NamedTuple):
    """Some images and some tiles of one class."""

    kind: TileClass
    images: slice
    tiles: list[tuple[Segment, Segment]]


def _pair(values: Sequence[int] | None) -> tuple[int, int]:
    return (1, 1) if values is None else (values[0], values[1])


def _plan(
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    sides: Sequence[int],
    limit: float,
    d: int,
    stride: tuple[int, int] = (1, 1),
) -> tuple[list[TileClass], int]:
    """Tiles, and how many (image, tile, head) units a step takes, within ``limit`` numbers."""
    for side in sides:
        classes = tile_classes(*size, kernel, dilation, (side, side), stride)
        queries = max(len(c.rows.starts) * len(c.columns.starts) for c in classes)
        keys = max(c.rows.keys * c.columns.keys for c in classes)
        units = int(limit // (5 * queries * d + 4 * keys * d + 4 * queries * keys))
        if units:
            break
    return classes, max(units, 1)


def _steps(classes: list[TileClass], batch: int, units: int) -> Iterator[_Step]:
    images = max(1, min(batch, units))  # an empty batch has no steps
    count = max(1, units // images)
    for kind in classes:
        for first in range(0, len(kind.tiles), count):
            for image in range(0, batch, images):
                yield _Step(kind, slice(image, min(image + images, batch)), kind.tiles[first : first + count])


def _take(x: Tensor, step: _Step, which: str, dtype: torch.dtype) -> Tensor:
    """Tiles of a map ``[B, H, W, heads, d]`` as ``[b, n, heads, queries or keys, d]``."""
    x = x[step.images]
    tiles = [x[:, getattr(row, which), getattr(column, which)] for row, column in step.tiles]
    return torch.stack(tiles, 1).permute(0, 1, 4, 2, 3, 5).flatten(3, 4).to(dtype)


def _put(x: Tensor, step: _Step, tiles: Tensor) -> None:
    """Write ``[b, n, heads, queries, d]`` to the queries that no earlier tile has."""
    rows, columns = step.kind.rows, step.kind.columns
    tiles = tiles.unflatten(3, (len(rows.starts), len(columns.starts))).permute(0, 1, 3, 4, 2, 5).to(x.dtype)
    tiles = tiles[:, :, rows.skip :, columns.skip :]
    for n, (row, column) in enumerate(step.tiles):
        x[step.images, row.query, column.query][:, rows.skip :, columns.skip :] = tiles[:, n]


def _add(x: Tensor, step: _Step, tiles: Tensor) -> None:
    """Add ``[b, n, heads, keys, d]`` to the keys' places in a map."""
    tiles = tiles.unflatten(3, (step.kind.rows.keys, step.kind.columns.keys)).permute(0, 1, 3, 4, 2, 5)
    for n, (row, column) in enumerate(step.tiles):
        x[step.images, row.key, column.key].add_(tiles[:, n])


def _as_map(lse: Tensor) -> Tensor:
    """View ``[B, heads, H, W]`` as a map ``[B, H, W, heads, 1]``."""
    return lse.permute(0, 2, 3, 1).unsqueeze(-1)


def _additive(
    kind: TileClass, kernel: tuple[int, int], bias: Tensor | None, like: Tensor, drop_stale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tile ``[heads or 1, queries, keys]`` of bias and -inf outside the windows, with the slots it was made from."""
    key, relative, stale = slots(kind, kernel, like.device)
    keys = kind.rows.keys * kind.columns.keys
    heads = 1 if bias is None else bias.shape[0]
    tile = like.new_full((heads, len(key), keys), -math.inf)
    entries = like.new_zeros((1, *key.shape)) if bias is None else bias.to(like.dtype).flatten(1)[:, relative]
    tile.scatter_(2, key.expand(heads, -1, -1), entries)
    if drop_stale:  # such queries count once, in the tile before
        tile[:, stale] = -math.inf
    return tile, key, relative


@torch.library.custom_op("visionattn::neighborhood_attention", mutates_args=())
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, heads, head_dim]`` and log-sum-exp ``[B, heads, H, W]``; no ``stride`` is 1 each way."""
    strides = _pair(stride)
    check_attention(query, key, value, bias, kernel_size, dilation, strides)
    if use_triton(query) and launcher("neighborhood").serves(query, key, value, bias, kernel_size):
        return launcher("neighborhood").forward(query, key, value, bias, kernel_size, dilation, scale, strides)
    B, H, W, heads, _ = query.shape
    dtype, kernel = torch.promote_types(query.dtype, torch.float32), _pair(kernel_size)
    out, lse = query.new_empty(query.shape), query.new_empty((B, heads, H, W), dtype=dtype)
    classes, units = _attention_plan(query, kernel, dilation, strides)
    before = None
    for step in _steps(classes, B, units):
        if step.kind is not before:
            before, (tile, _, _) = step.kind, _additive(step.kind, kernel, bias, lse, False)
        scores = (_take(query, step, "query", dtype) * scale) @ _take(key, step, "key", dtype).transpose(3, 4)
        scores.add_(tile)
        total = scores.logsumexp(dim=-1, keepdim=True)
        _put(out, step, scores.sub_(total).exp_() @ _take(value, step, "key", dtype))
        _put(_as_map(lse), step, total)
    return out, lse


def _attention_plan(
    query: Tensor, kernel: tuple[int, int], dilation: Sequence[int], stride: tuple[int, int]
) -> tuple[list[TileClass], int]:
    B, H, W, _, d = query.shape
    itemsize = torch.promote_types(query.dtype, torch.float32).itemsize
    limit = _SHARE * 2 * B * H * W * d * query.element_size() / itemsize  # per head; a step takes all heads
    sides = (8, 4, 2, 1) if max(kernel) >= 7 else (4, 2, 1)
    return _plan((H, W), kernel, _pair(dilation), sides, limit, d, stride)


@neighborhood_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    B, H, W, heads, _ = query.shape
    lse = query.new_empty((B, heads, H, W), dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


@torch.library.custom_op("visionattn::neighborhood_attention_backward", mutates_args=())
def neighborhood_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (empty without one)."""
    strides = _pair(stride)
    if use_triton(query) and launcher("neighborhood").serves(query, key, value, bias, kernel_size):
        *grads, db = launcher("neighborhood").backward(
            grad_out, grad_lse, query, key, value, bias, out, lse, kernel_size, dilation, scale, strides
        )
        return *grads, query.new_empty(0) if db is None else db
    B, dtype, kernel = query.shape[0], lse.dtype, _pair(kernel_size)
    dq = query.new_empty(query.shape)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    classes, units = _attention_plan(query, kernel, dilation, strides)
    before = None
    for step in _steps(classes, B, units):
        if step.kind is not before:
            before, (tile, slot, relative) = step.kind, _additive(step.kind, kernel, bias, lse, True)
        q, go = _take(query, step, "query", dtype) * scale, _take(grad_out, step, "query", dtype)
        k = _take(key, step, "key", dtype)
        delta = (_take(out, step, "query", dtype) * go).sum(dim=-1, keepdim=True)
        delta.sub_(_take(_as_map(grad_lse), step, "query", dtype))
        p = (q @ k.transpose(3, 4)).add_(tile).sub_(_take(_as_map(lse), step, "query", dtype)).exp_()
        _add(dv, step, p.transpose(3, 4) @ go)
        ds = (go @ _take(value, step, "key", dtype).transpose(3, 4)).sub_(delta).mul_(p)
        del p
        _put(dq, step, (ds @ k).mul_(scale))
        _add(dk, step, ds.transpose(3, 4) @ q)
        if dbias is not None:
            taps = ds.sum(dim=(0, 1)).gather(2, slot.expand(len(dbias), -1, -1))  # [heads, queries, taps]
            dbias.flatten(1).index_add_(1, relative.flatten(), taps.flatten(1))
    db = query.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)
    return dq, dk.to(key.dtype), dv.to(value.dtype), db


@neighborhood_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    db = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), db


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, bias, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, bias, *output)


def _attention_vjp(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed block recomputes them and then lets go
    bias = saved[3]
    *grads, db = neighborhood_attention_backward(grad_out, grad_lse, *saved, *ctx.rest)
    return *grads, None if bias is None else db, None, None, None, None


neighborhood_attention.register_autograd(_attention_vjp, setup_context=_attention_setup)
register_autocast(neighborhood_attention, tensors=3)


@register_flop_formula(torch.ops.visionattn.neighborhood_attention)
def _attention_flops(
    query: Any, key: Any, value: Any, bias: Any, kernel_size: Any, dilation: Any, scale: Any, stride: Any = None,
    out_shape: Any = None,
) -> int:  # fmt: skip
    """Two products of every query with the pixels of its window, 2 FLOPs a multiply-add."""
    return 4 * math.prod(query) * math.prod(kernel_size)


@register_flop_formula(torch.ops.visionattn.neighborhood_attention_backward)
def _attention_backward_flops(
    grad_out: Any, grad_lse: Any, query: Any, key: Any, value: Any, bias: Any, out: Any, lse: Any,
    kernel_size: Any, dilation: Any, scale: Any, stride: Any = None, out_shape: Any = None,
) -> int:  # fmt: skip
    """Five products: the scores again, and the gradients of p, v, q and k."""
    return 10 * math.prod(query) * math.prod(kernel_size)
