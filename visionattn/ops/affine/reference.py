"""Sums of maps whose channels have factors and offsets: the definition."""

import torch
from torch import Tensor


def affine_add(x: Tensor, weight: Tensor, bias: Tensor, delta: Tensor, keep: Tensor | None, gain: float) -> Tensor:
    """``x * weight + bias + delta * keep * gain``."""
    if keep is not None:
        delta = delta * (keep * gain).reshape(-1, *[1] * (delta.dim() - 1))
    return torch.addcmul(bias, x, weight) + delta


def affine_join(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_weight: Tensor, y_bias: Tensor) -> Tensor:
    """The last channels of ``x`` replaced by ``x * weight + bias + y * y_weight + y_bias``."""
    x, rest = x.split([x.shape[-1] - y.shape[-1], y.shape[-1]], dim=-1)
    return torch.cat((x, torch.addcmul(bias, rest, weight) + torch.addcmul(y_bias, y, y_weight)), dim=-1)
