"""Neighbourhood attention beside NATTEN, FlexAttention, dense attention and attention in windows cut from the map."""

from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from visionattn.layers import NeighborhoodAttention
from visionattn.ops import join_windows, neighborhood_attention, split_windows
from visionattn.ops.neighborhood.reference import windows
from visionattn.tasks.network_shapes import stage_modules
from visionattn.tasks.operator_forms import (
    DENSE,
    DENSE_FORM,
    EAGER,
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

BIAS, NATTEN, APART = "visionattn + bias", "NATTEN", "windows + SDPA"
NETWORKS = ("nat_mini", "nat_t", "nat_s", "nat_b", "dinat_mini", "dinat_t", "dinat_s", "dinat_b", "dinat_l")
_FLEX_BLOCK = 128  # tokens of a block of FlexAttention's kernels


class Shape(NamedTuple):
    """A call: batch, side of the map, heads, channels of a head, side of the window, its dilation and stride."""

    batch: int
    side: int
    heads: int
    dim: int
    kernel: int
    dilation: int = 1
    stride: int = 1

    def name(self) -> str:
        """The shape in words."""
        more = f" dilation {self.dilation}" if self.dilation > 1 else ""
        more += f" stride {self.stride}" if self.stride > 1 else ""
        return f"B{self.batch} {self.side}x{self.side} heads {self.heads}x{self.dim} kernel {self.kernel}{more}"

    def apart(self) -> bool:
        """Whether windows do not overlap and fill the map."""
        return self.dilation == 1 and self.stride == self.kernel and self.side % self.kernel == 0


SHAPES = {
    shape.name(): shape
    for shape in (
        Shape(128, 56, 2, 32, 7),
        Shape(128, 28, 4, 32, 7),
        Shape(128, 14, 8, 32, 7),
        Shape(128, 56, 2, 32, 7, 8),
        Shape(128, 28, 4, 32, 7, 4),
        Shape(128, 56, 4, 32, 13),
        Shape(8, 128, 8, 64, 13),
        Shape(4, 256, 4, 128, 13),
    )
}
# davit_t, stages 1 and 3
WINDOWS = {shape.name(): shape for shape in (Shape(128, 56, 3, 32, 7, 1, 7), Shape(128, 14, 12, 32, 7, 1, 7))}
# NATTEN 0.21.7; it has no bias
_NATTEN_MS: tuple[Pair, ...] = (
    (0.806, 3.56), (0.355, 1.65), (0.133, 0.65), (0.824, 3.62), (0.292, 1.50), (1.272, 6.05), (1.235, 5.26),
    (2.334, 9.56),
)  # fmt: skip
_NONE, _OUT = ("-", "-"), ("out of memory", "out of memory")
_FLEX_MS: tuple[Pair, ...] = (
    (0.937, 3.13), (0.268, 1.07), (0.124, 0.75), _NONE, _NONE, (2.20, 7.87), (2.50, 8.64), _OUT,
)  # fmt: skip
_DENSE_MS: tuple[Pair, ...] = (
    (1.537, 5.16), (0.269, 1.04), (0.058, 0.285), (1.535, 5.16), (0.269, 1.03), (3.04, 10.2), _NONE, _NONE,
)  # fmt: skip


def network_shapes() -> dict[str, Shape]:
    """Distinct calls of the published networks at 224 pixels and batch 128, under the first network that makes them."""
    found: dict[Shape, str] = {}
    for where, side, module in stage_modules(NETWORKS, NeighborhoodAttention):
        layer = cast(NeighborhoodAttention, module)
        dim = layer.proj.in_features // layer.num_heads
        shape = Shape(128, side, layer.num_heads, dim, layer.kernel_size, layer.dilation)
        found.setdefault(shape, f"{where}: {shape.name()}")
    return {name: shape for shape, name in found.items()}


def ours(data: Data, shape: Shape) -> Prepared:
    """The operator of this package, on slices of a packed projection ``[B, H, W, 3, heads, head_dim]``."""
    window: Any = dict(kernel_size=shape.kernel, dilation=shape.dilation, stride=shape.stride)
    return Prepared(list(data.batched[0].unbind(3)), lambda q, k, v: neighborhood_attention(q, k, v, **window))


def biased(data: Data, shape: Shape) -> Prepared:
    """The same with a table of relative positions ``[heads, 2k - 1, 2k - 1]``."""
    window: Any = dict(kernel_size=shape.kernel, dilation=shape.dilation, stride=shape.stride)
    inputs = [*data.batched[0].unbind(3), *data.shared]
    return Prepared(inputs, lambda q, k, v, bias: neighborhood_attention(q, k, v, bias=bias, **window))


def no_natten() -> str:
    """Why NATTEN cannot be called; empty if it can."""
    try:
        natten = import_module("natten")
    except Exception as error:  # its binaries may not fit this PyTorch
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if callable(getattr(natten, "na2d", None)) else "the package natten has no na2d"


def natten_form(data: Data, shape: Shape) -> Prepared:
    """NATTEN's own choice of kernel, on contiguous maps."""
    na2d: Any = import_module("natten").na2d
    inputs = [x.contiguous() for x in data.batched[0].unbind(3)]
    window = dict(kernel_size=(shape.kernel,) * 2, stride=(shape.stride,) * 2, dilation=(shape.dilation,) * 2)
    return Prepared(inputs, lambda q, k, v: na2d(q, k, v, **window))


def token_order(shape: Shape, tile: tuple[int, int], device: torch.device) -> Tensor:
    """Pixels ``[H*W]``, numbered row by row, dilation group by group and tile by tile of a group."""
    i = torch.arange(shape.side, device=device)
    group, member = i % shape.dilation, i // shape.dilation
    axes = (
        (x[:, None], y[None]) for x, y in ((group, group), (member // tile[0], member // tile[1]), (member, member))
    )
    rank = torch.zeros(shape.side, shape.side, dtype=torch.long, device=device)
    for row, column in axes:
        rank = (rank * shape.side + row) * shape.side + column
    return rank.flatten().argsort()


def block_table(shape: Shape, place: Tensor) -> Tensor:
    """Which blocks of keys a block of queries looks into, ``[blocks, blocks]``; ``place [H*W]`` is that of a pixel."""
    near, _ = windows(shape.side, shape.kernel, shape.dilation, place.device, shape.stride)
    keys = (near[:, None, :, None] * shape.side + near[None, :, None, :]).flatten(2).flatten(0, 1)  # [H*W, taps]
    count = -(-len(place) // _FLEX_BLOCK)
    table = torch.zeros(count, count, dtype=torch.bool, device=place.device)
    table[place[:, None].expand_as(keys) // _FLEX_BLOCK, place[keys] // _FLEX_BLOCK] = True
    return table


def block_mask(shape: Shape, order: Tensor) -> BlockMask:
    """The windows as FlexAttention takes them, for tokens in this order.

    Made from the windows: to ask the mask for every pair of pixels takes more memory than a GPU has.
    """
    side, kernel, dilation = shape.side, shape.kernel, shape.dilation
    near, _ = windows(side, kernel, dilation, order.device, shape.stride)
    start, own = near[:, 0], torch.arange(side, device=order.device)
    # positions of one group are neighbours, and another group is further away than any window reaches
    (first, own) = ((x % dilation * side + x // dilation).int() for x in (start, own))
    rows, columns = order // side, order % side
    top, left, row, column = first[rows], first[columns], own[rows], own[columns]

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        y, x = row[key] - top[query], column[key] - left[query]
        return (y >= 0) & (y < kernel) & (x >= 0) & (x < kernel)

    table = block_table(shape, order.argsort())[None, None]
    count = table.sum(dim=-1, dtype=torch.int32)
    blocks = table.int().argsort(dim=-1, descending=True, stable=True).int().contiguous()
    return BlockMask.from_kv_blocks(
        count, blocks, BLOCK_SIZE=_FLEX_BLOCK, mask_mod=mask, seq_lengths=(side * side, side * side)
    )


def flex_form(data: Data, shape: Shape) -> Prepared:
    """FlexAttention, compiled, on tokens row by row or in tiles, whichever order visits fewer blocks."""
    torch.compiler.reset()  # it compiles anew for every shape, and gives up after some
    packed = data.batched[0]
    orders = [token_order(shape, tile, packed.device) for tile in ((1, shape.side), (8, 8))]
    order = min(orders, key=lambda order: int(block_table(shape, order.argsort()).sum()))
    mask, compiled, place = block_mask(shape, order), torch.compile(flex_attention, dynamic=False), order.argsort()
    inputs = [x.flatten(1, 2)[:, order].transpose(1, 2).contiguous() for x in packed.unbind(3)]

    def restore(out: Tensor) -> Tensor:
        return out.transpose(1, 2)[:, place].unflatten(1, (shape.side, shape.side))

    return Prepared(inputs, lambda q, k, v: compiled(q, k, v, block_mask=mask), restore)


def windows_form(data: Data, shape: Shape) -> Prepared:
    """Windows cut from the map, PyTorch's fused attention in each, and the map joined again.

    DaViT and Swin cut the map before its projection, which makes one copy of it. So does this form with the queries;
    keys and values are in windows beforehand, as such a projection leaves them.
    """
    packed, side = data.batched[0], shape.kernel
    B, H, W, _, heads, dim = packed.shape
    _, key, value = split_windows(packed.flatten(3), side).unflatten(2, (3, heads, dim)).transpose(1, 3).unbind(2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = split_windows(query.flatten(3), side).unflatten(2, (heads, dim)).transpose(1, 2)
        out = F.scaled_dot_product_attention(query, key, value)  # [B * windows, heads, pixels, d]
        return join_windows(out.transpose(1, 2).flatten(2), side, B, H, W).unflatten(3, (heads, dim))

    return Prepared([packed[:, :, :, 0], key, value], attend)


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    """Random packed projection ``[B, H, W, 3, heads, d]``, bias ``[heads, 2k - 1, 2k - 1]``, gradient of the output.

    The bias is float32 beside half precision, as autocast leaves it.
    """
    drawn = generator(device)
    size = (shape.batch, shape.side, shape.side, 3, shape.heads, shape.dim)
    packed = torch.empty(size, device=device, dtype=dtype).normal_(generator=drawn)
    entries = 2 * shape.kernel - 1
    bias = torch.empty(shape.heads, entries, entries, device=device, dtype=torch.promote_types(dtype, torch.float32))
    bias.normal_(generator=drawn)
    weights = torch.empty_like(packed[:, :, :, 0]).normal_(generator=drawn)
    return Data((packed.requires_grad_(),), weights, shared=(bias.requires_grad_(),))


def floors(shape: Shape, itemsize: int) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward."""
    queries = shape.batch * shape.heads * shape.side**2
    return attention_floors_ms(queries * shape.dim * itemsize, queries * shape.kernel**2)


_EXACT = output(ours)
OPERATOR = Operator(
    sets={"default": lambda: SHAPES, "networks": network_shapes, "windows": lambda: WINDOWS},
    forms={
        OURS: Form(ours, _EXACT, ours=True),
        BIAS: Form(biased, output(biased), ours=True),
        NATTEN: Form(natten_form, _EXACT, missing=no_natten),
        FLEX: Form(flex_form, _EXACT),
        APART: Form(windows_form, _EXACT, fits=Shape.apart),
        DENSE: DENSE_FORM,
        EAGER: Form(ours, _EXACT, backend="eager"),
    },
    inputs=inputs,
    floors=floors,
    # NATTEN is what this package has to beat, and not always installed
    published={
        form: dict(zip(SHAPES, figures, strict=True))
        for form, figures in ((OURS, _NATTEN_MS), (NATTEN, _NATTEN_MS), (FLEX, _FLEX_MS), (DENSE, _DENSE_MS))
    },
)
