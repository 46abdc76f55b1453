"""Routed attention beside the published gather, dense attention and FlexAttention."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from visionattn.ops import routed_attention
from visionattn.ops.routing.reference import split_regions
from visionattn.tasks.operator_forms import (
    DENSE,
    DENSE_FORM,
    FLEX,
    OURS,
    Data,
    Form,
    Operator,
    Pair,
    Prepared,
    attention_floors_ms,
    generator,
    output,
)

GATHER = "gather"
_FLEX_BLOCK = 64  # tokens of the smallest block that FlexAttention's kernels walk over on an H100


class Shape(NamedTuple):
    """A call: batch, side of the map, heads, side of a region, entries of a list, channels of a head."""

    batch: int
    side: int
    heads: int
    region: int
    topk: int
    dim: int = 32


SHAPES = {
    "biformer stage 1": Shape(128, 56, 2, 8, 1),
    "biformer stage 2": Shape(128, 28, 4, 4, 4),
    "biformer stage 3": Shape(128, 14, 8, 2, 16),
    "112x112": Shape(16, 112, 2, 16, 4),
    "224x224, topk 8": Shape(4, 224, 2, 32, 8),
    "224x224, topk 16": Shape(4, 224, 2, 32, 16),
}
_GATHER_MS: tuple[Pair, ...] = (
    (0.790, 5.24), (0.994, 4.20), (1.711, 5.34), (2.294, 8.07), (19.03, 44.9), (24.64, 74.6)
)  # fmt: skip


def _regions(x: Tensor, shape: Shape) -> Tensor:
    """``[B, H, W, ...]`` to ``[B, P, T, ...]``, region by region."""
    return split_regions(x, (shape.region, shape.region)).flatten(3, 4).flatten(1, 2)


def _index(data: Data) -> Tensor:
    assert data.table is not None
    return data.table


def ours(data: Data, shape: Shape) -> Prepared:
    """The operator of this package, on slices of a packed projection ``[B, H, W, 3, heads, head_dim]``."""
    region, index = (shape.region, shape.region), _index(data)
    return Prepared(list(data.batched[0].unbind(3)), lambda q, k, v: routed_attention(q, k, v, index, region)[0])


def gather_form(data: Data, shape: Shape) -> Prepared:
    """The core of the published code: chosen regions gathered as copies, then dense attention region by region.

    There the map is cut into regions before the projection, so its results come as ``[B, P, T, C]`` with keys and
    values side by side, and the list as int64.
    """
    packed = data.batched[0]
    B, side, heads, region, d = packed.shape[0], shape.side, shape.heads, shape.region, shape.dim
    n, T, C = side // region, region**2, heads * d
    chosen = _index(data)[:, 0].long()[..., None, None].expand(-1, -1, -1, T, 2 * C)

    def attend(q: Tensor, kv: Tensor) -> Tensor:
        kv = kv[:, None].expand(-1, n * n, -1, -1, -1).gather(2, chosen)  # [B, P, topk, T, 2C]
        k, v = (x.unflatten(4, (heads, d)).flatten(2, 3).flatten(0, 1) for x in kv.split(C, dim=-1))
        q = q.unflatten(3, (heads, d)).flatten(0, 1).transpose(1, 2)  # [B*P, heads, T, d]
        scores = (q * d**-0.5) @ k.permute(0, 2, 3, 1)
        out = scores.softmax(dim=-1) @ v.transpose(1, 2)
        out = out.unflatten(2, (region, region)).unflatten(0, (B, n, n))  # [B, rows, columns, heads, rh, rw, d]
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, side, side, heads, d)

    return Prepared(list(_regions(packed, shape).flatten(3).split([C, 2 * C], dim=-1)), attend)


def block_mask(index: Tensor, shape: Shape) -> BlockMask:
    """The table ``[B, 1, P, K]`` as FlexAttention takes it, for tokens in the order of the regions.

    Regions that are blocks of its kernels are listed as such; smaller ones are looked up token by token.
    """
    B, _, P, _ = index.shape
    T = shape.region**2
    table = torch.zeros((B, P, P), dtype=torch.bool, device=index.device).scatter_(2, index[:, 0].long(), True)

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[b, query // T, key // T]

    if T < _FLEX_BLOCK:
        return create_block_mask(mask, B, None, P * T, P * T, device=index.device)
    count = table.sum(dim=-1, dtype=torch.int32)[:, None]
    blocks = table.int().argsort(dim=-1, descending=True, stable=True).int()[:, None].contiguous()
    # none of the blocks is cut by the mask
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(blocks), count, blocks, BLOCK_SIZE=(T, T), mask_mod=mask
    )


def flex_form(data: Data, shape: Shape) -> Prepared:
    """FlexAttention, compiled, on tokens that were brought into the order of the regions before the clock starts."""
    torch.compiler.reset()  # it compiles anew for every shape, and gives up after some
    mask, compiled = block_mask(_index(data), shape), torch.compile(flex_attention, dynamic=False)
    inputs = [_regions(x, shape).flatten(1, 2).transpose(1, 2).contiguous() for x in data.batched[0].unbind(3)]
    n = shape.side // shape.region

    def restore(out: Tensor) -> Tensor:
        out = out.transpose(1, 2).unflatten(1, (n, n, shape.region, shape.region))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    return Prepared(inputs, lambda q, k, v: compiled(q, k, v, block_mask=mask), restore)


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    """Random packed projection ``[B, H, W, 3, heads, d]``, table ``[B, 1, P, topk]``, gradient of the output."""
    drawn = generator(device)
    size = (shape.batch, shape.side, shape.side, 3, shape.heads, shape.dim)
    packed = torch.empty(size, device=device, dtype=dtype).normal_(generator=drawn)
    regions = (shape.side // shape.region) ** 2
    order = torch.rand(shape.batch, 1, regions, regions, device=device, generator=drawn).argsort(-1)
    weights = torch.empty_like(packed[:, :, :, 0]).normal_(generator=drawn)
    index = order[..., : shape.topk].int().contiguous()
    return Data((packed.requires_grad_(),), weights, table=index)


def floors(shape: Shape, itemsize: int) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward."""
    queries = shape.batch * shape.heads * shape.side**2
    return attention_floors_ms(queries * shape.dim * itemsize, queries * shape.topk * shape.region**2)


_EXACT = output(ours)
OPERATOR = Operator(
    sets={"default": lambda: SHAPES},
    forms={
        OURS: Form(ours, _EXACT, ours=True, images=1),
        GATHER: Form(gather_form, _EXACT, images=1),
        DENSE: DENSE_FORM,
        FLEX: Form(flex_form, _EXACT, images=1),
    },
    inputs=inputs,
    floors=floors,
    published={GATHER: dict(zip(SHAPES, _GATHER_MS, strict=True))},
)
