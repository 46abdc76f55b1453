"""Sum of depthwise convolutions that each have a batch norm, in training, without their results in memory.

With the statistics of the batch the sum is one convolution: the norms scale the kernels, which lie on the grid of the
largest one. So the forward pass finds the statistics of every branch and then convolves once.

For the gradient ``g`` of the sum, a branch with ``y = conv(x, w)``, mean ``m``, inverse deviation ``s`` and factor
``f`` needs ``mean(g * (y - m) * s)``, which is linear in the gradient of the merged kernel and found from that for all
branches together. The gradient of ``y`` over ``f * s`` is then ``g`` plus a constant plus a multiple of ``y``: again
one convolution of ``x`` with a bias and the residual ``g``. Only ``x`` is kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.ops._dispatch import autocast_dtype, differentiable_once, launcher, launches
from visionattn.ops.depthwise import eager


def serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether there are kernels for a map ``[B, H, W, C]`` and all these weights, and nothing has to see the calls."""
    return (
        launches(x)
        and x.numel() > x.shape[3]
        and all(w.shape[0] == x.shape[3] and w.device == x.device for w in weights)
        and all(eager.serves(x, w, None, None) for w in weights)
    )


def _grid(side: int, weight: Tensor, dilation: int) -> tuple[slice, slice]:
    """Where on the grid of the large kernel the values of another one lie."""
    margins = (side // 2 - dilation * (k // 2) for k in weight.shape[2:])
    rows, columns = (slice(margin, side - margin, dilation) for margin in margins)
    return rows, columns


def merge(weights: Sequence[Tensor], dilations: Sequence[int], factors: Sequence[Tensor]) -> Tensor:
    """Sum of the kernels, each with a factor for every channel, on the grid of the first.

    Args:
        weights: ``[C, 1, k, k]`` each, the largest first.
        dilations: Distance of a kernel's values on the map, for each.
        factors: ``[C]`` each.

    Returns:
        ``[C, 1, k, k]``.
    """
    kernel = weights[0] * factors[0][:, None, None, None]
    for weight, dilation, factor in zip(weights[1:], dilations[1:], factors[1:], strict=True):
        rows, columns = _grid(kernel.shape[2], weight, dilation)
        kernel[:, :, rows, columns] += weight * factor[:, None, None, None]
    return kernel


def _level(x: Tensor, arranged: Sequence[Tensor]) -> Tensor:
    """About the mean of every convolution, ``[branches, C]``, from a row of every image.

    Squares are summed around it in float32: around 0 a mean of 100 deviations would leave the variance three digits.
    """
    return x[:, x.shape[1] // 2].mean((0, 1), dtype=torch.float32) * torch.stack([taps.sum(0) for taps in arranged])


class _BranchSum(torch.autograd.Function):
    """The sum; besides it the statistics go out, for the running ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dilations: tuple[int, ...], eps: tuple[float, ...], *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, launch = len(dilations), launcher("depthwise")
        x = launch.channels_inside(x)
        weights, count = parameters[:n], x.numel() // x.shape[3]
        factors, shifts = (torch.stack(parameters[i * n : (i + 1) * n]).float() for i in (1, 2))
        arranged = [launch.arrange(w) for w in weights]
        around = _level(x, arranged)
        given = zip(weights, arranged, around.neg(), dilations, strict=True)
        sums = [launch.launch_large.statistics(x, w, taps, shift, d) for w, taps, shift, d in given]
        offset, square = (torch.stack(sums) / count).unbind(1)
        mean, variance = offset + around, (square - offset * offset).clamp_(min=0.0)
        inverse = torch.stack([v + e for v, e in zip(variance, eps, strict=True)]).rsqrt().float()
        mean, variance = mean.float(), variance.float()
        factors = factors * inverse
        kernel = merge([w.float() for w in weights], dilations, list(factors))
        out = launch.forward(x, kernel, (shifts - mean * factors).sum(0), None)
        ctx.save_for_backward(x, mean, inverse, factors, *weights)
        ctx.dilations, ctx.dtypes = dilations, [p.dtype for p in parameters]
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, inverse, factors, *weights = ctx.saved_tensors
        n, launch = len(weights), launcher("depthwise")
        grad, full, count = launch.channels_inside(grad), [w.float() for w in weights], x.numel() // x.shape[3]
        merged, total = launch.weight_grad(grad, x, full[0], mean[0])
        side, dots = full[0].shape[2], []
        for w, d in zip(full, ctx.dilations, strict=True):
            rows, columns = _grid(side, w, d)
            dots.append((w * merged[:, :, rows, columns]).sum((1, 2, 3)))
        dscale = inverse * (torch.stack(dots) - mean * total)  # sums of the gradient times the normalised result
        multiple = dscale * inverse / -count
        shifts = -total / count - multiple * mean
        dx, dweights = None, [None] * n
        for i, (w, d) in enumerate(zip(full, ctx.dilations, strict=True)):
            factor = factors[i][:, None, None, None]
            dy = launch.forward(x, w * multiple[i][:, None, None, None], shifts[i], grad, dilation=d)
            if ctx.needs_input_grad[0]:
                dx = launch.forward(dy, w * factor, None, dx, flip=True, dilation=d)
            if ctx.needs_input_grad[3 + i]:
                dweights[i] = launch.weight_grad(dy, x, w, mean[0] if i == 0 else None, d)[0] * factor
        grads = (*dweights, *dscale, *([total] * n))
        cast = (None if y is None else y.to(dtype) for y, dtype in zip(grads, ctx.dtypes, strict=True))
        return None if dx is None else dx.to(x.dtype), None, None, *cast


def branch_sum(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of depthwise convolutions, each normalised by the statistics of the batch, where ``serves`` says so.

    Args:
        x: Map, ``[B, H, W, C]``.
        weights: ``[C, 1, k, k]`` each with odd ``k``, the largest first, on whose grid the others lie.
        dilations: Distance of a kernel's values on the map, for each.
        scales: Factors of the norms, ``[C]`` each.
        shifts: Offsets of the norms, ``[C]`` each.
        eps: Added to the variances.

    Returns:
        The sum ``[B, H, W, C]``, and mean and (biased) variance of every branch, float32 ``[branches, C]``.
    """
    x = x.to(autocast_dtype(x))
    return _BranchSum.apply(x, tuple(dilations), tuple(eps), *weights, *scales, *shifts)
