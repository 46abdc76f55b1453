"""Sum of depthwise convolutions that each have a batch norm, in training, without their results in memory.

With the statistics of the batch the sum is one convolution: the norms scale the kernels, which lie on the grid of the
largest one. So the forward pass finds the statistics of every branch and then convolves once.

For the gradient ``g`` of the sum, a branch with ``y = conv(x, w)``, mean ``m``, inverse deviation ``s`` and factor
``f`` needs ``mean(g * (y - m) * s)``, which is linear in the gradient of the merged kernel and found from that for all
branches together. The gradient of ``y`` over ``f * s`` is then ``g`` plus a constant plus a multiple of ``y``: again
one convolution of ``x`` with a bias and the residual ``g``. Of the maps only ``x`` is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches
from visionattn.ops.depthwise import eager

_MOST = 8  # branches that the kernels have arguments for


def serves(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], norms: Sequence[Sequence[Tensor]]) -> bool:
    """Whether there are kernels for a map ``[B, H, W, C]`` and these branches, and nothing has to see the calls.

    Args:
        x: The map.
        weights: Those of the convolutions.
        dilations: Distance of a kernel's values on the map, for each.
        norms: Several tensors of every norm, one sequence for all first ones and so on.
    """
    if not launches(x) or x.numel() <= x.shape[3] or len(weights) > _MOST:
        return False
    C, device, reach = x.shape[3], x.device, weights[0].shape[2] // 2
    for weight, dilation in zip(weights, dilations, strict=True):
        k = weight.shape[2]
        if weight.shape != (C, 1, k, k) or dilation * (k // 2) > reach or not eager.serves(x, weight, None, None):
            return False
    for group in (weights, *norms):
        dtype = group[0].dtype
        for y in group:
            if y.dtype != dtype or y.device != device or not y.is_contiguous():
                return False
    return dilations[0] == 1


class _BranchSum(torch.autograd.Function):
    """The sum; the norms' running statistics are changed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dilations: tuple[int, ...],
        running: Sequence[Sequence[Tensor]],
        eps: float,
        momentum: float,
        *parameters: Tensor,
    ) -> Tensor:
        n, launch = len(dilations), launcher("depthwise", "launch_branches")
        x = launcher("depthwise").channels_inside(x)
        weights, scales, shifts = parameters[:n], parameters[n : 2 * n], parameters[2 * n :]
        plan = launch.plan(x, weights, dilations)
        out, kept = launch.forward(plan, x, weights, scales, shifts, running, eps, momentum)
        ctx.save_for_backward(x, kept)
        ctx.plan, ctx.dtype = plan, scales[0].dtype
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, kept), launch = ctx.saved_tensors, launcher("depthwise", "launch_branches")
        n, needed = ctx.plan.branches, ctx.needs_input_grad
        wanted = needed[0], *needed[_FIRST : _FIRST + n]
        grad = launcher("depthwise").channels_inside(grad)
        dx, dweights, norms = launch.backward(ctx.plan, grad, x, kept, ctx.dtype, wanted)
        return None if dx is None else dx.to(x.dtype), *[None] * (_FIRST - 1), *dweights, *norms


_FIRST = 5  # of the arguments of the forward pass is a weight


def branch_sum(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    running: Sequence[Sequence[Tensor]],
    eps: float,
    momentum: float,
) -> Tensor:
    """Sum of depthwise convolutions, each normalised by the statistics of the batch, where ``serves`` says so.

    Args:
        x: Map, ``[B, H, W, C]``.
        weights: ``[C, 1, k, k]`` each with odd ``k``, the largest first, on whose grid the others lie.
        dilations: Distance of a kernel's values on the map, for each.
        scales: Factors of the norms, ``[C]`` each.
        shifts: Offsets of the norms, ``[C]`` each.
        running: Running means, running variances and int64 numbers of steps, brought up to date as ``nn.BatchNorm2d``
            does.
        eps: Added to the variances.
        momentum: Part of the batch in the running statistics.

    Returns:
        ``[B, H, W, C]``.
    """
    x = x.to(autocast_dtype(x))
    out = _BranchSum.apply(x, tuple(dilations), running, eps, momentum, *weights, *scales, *shifts)
    for group in running:
        torch.autograd.graph.increment_version(group)
    return out
