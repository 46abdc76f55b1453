"""Cutting and joining windows in the fewest PyTorch calls; these are the kernels of every device."""

from torch import Tensor


def split_windows(x: Tensor, side: int) -> Tensor:
    """``[B, H, W, C]`` to ``[B * windows, side * side, C]``."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return x.reshape(x.shape[0] * x.shape[1] * x.shape[2], side * side, x.shape[5])


def join_windows(x: Tensor, side: int, batch: int, height: int, width: int) -> Tensor:
    """``[batch * windows, side * side, C]`` to ``[batch, height, width, C]``."""
    x = x.reshape(batch, height // side, width // side, side, side, x.shape[2])
    return x.transpose(2, 3).reshape(batch, height, width, x.shape[5])
