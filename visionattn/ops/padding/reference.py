"""Padding and cropping in the fewest PyTorch calls; these are the kernels of every device."""

import torch.nn.functional as F
from torch import Tensor


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zeros below and to the right of ``[B, H, W, C]`` until it is ``[B, height, width, C]``."""
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The top left ``[B, height, width, C]`` of a map."""
    return x[:, :height, :width]
