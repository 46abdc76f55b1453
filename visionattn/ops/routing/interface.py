"""Public routing operators: check the arguments, pick an implementation, nothing else."""

import torch
from torch import Tensor

from visionattn.ops._dispatch import use_reference
from visionattn.ops.routing import direct, eager, reference


def _check_region(name: str, region: tuple[int, int], H: int, W: int) -> None:
    if region[0] < 1 or region[1] < 1 or H % region[0] != 0 or W % region[1] != 0:
        raise ValueError(
            f"{name}={region} must divide the map, got H={H}, W={W}; "
            "pad first, for example with visionattn.ops.pad_to_multiple"
        )


def region_mean(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean of each region of a map.

    Args:
        x: Map, ``[B, H, W, C]``, any float dtype.
        region: Height and width of one region in pixels of the map; must divide ``H`` and ``W``.

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
        _check_region("region", region, x.shape[1], x.shape[2])
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


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, q_region: tuple[int, int], kv_region: tuple[int, int]
) -> None:
    if query.dim() != 5 or key.dim() != 5 or key.shape != value.shape:
        raise ValueError(
            "query must be [B, H, W, heads, head_dim] and key and value alike, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[3:] != key.shape[3:]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch, heads or head_dim")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(f"query, key, value must share one float dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device == index.device:
        raise ValueError(
            "query, key, value and index must be on one device, "
            f"got {query.device}, {key.device}, {value.device}, {index.device}"
        )
    _check_region("q_region", q_region, query.shape[1], query.shape[2])
    _check_region("kv_region", kv_region, key.shape[1], key.shape[2])
    regions = (query.shape[1] // q_region[0]) * (query.shape[2] // q_region[1])
    if index.dim() != 4 or index.dtype != torch.int32:
        raise ValueError(f"index must be int32 [B, 1 or heads, P_q, K], got {index.dtype} {tuple(index.shape)}")
    if index.shape[0] != query.shape[0] or index.shape[1] not in (1, query.shape[3]) or index.shape[2] != regions:
        raise ValueError(
            f"index must be [{query.shape[0]}, 1 or {query.shape[3]}, {regions}, K] for this query, "
            f"got {tuple(index.shape)}"
        )


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

    Reference: BiFormer, arXiv:2303.08810, equations 5 and 6.
    """
    if kv_region is None:
        kv_region = q_region
    if scale is None:
        scale = float(query.shape[-1]) ** -0.5
    if torch.jit.is_scripting():
        return torch.ops.visionattn.routed_attention(query, key, value, index, q_region, kv_region, scale)
    if not torch.compiler.is_compiling():
        result = direct.routed_attention(query, key, value, index, q_region, kv_region, scale, _check_attention)
        if result is not None:
            return result
        _check_attention(query, key, value, index, q_region, kv_region)
    if use_reference():
        if not torch.compiler.is_compiling():
            eager.check_table(index, (key.shape[1] // kv_region[0]) * (key.shape[2] // kv_region[1]))
        return reference.routed_attention(query, key, value, index, q_region, kv_region, scale)
    return torch.ops.visionattn.routed_attention(query, key, value, index, q_region, kv_region, scale)
