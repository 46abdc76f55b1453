"""Launching the Triton kernels of the routing operators: which program family serves a shape, and its tile sizes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from visionattn.ops._dispatch import KERNEL_DTYPES
from visionattn.ops._launch import Launch, Plans, channels_inside, layout
from visionattn.ops._tiles import Search, Tile, searching
from visionattn.ops.routing import kernels_dense, kernels_listed, kernels_tables, tiles
from visionattn.ops.routing.checks import check_attention
from visionattn.ops.routing.tiles import block

DENSE_TOKENS, DENSE_REGIONS = 256, 64  # largest map that one program holds, and regions that a bit mask has
DENSE_BYTES = 32768  # of its keys in one program; shared memory must hold these and the values
DENSE_GRADS = 8192  # numbers of the keys whose gradients one program can keep in registers
MAX_REGIONS = 32767  # what an entry of the inverted list can name, and count
MAX_TABLES = 65535  # programs along the second axis of a grid
MAX_HEAD_DIM = 128

_forward_plans, _backward_plans, _table_plans = Plans(), Plans(), Plans()


def _addressable(x: Tensor) -> bool:
    """Whether offsets inside one image fit into 31 bits."""
    return x.shape[1] * x.stride(1) + x.shape[2] * x.stride(2) < 2**31


def serves(query: Tensor, key: Tensor, value: Tensor, index: Tensor, kv_region: Sequence[int]) -> bool:
    """Whether there is a kernel for these tensors."""
    B, tables, P, K = index.shape
    key_regions = key.shape[1] * key.shape[2] // max(1, kv_region[0] * kv_region[1])
    return (
        query.dtype in KERNEL_DTYPES
        and query.shape[4] <= MAX_HEAD_DIM
        and max(P, K, key_regions) <= MAX_REGIONS
        and B * tables <= MAX_TABLES
        and query.numel() > 0
        and index.numel() > 0
        and _addressable(query)
        and _addressable(key)
        and _addressable(value)
    )


def _log2(n: int) -> int:
    """Exponent of a power of two, -1 for other numbers."""
    return n.bit_length() - 1 if n & (n - 1) == 0 else -1


class _Shape:
    """Sizes of a call, as the kernels want them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        index: Tensor,
        q_region: Sequence[int],
        kv_region: Sequence[int],
        spread: int = 1,
    ):
        self.B, self.H, self.W, self.heads, self.D = query.shape
        self.HK, self.WK = key.shape[1:3]
        (self.rh, self.rw), (self.kh, self.kw) = q_region, kv_region
        self.T, self.TK = self.rh * self.rw, self.kh * self.kw
        self.P, self.K = index.shape[2:]
        self.N, self.NK = self.H * self.W, self.HK * self.WK
        self.PK = self.NK // self.TK
        self.tables = index.shape[1]
        self.dtype, self.device = query.dtype, query.device
        self.strides = tuple(s for x in (query, key, value) for s in x.stride()[:4])
        self.block_d = max(16, triton.next_power_of_2(self.D))
        self.dense = (
            max(self.NK, self.N // 4) <= DENSE_TOKENS  # one program walks over all queries
            and self.PK <= DENSE_REGIONS
            and self.T < 16
            and self.P * self.K <= 4096
            and triton.next_power_of_2(self.NK) * self.block_d * query.element_size() <= DENSE_BYTES
        )
        self.constants: dict[str, Any] = dict(
            HEADS=self.heads,
            GRID_W=self.W // self.rw,
            KEY_GRID_W=self.WK // self.kw,
            D=self.D,
            BLOCK_D=self.block_d,
            LOG2_RW=_log2(self.rw),
            LOG2_KW=_log2(self.kw),
            SPREAD=spread,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32",
        )
        # float16 has no room for exponentials of unshifted scores
        self.exact = self.dtype == torch.float16

    def tile(self, kernel: str, rows: int, columns: int) -> Tile:
        return tiles.choose(kernel, rows, columns, self.block_d, self.dtype, self.device)

    def tuned(self, kernel: str, tile: Tile, prepare: Callable[[Tile], Launch]) -> Callable[..., None]:
        """The launch with ``tile``, or a search around it."""
        if searching(self.device):
            return Search(kernel, tiles.candidates(tile), prepare)
        return prepare(tile)

    def prepare(self, kernel: Any, programs: int, integers: tuple[int, ...], tile: Tile, **constants: Any) -> Launch:
        values = {name: x for name, x in (self.constants | constants).items() if name in kernel.arg_names}
        return Launch(kernel, (programs,), integers, values, tile.warps, tile.stages, tile.registers)

    # dense family

    def masks(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """What turns lists into bit masks and how many rounds of these each table has."""
        tables, shape = self.B * self.tables, (self.B * self.tables, self.K, self.P)
        blocks = dict(BLOCK_P=triton.next_power_of_2(self.P), BLOCK_K=triton.next_power_of_2(self.K))
        launch = Launch(kernels_dense.mask_kernel, (tables,), (self.P, self.K, self.PK), blocks)

        def build(index: Tensor) -> tuple[Tensor, Tensor]:
            masks = torch.empty(shape, dtype=torch.int64, device=index.device)
            rounds = torch.empty(tables, dtype=torch.int32, device=index.device)
            launch(index, masks, rounds)
            return masks, rounds

        return build

    def dense_integers(self) -> tuple[int, ...]:
        table = self.tables, 1 if self.tables > 1 else 0
        sizes = self.H, self.W, self.rh, self.rw, self.N, self.NK, self.WK, self.kh, self.kw, self.P, self.K
        return (*self.strides, *table, *sizes)

    def dense_constants(self) -> dict[str, Any]:
        part = min(64, 32 * self.TK)  # a tile of keys needs at most 32 bits of the masks
        full, rest = divmod(self.NK, part)
        last = (max(16, triton.next_power_of_2(rest)),) if rest else ()
        return dict(LOG2_T=_log2(self.T), LOG2_TK=_log2(self.TK), PARTS=(part,) * full + last, PART=part)

    # listed family

    def table(self) -> tuple[int, int]:
        return self.tables * self.P * self.K, self.P * self.K if self.tables > 1 else 0

    def listed(self, kernel: Any, tile: Tile, **constants: Any) -> Launch:
        """Launch of a kernel whose programs hold query rows."""
        parts = triton.cdiv(self.T, tile.rows)
        sizes = self.H, self.W, self.P, self.rh, self.rw, self.PK, self.kh, self.kw, self.K, parts
        return self.prepare(
            kernel, self.B * self.P * parts * self.heads, (*self.strides, *self.table(), *sizes), tile,
            LOG2_TK=_log2(self.TK), BLOCK_M=tile.rows, BLOCK_N=tile.columns, ALIGNED=self.TK % tile.columns == 0,
            **constants,
        )  # fmt: skip


def _plan_forward(s: _Shape) -> Callable[..., None]:
    if s.dense:
        build = s.masks()
        attend = s.tuned("dense_forward", s.tile("dense_forward", s.N, s.NK), lambda tile: s.prepare(
            kernels_dense.dense_forward_kernel, s.B * s.heads, s.dense_integers(), tile,
            BLOCK_M=tile.rows, EXACT=s.exact, **s.dense_constants(),
        ))  # fmt: skip

        def dense(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *rest: Any) -> None:
            attend(query, key, value, *build(index), *rest)

        return dense
    return s.tuned("forward", s.tile("forward", s.T, s.K * s.TK), lambda tile: s.listed(
        kernels_listed.forward_kernel, tile, SINGLE=tile.columns >= s.K * s.TK, EXACT=s.exact
    ))  # fmt: skip


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``visionattn::routed_attention`` on the device; arguments are checked where their signature is new."""
    if scale <= 0:  # the kernels find the maximum before they scale
        query, scale = query * scale, 1.0
    query, key, value, index = channels_inside(query), channels_inside(key), channels_inside(value), index.contiguous()
    name = (layout(query), layout(key), layout(value), layout(index), tuple(q_region), tuple(kv_region))
    run = _forward_plans.get(name)
    if run is None:
        check_attention(query, key, value, index, q_region, kv_region)
        run = _forward_plans.keep(name, _plan_forward(_Shape(query, key, value, index, q_region, kv_region)))
    B, H, W, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty((B, heads, H, W), dtype=torch.float32, device=query.device)
    run(query, key, value, index, out, lse, scale)
    return out, lse


def _prepare_inversion(tables: int, P: int, K: int, key_regions: int) -> Launch:
    block_k = triton.next_power_of_2(K)
    blocks = dict(
        BLOCK_P=min(max(16, triton.next_power_of_2(P)), max(16, 4096 // block_k)),
        BLOCK_K=block_k,
    )
    groups = key_regions + 1
    return Launch(kernels_tables.invert_kernel, (groups, tables), (P, K, groups, key_regions), blocks)


def invert_index(index: Tensor, key_regions: int) -> tuple[Tensor, Tensor]:
    """For every key region the query regions that list it.

    Args:
        index: Region table, int32 ``[B, 1 or heads, P, K]``.
        key_regions: Number of key regions ``P_k``.

    Returns:
        int32 ``[B, 1 or heads, P_k + 1, P]`` with entries ``region + 65536 * times`` in ascending order, and how many
        there are, int32 ``[B, 1 or heads, P_k + 1]``. The last list is that of the regions with a missing entry.
    """
    index = index.contiguous()
    B, heads, P, K = index.shape
    name = ("invert", layout(index), key_regions)
    run = _table_plans.get(name) or _table_plans.keep(name, _prepare_inversion(B * heads, P, K, key_regions))
    listed = torch.empty((B, heads, key_regions + 1, P), dtype=torch.int32, device=index.device)
    count = torch.empty((B, heads, key_regions + 1), dtype=torch.int32, device=index.device)
    run(index, listed, count)
    return listed, count


class _Saved(NamedTuple):
    """What the backward pass keeps of the forward one, and the gradients that come in."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor  # anything where there is none


def _plan_backward(s: _Shape, lse_grad: bool) -> Callable[..., None]:
    if s.dense:
        return _plan_dense_backward(s, lse_grad)
    one_pass = s.K == 1 and s.tile("one_pass", s.T, s.TK).columns >= s.TK
    met = s.T * max(1, s.P * s.K // s.PK)  # query rows that a key region meets on average
    lists = ((s.PK + 1) * s.P * s.tables, (s.PK + 1) * s.P, (s.PK + 1) * s.tables, s.PK + 1)
    if s.tables == 1:
        lists = (lists[0], 0, lists[2], 0)

    def prepare_key_grad(tile: Tile) -> Launch:
        parts = triton.cdiv(s.TK, tile.columns)
        sizes = (s.H, s.W, s.P, s.rh, s.rw, s.HK, s.WK, s.PK, s.kh, s.kw, parts)
        return s.prepare(
            kernels_listed.key_grad_kernel, s.B * (s.PK + one_pass) * parts * s.heads,
            (*s.strides, *lists, *sizes), tile,
            LOG2_T=_log2(s.T), BLOCK_M=tile.rows, BLOCK_N=tile.columns, ALIGNED=s.T % tile.rows == 0,
            ONE_PASS=one_pass, FULL=tile.columns == s.TK, LSE_GRAD=lse_grad,
        )  # fmt: skip

    query_grad = None
    if one_pass:
        key_grad: Callable[..., None] = prepare_key_grad(s.tile("one_pass", s.T, s.TK))
    else:
        key_grad = s.tuned("key_grad", s.tile("key_grad", met, s.TK), prepare_key_grad)
        query_grad = s.tuned(
            "query_grad", s.tile("query_grad", s.T, s.K * s.TK),
            lambda tile: s.listed(kernels_listed.query_grad_kernel, tile, LSE_GRAD=lse_grad),
        )  # fmt: skip

    def run(inputs: tuple[Tensor, ...], index: Tensor, saved: _Saved, grads: list[Tensor], scale: float) -> None:
        delta = saved.lse
        if query_grad is not None:
            delta = torch.empty_like(saved.lse)
            query_grad(*inputs, index, *saved, grads[0], delta, scale)
        key_grad(*inputs, *invert_index(index, s.PK), *saved, delta, *grads, scale)

    return run


def _plan_dense_backward(s: _Shape, lse_grad: bool) -> Callable[..., None]:
    build, constants = s.masks(), s.dense_constants()
    if s.dtype.itemsize == 2 and sum(constants["PARTS"]) * s.block_d <= DENSE_GRADS:
        whole = s.tuned("dense_grad", s.tile("dense_grad", s.N, s.NK), lambda tile: s.prepare(
            kernels_dense.dense_grad_kernel, s.B * s.heads, s.dense_integers(), tile,
            BLOCK_M=tile.rows, LSE_GRAD=lse_grad, **constants,
        ))  # fmt: skip

        def run_whole(
            inputs: tuple[Tensor, ...], index: Tensor, saved: _Saved, grads: list[Tensor], scale: float
        ) -> None:
            whole(*inputs, *build(index), *saved, *grads, scale)

        return run_whole
    query_grad = s.tuned("dense_query_grad", s.tile("dense_query_grad", s.N, s.NK), lambda tile: s.prepare(
        kernels_dense.dense_query_grad_kernel, s.B * s.heads, s.dense_integers(), tile,
        BLOCK_M=tile.rows, LSE_GRAD=lse_grad, **constants,
    ))  # fmt: skip
    largest = 1 << (32 * s.TK).bit_length() - 1  # a tile of keys needs at most 32 bits of the masks
    key_grad = s.tuned("dense_key_grad", s.tile("dense_key_grad", s.N, min(s.NK, largest)), lambda tile: s.prepare(
        kernels_dense.dense_key_grad_kernel, s.B * s.heads * triton.cdiv(s.NK, min(tile.columns, largest)),
        s.dense_integers(), tile, BLOCK_M=tile.rows, BLOCK_N=min(tile.columns, largest), **constants,
    ))  # fmt: skip

    def run(inputs: tuple[Tensor, ...], index: Tensor, saved: _Saved, grads: list[Tensor], scale: float) -> None:
        delta, masks = torch.empty_like(saved.lse), build(index)
        query_grad(*inputs, *masks, *saved, grads[0], delta, scale)
        key_grad(*inputs, *masks, saved.lse, saved.grad_out, delta, *grads[1:], scale)

    return run


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
    grads: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visionattn::routed_attention_backward`` on the device, with ``grads`` into the thirds of a packed map."""
    factor = 1.0
    if scale <= 0:
        query, factor, scale = query * scale, scale, 1.0
    query, key, value, index = channels_inside(query), channels_inside(key), channels_inside(value), index.contiguous()
    lse_grad = grad_lse is not None
    spread = 1 if grads is None else 3
    regions = tuple(q_region), tuple(kv_region)
    name = (layout(query), layout(key), layout(value), layout(index), regions, lse_grad, spread)
    run = _backward_plans.get(name) or _backward_plans.keep(
        name, _plan_backward(_Shape(query, key, value, index, q_region, kv_region, spread), lse_grad)
    )
    saved = _Saved(out.contiguous(), lse, grad_out.contiguous(), lse if grad_lse is None else grad_lse.contiguous())
    if grads is None:
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    run((query, key, value), index, saved, list(grads), scale)
    return grads[0].mul_(factor) if factor != 1.0 else grads[0], grads[1], grads[2]


def _plan_region_mean(x: Tensor, region: Sequence[int]) -> tuple[Launch, tuple[int, ...]]:
    B, H, W, C = x.shape
    rh, rw = region
    regions = (H // rh) * (W // rw)
    block_c = block(C, 128)
    block_t = min(64, triton.next_power_of_2(rh * rw))
    block_r = min(16, 64 // block_t)
    block_t = max(block_t, 16 // block_r)
    grid = B * triton.cdiv(regions, block_r), triton.cdiv(C, block_c)
    integers = (*x.stride()[:3], C, regions, W // rw, rh, rw)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    blocks = dict(LOG2_RW=_log2(rw), BLOCK_R=block_r, BLOCK_T=block_t, BLOCK_C=block_c, PRECISION=precision)
    return Launch(kernels_tables.region_mean_kernel, grid, integers, blocks), (B, regions, C)


def region_mean(x: Tensor, region: Sequence[int]) -> Tensor:
    """``visionattn::region_mean`` on the device."""
    x = channels_inside(x)
    name = ("mean", layout(x), *region)
    run, shape = _table_plans.get(name) or _table_plans.keep(name, _plan_region_mean(x, region))
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    run(x, out)
    return out


def serves_topk(query: Tensor, key: Tensor) -> bool:
    """Whether there is a kernel for these descriptors."""
    batch = math.prod(query.shape[:-2])
    return key.shape[-2] <= 256 and 0 < batch <= MAX_TABLES and query.numel() > 0 and query.dtype != torch.float64


def _plan_topk(query: Tensor, key: Tensor, topk: int) -> tuple[Launch, tuple[int, ...]]:
    (batch, P, C), PK = query.shape, key.shape[1]
    integers = (*query.stride()[:2], *key.stride()[:2], C, P, PK, topk)
    # three products of halves of float32 are as exact as one of the whole and use the matrix units
    blocks = dict(BLOCK_P=16, BLOCK_PK=block(PK, 256), BLOCK_C=block(C, 64), PRECISION="tf32x3")
    tiles = triton.cdiv(P, 16)
    launch = Launch(kernels_tables.topk_kernel, (tiles, batch), integers, blocks)
    return launch, (batch, 16 * tiles, block(PK, 256))


def topk_regions(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """``visionattn::topk_regions`` on the device."""
    heads = query.shape[1] if query.dim() == 4 else 1
    query, key = (channels_inside(x.float()) for x in (query, key))
    if query.dim() == 4:
        query, key = query.flatten(0, 1), key.flatten(0, 1)
    name = ("topk", layout(query), layout(key), topk)
    run, room = _table_plans.get(name) or _table_plans.keep(name, _plan_topk(query, key, topk))
    scores = torch.empty(room, dtype=torch.float32, device=query.device)
    index = torch.empty((query.shape[0] // heads, heads, query.shape[1], topk), dtype=torch.int32, device=query.device)
    run(query, key, scores, index)
    return index
