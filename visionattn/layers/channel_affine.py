"""Factors and offsets of channels on the main path, and the additions around them."""

from typing import TypeGuard, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from visionattn.layers.channels_last import bare, channels_innermost
from visionattn.ops import affine_add, affine_join
from visionattn.ops._dispatch import launches


class ChannelAffine(nn.Module):
    """Factor and offset for each channel of ``[B, C, H, W]``, at first 1 and 0."""

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


def _served(x: Tensor, y: Tensor) -> bool:
    return channels_innermost(x) and channels_innermost(y) and launches(x) and launches(y)


def _is_affine(scale: nn.Module, x: Tensor) -> TypeGuard[ChannelAffine]:
    if type(scale) is not ChannelAffine or not bare(scale, x):
        return False
    return type(scale.weight) is type(scale.bias) is nn.Parameter


def _drops(module: nn.Module, x: Tensor) -> float | None:
    """Rate at which it drops images of ``x``; None for a module that does something else."""
    if type(module) not in (nn.Identity, DropPath) or not bare(module, x):
        return None
    if type(module) is nn.Identity or not module.training:
        return 0.0
    return cast(float, module.drop_prob)


def add_scaled(scale: nn.Module, drop_path: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``scale(x) + drop_path(y)``, in one pass where channels lie side by side on a GPU.

    Args:
        scale: ``ChannelAffine``, or any module ``[B, C, H, W]`` to the same.
        drop_path: timm's ``DropPath``, or any module ``[B, C, H, W]`` to the same.
        x: Main path, ``[B, C, H, W]``.
        y: Branch, shape of ``x``.

    Returns:
        ``[B, C, H, W]``, see ``visionattn.ops.affine_add``; the same images are dropped as the module would.
    """
    if _served(x, y) and x.shape == y.shape and _is_affine(scale, x):
        rate = _drops(drop_path, y)
        if rate is not None:
            rows, branch, keep, gain = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1), None, 1.0
            if rate > 0:
                keep = y.new_empty(y.shape[0]).bernoulli_(1 - rate)
                gain = 1 / (1 - rate) if drop_path.scale_by_keep and rate < 1 else 1.0
            return affine_add(rows, scale.weight, scale.bias, branch, keep, gain).permute(0, 3, 1, 2)
    return scale(x) + drop_path(y)


def update_last(scale: nn.Module, other_scale: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``scale(last channels of x) + other_scale(y)`` in place of these channels, as ``add_scaled``.

    Args:
        scale: ``ChannelAffine``, or any module ``[B, K, H, W]`` to the same.
        other_scale: Another one.
        x: ``[B, C + K, H, W]``.
        y: ``[B, K, H, W]``.

    Returns:
        ``[B, C + K, H, W]``, see ``visionattn.ops.affine_join``.
    """
    if (
        _served(x, y)
        and _is_affine(scale, x)
        and _is_affine(other_scale, y)
        and x.shape[0] == y.shape[0]
        and x.shape[2:] == y.shape[2:]
    ):
        parameters = scale.weight, scale.bias, other_scale.weight, other_scale.bias
        return affine_join(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1), *parameters).permute(0, 3, 1, 2)
    dims = [x.shape[1] - y.shape[1], y.shape[1]]
    x, last = x.split(dims, dim=1)
    return torch.cat((x, scale(last) + other_scale(y)), dim=1)
