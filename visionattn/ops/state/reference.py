"""The definition of attention through a state, and the rotation of channel pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels ``(2i, 2i + 1)`` of all heads together as complex numbers, times ``cos + j sin``.

    Args:
        x: ``[B, H, W, heads, d]``.
        cos: ``[H, W, heads * d / 2]``.
        sin: The same.

    Returns:
        Shape of ``x``; with ``-sin`` the inverse.
    """
    real, imaginary = x.flatten(3).unflatten(3, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
    return turned.reshape(x.shape)


def state_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    softmax: bool,
) -> Tensor:
    """``visionattn::state_attention`` without the state that it keeps."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (query, key, value))
    if softmax:
        mix = (scale * torch.einsum("bhwnd,bhwne->bnde", k, v)).softmax(dim=-1)
        return torch.einsum("bhwne,bnde->bhwnd", q, mix).contiguous().to(query.dtype)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = 1 / ((q * k.mean(dim=(1, 2), keepdim=True)).sum(dim=-1, keepdim=True) + eps)
    if cos is not None and sin is not None:
        q, k = (rotate(x, cos.to(wide), sin.to(wide)) for x in (q, k))
    state = torch.einsum("bhwnd,bhwne->bnde", k, v) / (k.shape[1] * k.shape[2])
    return (z * torch.einsum("bhwnd,bnde->bhwne", q, state)).contiguous().to(query.dtype)
