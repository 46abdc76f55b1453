"""Launching the Triton kernels of the routing operators: which program family serves a shape, and its tile sizes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from visionattn.ops.routing import kernels_dense, kernels_listed, kernels_tables

DENSE_TOKENS, DENSE_REGIONS = 256, 64  # largest map that one program holds, and regions that a bit mask has
MAX_REGIONS = 65535  # what an entry of the inverted list can name
MAX_HEAD_DIM = 128


def serves(query: Tensor, key: Tensor, index: Tensor) -> bool:
    """Whether there is a kernel for these tensors."""
    sizes = query.shape[4] <= MAX_HEAD_DIM and max(index.shape[2], index.shape[3]) <= MAX_REGIONS
    return (
        sizes
        and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and query.numel() > 0
        and index.numel() > 0
    )


def _log2(n: int) -> int:
    """Exponent of a power of two, -1 for other numbers."""
    return n.bit_length() - 1 if n & (n - 1) == 0 else -1


def _rows(x: Tensor) -> Tensor:
    """``x`` itself where channels lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """What all kernels of one call are told about its tensors."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        index: Tensor,
        q_region: Sequence[int],
        kv_region: Sequence[int],
    ):
        self.query, self.key, self.value, self.index = _rows(query), _rows(key), _rows(value), index.contiguous()
        self.B, self.H, self.W, self.heads, self.D = query.shape
        self.HK, self.WK = key.shape[1:3]
        (self.rh, self.rw), (self.kh, self.kw) = q_region, kv_region
        self.T, self.TK = self.rh * self.rw, self.kh * self.kw
        self.P, self.K = index.shape[2:]
        self.PK = self.HK * self.WK // self.TK
        self.N, self.NK = self.H * self.W, self.HK * self.WK
        self.table = (index.shape[1] * self.P * self.K, self.P * self.K if index.shape[1] > 1 else 0)
        self.dense = self.NK <= DENSE_TOKENS and self.PK <= DENSE_REGIONS and self.T < 16 and self.P * self.K <= 4096
        self.options: dict[str, Any] = dict(
            HEADS=self.heads,
            GRID_W=self.W // self.rw,
            KEY_GRID_W=self.WK // self.kw,
            D=self.D,
            BLOCK_D=max(16, triton.next_power_of_2(self.D)),
            LOG2_RW=_log2(self.rw),
            LOG2_KW=_log2(self.kw),
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )

    def strides(self) -> list[int]:
        return [s for x in (self.query, self.key, self.value) for s in x.stride()[:4]]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value, self.index

    def masks(self) -> tuple[Tensor, Tensor]:
        """Lists as bit masks for the dense kernels, and how many rounds each table needs."""
        tables = self.index.shape[0] * self.index.shape[1]
        mask = torch.empty((tables, self.K, self.P), dtype=torch.int64, device=self.index.device)
        rounds = torch.empty(tables, dtype=torch.int32, device=self.index.device)
        kernels_dense.mask_kernel[(tables,)](
            self.index, mask, rounds, self.P, self.K, self.PK,
            BLOCK_P=triton.next_power_of_2(self.P), BLOCK_K=triton.next_power_of_2(self.K),
        )  # fmt: skip
        return mask, rounds

    def dense_shape(self) -> list[int]:
        sizes = [self.H, self.W, self.rh, self.rw, self.N, self.NK, self.WK]
        table = [self.index.shape[1], 1 if self.index.shape[1] > 1 else 0]
        return [*self.strides(), *table, *sizes, self.kh, self.kw, self.P, self.K]

    def dense_options(self) -> dict[str, int]:
        return dict(LOG2_T=_log2(self.T), LOG2_TK=_log2(self.TK))


class Tile(NamedTuple):
    """Rows and columns of a program's tile of scores, its warps, and the stages of its pipeline of loads."""

    rows: int
    columns: int
    warps: int
    stages: int


def _block(n: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(n)))


