"""A large depthwise convolution that trains as a sum of convolutions and is merged into one for inference."""

from typing import Any

import torch
from torch import Tensor, nn

from visionattn.layers.channels_last import MapSequential, bare, channels_innermost, is_depthwise
from visionattn.ops.depthwise.branches import branch_sum, serves

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
    return MapSequential(
        nn.Conv2d(dim, dim, kernel_size, 1, padding, dilation, groups=dim, bias=False, device=device, dtype=dtype),
        nn.BatchNorm2d(dim, device=device, dtype=dtype),
    )


def _learns(branch: Any, x: Tensor) -> bool:
    """Whether a branch is an ordinary convolution and a batch norm that takes and keeps the statistics of ``x``."""
    if type(branch) is not MapSequential or len(branch) != 2 or not bare(branch, x):
        return False
    conv, norm = branch
    return (
        is_depthwise(conv, x)
        and conv.bias is None
        and type(norm) is nn.BatchNorm2d
        and bare(norm, x)
        and norm.training
        and norm.affine
        and norm.running_mean is not None
        and norm.momentum is not None
    )


def _at_once(branches: list[Any], x: Tensor) -> tuple[Any, ...] | None:
    """What ``branch_sum`` wants, if it can compute all branches on ``x`` together."""
    if not channels_innermost(x) or not all(_learns(branch, x) for branch in branches):
        return None
    convs, norms = zip(*branches, strict=True)
    eps, momentum = norms[0].eps, norms[0].momentum
    if any(norm.eps != eps or norm.momentum != momentum for norm in norms):
        return None
    x, weights, dilations = x.permute(0, 2, 3, 1), [conv.weight for conv in convs], [conv.dilation[0] for conv in convs]
    scales, shifts = [norm.weight for norm in norms], [norm.bias for norm in norms]
    means, variances = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
    running = means, variances, [norm.num_batches_tracked for norm in norms]
    if not serves(x, weights, dilations, (scales, shifts, *running)):
        return None
    return x, weights, dilations, scales, shifts, running, eps, momentum


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
        if not torch.jit.is_scripting():
            branches = [self.large, *self.dilated.values()]
            given = _at_once(branches, x) if self.training else None
            if given is not None:
                return branch_sum(*given).permute(0, 3, 1, 2)
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
