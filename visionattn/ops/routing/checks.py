"""What the routing operators ask of their arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_region(name: str, region: Sequence[int], H: int, W: int) -> None:
    """Refuse a region that does not divide a map of ``H`` x ``W`` pixels."""
    if len(region) != 2:
        raise ValueError(f"{name}={region} must be a height and a width")
    if region[0] < 1 or region[1] < 1 or H % region[0] != 0 or W % region[1] != 0:
        raise ValueError(
            f"{name}={region} must divide the map, got H={H}, W={W}; "
            "pad first, for example with visionattn.ops.pad_to_multiple"
        )


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, index: Tensor, q_region: Sequence[int], kv_region: Sequence[int]
) -> None:
    """Refuse arguments of ``routed_attention`` that do not fit together."""
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
    check_region("q_region", q_region, query.shape[1], query.shape[2])
    check_region("kv_region", kv_region, key.shape[1], key.shape[2])
    regions = (query.shape[1] // q_region[0]) * (query.shape[2] // q_region[1])
    if index.dim() != 4 or index.dtype != torch.int32:
        raise ValueError(f"index must be int32 [B, 1 or heads, P_q, K], got {index.dtype} {tuple(index.shape)}")
    if index.shape[0] != query.shape[0] or index.shape[1] not in (1, query.shape[3]) or index.shape[2] != regions:
        raise ValueError(
            f"index must be [{query.shape[0]}, 1 or {query.shape[3]}, {regions}, K] for this query, "
            f"got {tuple(index.shape)}"
        )
