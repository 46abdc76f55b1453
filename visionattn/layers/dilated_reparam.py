"""A large depthwise convolution that trains as a sum of convolutions and is merged into one for inference."""

from typing import Any

import torch
from torch import Tensor, nn

# side and dilation of the convolutions beside the large one, by the side of that
_BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


def _conv_norm(
    dim: int, kernel_size: int, dilation: int, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Sequential:
    """Depthwise convolution that keeps the size of the map, then batch norm."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(dim, dim, kernel_size, 1, padding, dilation, groups=dim, bias=False, device=device, dtype=dtype),
        nn.BatchNorm2d(dim, device=device, dtype=dtype),
    )


class DilatedReparamConv(nn.Module):
    """Sum of a large depthwise convolution and smaller, dilated ones, each with a batch norm of its own.

    In evaluation the sum is one convolution: ``timm.models.reparameterize_model`` puts the result of ``fuse`` in the
    module's place.

    Args:
        dim: Channels ``C``.
        kernel_size: Side of the large kernel, odd, 5 to 19; it decides which others there are.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, C, H, W]``.
        returns: ``[B, C, H, W]``.

    Raises:
        ValueError: A kernel that no branches are known for.

    Reference: UniRepLKNet, arXiv:2311.15599.
    """

    def __init__(
        self, dim: int, kernel_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if kernel_size not in _BRANCHES:
            raise ValueError(f"kernel_size={kernel_size} must be one of {', '.join(map(str, _BRANCHES))}")
        self.large = _conv_norm(dim, kernel_size, 1, device, dtype)
        self.dilated = nn.ModuleDict(
            {f"k{k}_{d}": _conv_norm(dim, k, d, device, dtype) for k, d in _BRANCHES[kernel_size]}
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.large(x)
        for branch in self.dilated.values():
            out = out + branch(x)
        return out

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One convolution with bias that equals the module in evaluation: batch norms folded, kernels added."""
        branches: list[Any] = [self.large, *self.dilated.values()]
        first: nn.Conv2d = branches[0][0]
        kernel, bias = torch.zeros_like(first.weight), first.weight.new_zeros(first.out_channels)
        side = first.kernel_size[0]
        for conv, norm in branches:
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            margin = side // 2 - conv.padding[0]  # the taps lie in the middle of the large kernel, a dilation apart
            taps = slice(margin, side - margin, conv.dilation[0])
            kernel[:, :, taps, taps] += conv.weight * factor[:, None, None, None]
            bias += norm.bias - norm.running_mean * factor
        dim = first.out_channels
        merged = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, device=kernel.device, dtype=kernel.dtype)
        merged.load_state_dict(dict(weight=kernel, bias=bias))
        return merged.train(self.training).requires_grad_(first.weight.requires_grad)
