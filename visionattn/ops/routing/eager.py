"""The routing operators registered with PyTorch, with an eager kernel for every device.

``visionattn::routed_attention`` walks over the query regions in chunks: it gathers the keys and values of one chunk,
runs an online softmax over slices of its region list, and writes the result in place. The backward pass recomputes the
probabilities from the saved log-sum-exp. Regions that are a large part of the map are cut along their pixels, and
gradient sums that are too large along the channels. So the memory beyond inputs, outputs and gradients stays below
twice the size of key and value however long the lists and however large the regions are; a plain gather copies key and
value ``topk`` times.

On a GPU the operators hand over to the Triton kernels (``launch.py``); autograd, autocast, shape inference and FLOP
formulas are the same for both.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.ops._dispatch import launcher, register_autocast, use_triton
from visionattn.ops.routing import reference

# shares of the size of key and value that a chunk and the float32 gradient sums may take; together below 2
_CHUNK_SHARE = 0.75
_SUM_SHARE = 1.0
_MIN_ROWS = 16  # query rows of one tile are not cut below this


class _Tile(NamedTuple):
    """One step of the walk: some (image, head, query region) units, and some query rows of each."""

    batch: Tensor  # [n]
    head: Tensor  # [n]
    region: Tensor  # [n], query region
    rows: slice


class _Walk(NamedTuple):
    """How far one step reaches: units, query rows, entries of the region list, pixels of each listed region."""

    units: int
    rows: int
    slots: int
    pixels: int


def _plan(query: Tensor, key: Tensor, K: int, T: int, T_k: int, buffers: tuple[int, int, int]) -> _Walk:
    """Largest step whose buffers fit.

    ``buffers`` counts float32 copies of (query rows, gathered key rows, scores) that are alive at once.
    """
    itemsize = torch.promote_types(query.dtype, torch.float32).itemsize
    limit = _CHUNK_SHARE * 2 * key.numel() * key.element_size() / itemsize
    per_row, per_key, per_score = buffers[0] * query.shape[4], buffers[1] * query.shape[4], buffers[2]

    def cost(rows: int, slots: int) -> int:
        return rows * per_row + slots * T_k * (per_key + rows * per_score)

    units = int(limit // max(cost(T, K), 1))
    if units:
        return _Walk(units, T, max(K, 1), T_k)
    slots = int((limit - T * per_row) // (T_k * (per_key + T * per_score)))
    if slots >= 1:
        return _Walk(1, T, slots, T_k)
    rows = min(T, max(int(limit / 2 // per_row), _MIN_ROWS))
    pixels = int((limit - rows * per_row) // (per_key + rows * per_score))
    return _Walk(1, rows, 1, min(T_k, max(pixels, 1)))


def _tiles(walk: _Walk, units: range, heads: int, P: int, T: int, device: torch.device) -> Iterator[_Tile]:
    for start in range(units.start, units.stop, walk.units):
        unit = torch.arange(start, min(start + walk.units, units.stop), device=device)
        for row in range(0, T, walk.rows):
            yield _Tile(unit // (heads * P), unit // P % heads, unit % P, slice(row, row + walk.rows))


def _by_region(x: Tensor, region: Sequence[int]) -> Tensor:
    """View ``[B, H, W, heads, d]`` as ``[B, heads, rows, columns, rh, rw, d]``."""
    return reference.split_regions(x, (region[0], region[1])).permute(0, 5, 1, 2, 3, 4, 6)


def _take(x: Tensor, batch: Tensor, head: Tensor, region: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """Copy pixels ``rows`` of regions out of a ``_by_region`` view: ``[..., T, d]`` for index tensors ``[...]``."""
    columns, rh, rw = x.shape[3:6]
    where = (batch, head, region // columns, region % columns)
    if rows.start == 0 and rows.stop >= rh * rw:
        return x[where].flatten(-3, -2).to(dtype)
    pixel = torch.arange(rh * rw, device=x.device)[rows]
    return x[(*(i[..., None] for i in where), pixel // rw, pixel % rw)].to(dtype)


def _put(x: Tensor, tile: _Tile, rows: Tensor) -> None:
    """Write rows ``[n, r, ...]`` of the tile's regions into a ``_by_region`` view of an output."""
    columns, rh, rw = x.shape[3:6]
    where = (tile.batch, tile.head, tile.region // columns, tile.region % columns)
    if rows.shape[1] == rh * rw:
        x[where] = rows.unflatten(1, (rh, rw)).to(x.dtype)
    else:
        pixel = torch.arange(rh * rw, device=x.device)[tile.rows]
        x[(*(i[:, None] for i in where), pixel // rw, pixel % rw)] = rows.to(x.dtype)


def _slots(index: Tensor, tile: _Tile, walk: _Walk, T_k: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Slices ``[n, s]`` of the tile's region lists, which of their entries are no region, and pixels of the regions."""
    table = index[tile.batch, tile.head if index.shape[1] > 1 else 0, tile.region].long()  # [n, K]
    for start in range(0, table.shape[1], walk.slots):
        entries = table[:, start : start + walk.slots]
        for pixel in range(0, T_k, walk.pixels):
            yield entries.clamp(min=0), entries < 0, slice(pixel, pixel + walk.pixels)


def _gather(
    x: Tensor, tile: _Tile, entries: Tensor, absent: Tensor, pixels: slice, partial: bool, dtype: torch.dtype
) -> Tensor:
    """Keys or values of list entries ``[n, s]`` as ``[n, s * t, d]``; zeros where there is no region."""
    rows = _take(x, tile.batch[:, None], tile.head[:, None], entries, pixels, dtype)
    if partial:  # zeroed, or an infinite value of region 0 would come through as inf * 0
        rows.masked_fill_(absent[:, :, None, None], 0.0)
    return rows.flatten(1, 2)


def _scores(q: Tensor, k: Tensor, absent: Tensor, partial: bool) -> Tensor:
    """Dot products ``[n, r, s * t]``, -inf where there is no region."""
    scores = q @ k.transpose(1, 2)
    if partial:
        scores.unflatten(2, (absent.shape[1], -1)).masked_fill_(absent[:, None, :, None], -math.inf)
    return scores


def check_table(index: Tensor, regions: int) -> bool:
    """Refuse entries that name no region; returns whether any entry is -1."""
    if index.numel() == 0:
        return False
    low, high = (int(v) for v in index.aminmax())
    if low < -1 or high >= regions:
        raise ValueError(f"index must lie in [-1, {regions}), the number of key regions, got {low} to {high}")
    return low < 0


@torch.library.custom_op("visionattn::region_mean", mutates_args=())
def region_mean(x: Tensor, region: Sequence[int]) -> Tensor:
    """``[B, H, W, C]`` to ``[B, P, C]``."""
    if use_triton(x) and x.dtype != torch.float64 and x.numel():
        return launcher("routing").region_mean(x, region)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return reference.split_regions(x, (region[0], region[1])).mean(dim=(3, 4), dtype=dtype).flatten(1, 2)


@region_mean.register_fake
def _(x: Tensor, region: Sequence[int]) -> Tensor:
    regions = (x.shape[1] // region[0]) * (x.shape[2] // region[1])
    return x.new_empty((x.shape[0], regions, x.shape[3]), dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("visionattn::region_mean_backward", mutates_args=())
def region_mean_backward(grad: Tensor, height: int, width: int, region: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Each region's gradient, divided by its size, on all its pixels: ``[B, P, C]`` to ``[B, H, W, C]``."""
    rh, rw = region
    share = (grad / (rh * rw)).to(dtype).unflatten(1, (height // rh, width // rw))[:, :, None, :, None]
    return share.expand(-1, -1, rh, -1, rw, -1).reshape(grad.shape[0], height, width, grad.shape[2]).clone()


@region_mean_backward.register_fake
def _(grad: Tensor, height: int, width: int, region: Sequence[int], dtype: torch.dtype) -> Tensor:
    return grad.new_empty((grad.shape[0], height, width, grad.shape[2]), dtype=dtype)


def _region_mean_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.region = inputs
    ctx.height, ctx.width, ctx.dtype = x.shape[1], x.shape[2], x.dtype


def _region_mean_vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return region_mean_backward(grad, ctx.height, ctx.width, ctx.region, ctx.dtype), None


region_mean.register_autograd(_region_mean_vjp, setup_context=_region_mean_setup)


@torch.library.custom_op("visionattn::topk_regions", mutates_args=())
def topk_regions(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """``[B, (heads,) P_q, C]`` and ``[B, (heads,) P_k, C]`` to int32 ``[B, 1 or heads, P_q, topk]``."""
    if use_triton(query) and launcher("routing").serves_topk(query, key):
        return launcher("routing").topk_regions(query, key, topk)
    return reference.topk_regions(query, key, topk)


@topk_regions.register_fake
def _(query: Tensor, key: Tensor, topk: int) -> Tensor:
    heads = query.shape[1] if query.dim() == 4 else 1
    return query.new_empty((query.shape[0], heads, query.shape[-2], topk), dtype=torch.int32)


@torch.library.custom_op("visionattn::routed_attention", mutates_args=())
def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, heads, head_dim]`` and log-sum-exp ``[B, heads, H, W]``."""
    if use_triton(query) and launcher("routing").serves(query, key, value, index, kv_region):
        return launcher("routing").forward(query, key, value, index, q_region, kv_region, scale)
    B, H, W, heads, head_dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty((B, H, W, heads, head_dim))
    lse = query.new_empty((B, heads, H, W), dtype=dtype)
    q, o = _by_region(query, q_region), _by_region(out, q_region)
    k, v = _by_region(key, kv_region), _by_region(value, kv_region)
    # [B, heads, rows, columns, rh, rw, 1]: the log-sum-exp as a map with one channel
    lse_by_region = _by_region(lse.permute(0, 2, 3, 1).unsqueeze(-1), q_region)
    P, T, T_k = index.shape[2], math.prod(q_region), math.prod(kv_region)
    partial = check_table(index, k.shape[2] * k.shape[3])
    walk = _plan(query, key, index.shape[3], T, T_k, buffers=(4, 3, 1))
    for tile in _tiles(walk, range(B * heads * P), heads, P, T, query.device):
        q_rows = _take(q, tile.batch, tile.head, tile.region, tile.rows, dtype) * scale  # [n, r, d]
        top = q_rows.new_full((*q_rows.shape[:2], 1), -math.inf)  # running maximum
        total, acc = torch.zeros_like(top), torch.zeros_like(q_rows)
        for entries, absent, pixels in _slots(index, tile, walk, T_k):
            k_rows = _gather(k, tile, entries, absent, pixels, partial, dtype)
            p = _scores(q_rows, k_rows, absent, partial)  # [n, r, s*t]
            del k_rows
            new_top = torch.maximum(top, p.amax(dim=-1, keepdim=True))
            shift = new_top.masked_fill(new_top == -math.inf, 0.0)  # nothing seen so far: avoid inf - inf
            p.sub_(shift).exp_()
            fade = top.sub_(shift).exp_()
            total.mul_(fade).add_(p.sum(dim=-1, keepdim=True))
            acc.mul_(fade).add_(p @ _gather(v, tile, entries, absent, pixels, partial, dtype))
            top = new_top
        empty = total == 0
        _put(o, tile, acc.div_(total.masked_fill(empty, 1.0)))
        _put(lse_by_region, tile, top + total.log())  # -inf + -inf where the list is empty
    return out, lse


@routed_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, H, W, heads, _ = query.shape
    lse = query.new_empty((B, heads, H, W), dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(query.shape), lse


@torch.library.custom_op("visionattn::routed_attention_backward", mutates_args=())
def routed_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; probabilities are recomputed from ``lse``."""
    if use_triton(query) and launcher("routing").serves(query, key, value, index, kv_region):
        return launcher("routing").backward(
            grad_out, grad_lse, query, key, value, index, out, lse, q_region, kv_region, scale
        )
    B, heads, d = query.shape[0], query.shape[3], query.shape[4]
    dtype = lse.dtype
    grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    q, o, go, dq = (_by_region(x, q_region) for x in (query, out, grad_out, grads[0]))
    k, v, dk, dv = (_by_region(x, kv_region) for x in (key, value, *grads[1:]))
    maps = [_by_region(x.permute(0, 2, 3, 1).unsqueeze(-1), q_region) for x in (lse, grad_lse)]
    P, P_k, T, T_k = index.shape[2], k.shape[2] * k.shape[3], math.prod(q_region), math.prod(kv_region)
    partial = check_table(index, P_k)
    walk = _plan(query, key, index.shape[3], T, T_k, buffers=(8, 5, 2))
    # float32 sums of the key and value gradients, for as many (image, head) pairs at once as fit, or else channels
    pairs = _SUM_SHARE * B * heads * key.element_size() / dtype.itemsize
    group, width = max(1, min(B * heads, int(pairs))), d if pairs >= 1 else max(1, int(pairs * d))
    for first, left in itertools.product(range(0, B * heads, group), range(0, d, width)):
        last, channels = min(first + group, B * heads), slice(left, min(left + width, d))
        sums = torch.zeros((2, (last - first) * P_k, T_k, channels.stop - left), dtype=dtype, device=query.device)
        for tile in _tiles(walk, range(first * P, last * P), heads, P, T, query.device):
            where = tile.batch, tile.head, tile.region, tile.rows
            q_rows, o_rows, go_rows = (_take(x, *where, dtype) for x in (q, o, go))
            lse_rows, glse_rows = (_take(x, *where, dtype) for x in maps)  # [n, r, 1]
            q_rows = q_rows * scale
            delta = (o_rows * go_rows).sum(dim=-1, keepdim=True).sub_(glse_rows)
            del o_rows
            lse_rows = lse_rows.masked_fill(lse_rows == -math.inf, 0.0)  # empty list: exp(-inf - 0) = 0
            dq_rows = torch.zeros_like(q_rows)
            owner = (tile.batch * heads + tile.head - first)[:, None] * P_k
            for entries, absent, pixels in _slots(index, tile, walk, T_k):
                target = (owner + entries).flatten()
                shape = len(target), -1, channels.stop - left
                k_rows = _gather(k, tile, entries, absent, pixels, partial, dtype)
                p = _scores(q_rows, k_rows, absent, partial).sub_(lse_rows).exp_()  # [n, r, s*t]
                sums[1, :, pixels].index_add_(0, target, (p.transpose(1, 2) @ go_rows[..., channels]).view(shape))
                ds = go_rows @ _gather(v, tile, entries, absent, pixels, partial, dtype).transpose(1, 2)
                ds.sub_(delta).mul_(p)
                if left == 0:
                    dq_rows.add_(ds @ k_rows, alpha=scale)
                del k_rows, p
                sums[0, :, pixels].index_add_(0, target, (ds.transpose(1, 2) @ q_rows[..., channels]).view(shape))
            if left == 0:
                _put(dq, tile, dq_rows)
        pair = torch.arange(first, last, device=query.device)
        for total, grad in zip(sums, (dk, dv), strict=True):
            rows = total.view(len(pair), *grad.shape[2:-1], -1).to(grad.dtype)
            grad[pair // heads, pair % heads, ..., channels] = rows
        del sums, total, rows  # or they would live on beside the next ones
    return grads[0], grads[1], grads[2]


@routed_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.q_region, ctx.kv_region, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _attention_vjp(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = routed_attention_backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.q_region, ctx.kv_region, ctx.scale)
    return (*grads, None, None, None, None)


routed_attention.register_autograd(_attention_vjp, setup_context=_attention_setup)


register_autocast(routed_attention, tensors=3)
for _device in ("cpu", "cuda"):
    # the ranking stays in full precision whatever autocast is set to
    topk_regions.register_autocast(_device, torch.float32)


@register_flop_formula(torch.ops.visionattn.routed_attention)
def _attention_flops(
    query: Any, key: Any, value: Any, index: Any, q_region: Any, kv_region: Any, scale: Any, out_shape: Any = None
) -> int:
    """Two products of every query with the pixels of its K regions, 2 FLOPs a multiply-add; routing not counted."""
    B, H, W, heads, d = query
    return 4 * B * H * W * heads * d * index[3] * math.prod(kv_region)


@register_flop_formula(torch.ops.visionattn.routed_attention_backward)
def _attention_backward_flops(
    grad_out: Any, grad_lse: Any, query: Any, key: Any, value: Any, index: Any, out: Any, lse: Any,
    q_region: Any, kv_region: Any, scale: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    """Five products: the scores again, and the gradients of p, v, q and k."""
    return 5 * _attention_flops(query, key, value, index, q_region, kv_region, scale) // 2


@register_flop_formula(torch.ops.visionattn.topk_regions)
def _topk_flops(query: Any, key: Any, topk: Any, out_shape: Any = None) -> int:
    """The product of the descriptors."""
    return 2 * math.prod(query) * key[-2]