def _tile(rows: int, columns: int, short_walk: bool = False) -> Tile:
    """Tile for ``rows`` query and ``columns`` key rows, of which the kernel holds one and walks over the other.

    The best of a few on an H100: four warps for 64 x 64 scores, fewer for less, no pipeline for walks of about a step.
    """
    m, n = _block(rows, 64), _block(columns, 64)
    return Tile(m, n, max(1, min(4, m * n // 1024)), 1 if short_walk else 2)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: Sequence[int],
    kv_region: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``visionattn::routed_attention`` on the device."""
    if scale <= 0:  # the kernels find the maximum before they scale
        query, scale = query * scale, 1.0
    c = _Call(query, key, value, index, q_region, kv_region)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((c.B, c.heads, c.H, c.W), dtype=torch.float32, device=query.device)
    if c.dense:
        masks, tile = c.masks(), _tile(c.N, min(c.NK, 32 * c.TK))
        kernels_dense.dense_forward_kernel[(c.B * c.heads * triton.cdiv(c.N, tile.rows),)](
            *c.inputs()[:3], *masks, out, lse, scale, *c.dense_shape(), BLOCK_M=tile.rows, BLOCK_N=tile.columns,
            num_warps=tile.warps, num_stages=tile.stages, **c.dense_options(), **c.options,
        )  # fmt: skip
        return out, lse
    tile = _tile(c.T, c.K * c.TK)
    tiles = triton.cdiv(c.T, tile.rows)
    kernels_listed.forward_kernel[(c.B * c.P * tiles * c.heads,)](
        *c.inputs(), out, lse, scale, *c.strides(), *c.table, c.H, c.W, c.P, c.rh, c.rw,
        c.PK, c.kh, c.kw, c.K, tiles,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, LOG2_TK=_log2(c.TK), ALIGNED=c.TK % tile.columns == 0,
        SINGLE=tile.columns >= c.K * c.TK, num_warps=tile.warps, num_stages=tile.stages, **c.options,
    )  # fmt: skip
    return out, lse


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
    listed = torch.empty((B, heads, key_regions + 1, P), dtype=torch.int32, device=index.device)
    count = torch.empty((B, heads, key_regions + 1), dtype=torch.int32, device=index.device)
    block_k = triton.next_power_of_2(K)
    kernels_tables.invert_kernel[(key_regions + 1, B * heads)](
        index, listed, count, P, K, key_regions + 1, key_regions,
        BLOCK_P=min(max(16, triton.next_power_of_2(P)), max(16, 4096 // block_k)), BLOCK_K=block_k,
    )  # fmt: skip
    return listed, count


def backward(
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
    """``visionattn::routed_attention_backward`` on the device."""
    factor = 1.0
    if scale <= 0:
        query, factor, scale = query * scale, scale, 1.0
    c = _Call(query, key, value, index, q_region, kv_region)
    grad_out, grad_lse, out = grad_out.contiguous(), grad_lse.contiguous(), out.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    saved = (out, lse, grad_out, grad_lse)
    if c.dense:
        masks, delta = c.masks(), torch.empty_like(lse)
        tile = _tile(c.N, min(c.NK, 32 * c.TK))
        kernels_dense.dense_query_grad_kernel[(c.B * c.heads * triton.cdiv(c.N, tile.rows),)](
            *c.inputs()[:3], *masks, *saved, dq, delta, scale, *c.dense_shape(),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
            **c.dense_options(), **c.options,
        )  # fmt: skip
        kernels_dense.dense_key_grad_kernel[(c.B * c.heads * triton.cdiv(c.NK, tile.columns),)](
            *c.inputs()[:3], *masks, lse, grad_out, delta, dk, dv, scale, *c.dense_shape(),
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
            **c.dense_options(), **c.options,
        )  # fmt: skip
        return dq * factor if factor != 1.0 else dq, dk, dv
    one_pass = c.K == 1 and _tile(c.T, c.TK).columns >= c.TK
    delta = lse if one_pass else torch.empty_like(lse)
    if not one_pass:
        tile = _tile(c.T, c.K * c.TK if c.T > 16 else min(c.K * c.TK, 32))
        tiles = triton.cdiv(c.T, tile.rows)
        kernels_listed.query_grad_kernel[(c.B * c.P * tiles * c.heads,)](
            *c.inputs(), *saved, dq, delta, scale, *c.strides(), *c.table, c.H, c.W, c.P, c.rh, c.rw,
            c.PK, c.kh, c.kw, c.K, tiles,
            BLOCK_M=tile.rows, BLOCK_N=tile.columns, LOG2_TK=_log2(c.TK), ALIGNED=c.TK % tile.columns == 0,
            num_warps=tile.warps, num_stages=tile.stages, **c.options,
        )  # fmt: skip
    listed, count = invert_index(c.index, c.PK)
    shared = index.shape[1] == 1
    lists = [listed.stride(0), 0 if shared else listed.stride(1), count.stride(0), 0 if shared else count.stride(1)]
    met = c.T * max(1, c.P * c.K // c.PK)  # query rows that a key region meets on average
    tile = _tile(met if c.TK > 16 else min(met, 32), c.TK, short_walk=one_pass)
    tiles = triton.cdiv(c.TK, tile.columns)
    kernels_listed.key_grad_kernel[(c.B * (c.PK + one_pass) * tiles * c.heads,)](
        c.query, c.key, c.value, listed, count, *saved, delta, dq, dk, dv, scale, *c.strides(), *lists,
        c.H, c.W, c.P, c.rh, c.rw, c.HK, c.WK, c.PK, c.kh, c.kw, tiles,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, LOG2_T=_log2(c.T), ALIGNED=c.T % tile.rows == 0, ONE_PASS=one_pass,
        FULL=tile.columns == c.TK, num_warps=tile.warps, num_stages=tile.stages, **c.options,
    )  # fmt: skip
    return dq * factor if factor != 1.0 else dq, dk, dv


def region_mean(x: Tensor, region: Sequence[int]) -> Tensor:
    """``visionattn::region_mean`` on the device."""
    x = _rows(x)
    B, H, W, C = x.shape
    rh, rw = region
    regions = (H // rh) * (W // rw)
    out = torch.empty((B, regions, C), dtype=torch.float32, device=x.device)
    block_c = min(triton.next_power_of_2(C), 128)
    kernels_tables.region_mean_kernel[(B * regions, triton.cdiv(C, block_c))](
        x, out, *x.stride()[:3], C, regions, W // rw, rh, rw,
        LOG2_RW=_log2(rw), BLOCK_T=min(64, triton.next_power_of_2(rh * rw)), BLOCK_C=block_c,
    )  # fmt: skip
    return out


def serves_topk(query: Tensor, key: Tensor) -> bool:
    """Whether there is a kernel for these descriptors."""
    return key.shape[-2] <= 256 and query.numel() > 0 and query.dtype != torch.float64


def topk_regions(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """``visionattn::topk_regions`` on the device."""
    heads = query.shape[1] if query.dim() == 4 else 1
    query, key = (_rows(x.float()).flatten(0, -3) for x in (query, key))
    P, PK = query.shape[1], key.shape[1]
    index = torch.empty((query.shape[0] // heads, heads, P, topk), dtype=torch.int32, device=query.device)
    kernels_tables.topk_kernel[(triton.cdiv(P, 16), query.shape[0])](
        query, key, index, *query.stride()[:2], *key.stride()[:2], query.shape[2], P, PK, topk,
        BLOCK_P=16, BLOCK_PK=_block(PK, 256), BLOCK_C=_block(query.shape[2], 64),
    )  # fmt: skip
    return index
