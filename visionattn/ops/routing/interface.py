"""Public routing operators: check the arguments, pick an implementation, nothing else."""

import torch
from torch import Tensor

from visionattn.ops._dispatch import use_reference
from visionattn.ops.routing import direct, eager, reference
from visionattn.ops.routing.checks import check_attention, check_region


def region_mean(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean of each region of a map.

    Args:
        x: Map, ``[B, H, W, C]``, any float dtype.
        region: Height and width of one region in pixels of the map; must divide ``H`` and ``W``.

    The kernels on a GPU sum by a matrix product: a value that is not finite may reach the means of other regions.

    Returns:
        One descriptor per region, ``[B, P, C]``, row by row over the grid, in float32 (float64 for float64 input):
        means rounded to half precision would change the routing.

    Raises:
        ValueError: ``x`` has not four axes, or ``region`` does not divide the map.
    """
    if torch.jit.is_scripting():
        return torch.ops.visionattn.region_mean(x, region)
    if not torch.compiler.is_compiling():  # sizes may be symbols there, and a check would fix them
        if x.dim() != 4:
            raise ValueError(f"region_mean wants x [B, H, W, C], got shape {tuple(x.shape)}")
        check_region("region", region, x.shape[1], x.shape[2])
    if use_reference():
        return reference.region_mean(x, region)
    out = None if torch.compiler.is_compiling() else direct.region_mean(x, region)
    return out if out is not None else torch.ops.visionattn.region_mean(x, region)


def topk_regions(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """Rank the key regions of every query region by dot product and keep the best.

    Args:
        query: Query descriptors, ``[B, P_q, C]`` for one table shared by all heads or ``[B, heads, P_q, C]``.
        key: Key descriptors, ``[B, P_k, C]`` or ``[B, heads, P_k, C]``.
        topk: Regions kept per query region, in ``[1, P_k]``.

    Returns:
        Region table, int32 ``[B, 1 or heads, P_q, topk]``, best first; of equal scores the lower index comes first.
        Scores are computed in float32 (float64 for float64 input). No gradient flows through it.

    Raises:
        ValueError: Shapes that do not fit together, or ``topk`` out of range.

    Reference: BiFormer, arXiv:2303.08810, equations 3 and 4.
    """
    if torch.jit.is_scripting():
        return torch.ops.visionattn.topk_regions(query, key, topk)
    if not torch.compiler.is_compiling():
        if query.dim() not in (3, 4) or query.dim() != key.dim():
            raise ValueError(
                f"query and key must both be [B, P, C] or [B, heads, P, C], got {query.shape}, {key.shape}"
            )
        if query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
            raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} differ in batch, heads or channels")
        if query.device != key.device:
            raise ValueError(f"query and key must be on one device, got {query.device} and {key.device}")
        if not 1 <= topk <= key.shape[-2]:
            raise ValueError(f"topk={topk} must lie in [1, {key.shape[-2]}], the number of key regions")
    query, key = query.detach(), key.detach()
    if use_reference():
        if torch.is_autocast_enabled(query.device.type):  # the ranking stays in full precision
            with torch.autocast(query.device.type, enabled=False):
                return reference.topk_regions(query, key, topk)
        return reference.topk_regions(query, key, topk)
    index = None if torch.compiler.is_compiling() else direct.topk_regions(query, key, topk)
    return index if index is not None else torch.ops.visionattn.topk_regions(query, key, topk)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: tuple[int, int],
    kv_region: tuple[int, int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query region to the key regions that a table lists for it.

    All pixels of query region ``p`` attend to all pixels of the regions ``index[b, h, p]``, softmax over their union.

    Args:
        query: Queries, ``[B, H, W, heads, head_dim]``; any strides, so slices of a packed projection go in as they are.
        key: Keys, ``[B, H_k, W_k, heads, head_dim]``.
        value: Values, shape of ``key``.
        index: Region table, int32 ``[B, 1 or heads, P_q, K]``, regions numbered row by row; -1 stands for no region,
            a region listed twice counts twice. A row of only -1 gives output 0, log-sum-exp -inf and no gradient.
        q_region: Height and width of a query region in pixels of the map, ``P_q`` of them.
        kv_region: The same for keys; ``q_region`` by default.
        scale: Factor on the dot products, ``head_dim ** -0.5`` by default.

    Returns:
        Output ``[B, H, W, heads, head_dim]``, contiguous, dtype of ``query``, and the natural log-sum-exp of the
        scores ``[B, heads, H, W]`` in float32 (float64 for float64 input), with which partial results over disjoint
        tables can be merged. Both are differentiable.

    Raises:
        ValueError: Shapes, dtypes or regions that do not fit, or (on CPU) a table entry outside ``[-1, P_k)``.

    The kernels on a GPU want finite values: at small maps with small regions those of regions that no list names are
    multiplied by 0.

    Reference: BiFormer, arXiv:2303.08810, equations 5 and 6.
    """
    if kv_region is None:
        kv_region = q_region
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.visionattn.routed_attention(query, key, value, index, q_region, kv_region, scale)
    if not torch.compiler.is_compiling():
        result = direct.routed_attention(query, key, value, index, q_region, kv_region, scale)
        if result is not None:
            return result
        check_attention(query, key, value, index, q_region, kv_region)
    if use_reference():
        if not torch.compiler.is_compiling():
            eager.check_table(index, (key.shape[1] // kv_region[0]) * (key.shape[2] // kv_region[1]))
        return reference.routed_attention(query, key, value, index, q_region, kv_region, scale)
    return torch.ops.visionattn.routed_attention(query, key, value, index, q_region, kv_region, scale)
