"""The definition of each routing operator in plain PyTorch: gather, then dense softmax.

Sums run in ``promote_types(dtype, float32)``, so float64 stays float64. Memory grows with the number of chosen
regions; ``eager.py`` computes the same without that.
"""

import torch
from torch import Tensor


def split_regions(x: Tensor, region: tuple[int, int]) -> Tensor:
    """View ``[B, H, W, ...]`` as ``[B, rows, columns, rh, rw, ...]`` of regions, both row by row."""
    rh, rw = region
    return x.unflatten(2, (-1, rw)).unflatten(1, (-1, rh)).transpose(2, 3)


def region_mean(x: Tensor, region: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` to ``[B, P, C]``, the mean over each region."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return split_regions(x, region).mean(dim=(3, 4)).flatten(1, 2)


def topk_regions(query: Tensor, key: Tensor, topk: int) -> Tensor:
    """``[B, (heads,) P_q, C]`` and ``[B, (heads,) P_k, C]`` to int32 ``[B, 1 or heads, P_q, topk]``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1)
    if torch.onnx.is_in_onnx_export():  # ONNX's TopK puts the lower index first and has no stable sort
        order = scores.topk(topk, dim=-1).indices
    else:
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return (order.unsqueeze(1) if order.dim() == 3 else order).to(torch.int32)


def routed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    q_region: tuple[int, int],
    kv_region: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, heads, head_dim]`` and log-sum-exp ``[B, heads, H, W]``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    B, H, W, heads, head_dim = query.shape
    # [B, heads, P, T, head_dim]
    q, k, v = (
        split_regions(x.to(dtype), region).permute(0, 5, 1, 2, 3, 4, 6).flatten(4, 5).flatten(2, 3)
        for x, region in ((query, q_region), (key, kv_region), (value, kv_region))
    )
    P = q.shape[2]
    index = index.long().expand(B, heads, P, -1)
    pick = index.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, k.shape[3] * head_dim)  # [B, heads, P*K, T_k*d]
    T_k, n = k.shape[3], index.shape[3]
    k, v = (
        x.flatten(3).gather(2, pick).reshape(B, heads, P, n * T_k, head_dim) for x in (k, v)
    )  # [B, heads, P, K*T_k, d]
    # not repeat_interleave, whose translation to ONNX is wrong for a number of repeats that is only a symbol
    valid = (index >= 0)[..., None].expand(-1, -1, -1, -1, T_k).flatten(3)[:, :, :, None]  # [B, heads, P, 1, K*T_k]
    # zeroed, or an infinite value of region 0 would come through as inf * 0
    k, v = (x.masked_fill(~valid.transpose(3, 4), 0.0) for x in (k, v))
    empty = ~valid.any(dim=-1, keepdim=True)  # such rows give 0 and no gradient
    scores = (scale * q @ k.transpose(-2, -1)).masked_fill(~valid, float("-inf")).masked_fill(empty, 0.0)
    out = scores.softmax(dim=-1).masked_fill(empty, 0.0) @ v  # [B, heads, P, T, head_dim]
    lse = scores.logsumexp(dim=-1, keepdim=True).masked_fill(empty, float("-inf"))

    def join(x: Tensor) -> Tensor:  # [B, heads, P, T, n] to [B, heads, H, W, n]
        x = x.unflatten(3, q_region).unflatten(2, (H // q_region[0], W // q_region[1]))
        return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)

    return join(out).permute(0, 2, 3, 1, 4).to(query.dtype).contiguous(), join(lse).squeeze(-1)
