"""How a sum of normalised depthwise convolutions is dealt out to the Triton kernels; ``branches.py`` says what it is.

A network has some thirty of these sums with a few dozen launches each, so everything that follows from shapes is made
once, tensors that live equally long are rows of one, and kernels find their branch in there by an offset.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, fold_plan, layout
from visionattn.ops.depthwise import kernels_branches, launch, launch_large

BRANCHES = 8  # that the kernels have arguments for
CHANNELS = 8  # of a program that has one branch: one sector of memory in float32
PIXELS = 1024  # from which the level of a branch is found, at least one row
# how much of what a program adds up it reads at once
PIXELS_AT_ONCE = 256
VALUES_AT_ONCE = 64  # of a kernel
STATISTICS_AT_ONCE = 512  # sums that programs found
GRADIENTS_AT_ONCE = 128  # the same
APART = 32  # gradients of weights start at multiples of so many values, for the optimizer's wide loads

_plans = Plans()


def _filled(values: Sequence[Any], filling: Any) -> tuple[Any, ...]:
    return (*values, *[filling] * (BRANCHES - len(values)))


def _convolve(plan: tuple[Launch, bool], x: Tensor, taps: Tensor, bias: Tensor, residual: Tensor, out: Tensor) -> None:
    run, large = plan
    if large:
        run(x, taps, bias, residual, out, taps)  # no statistics
    else:
        run(x, taps, bias, residual, out)


class Plan:
    """The launches for a map ``x`` and branches of these shapes, see ``plan``."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]):
        C, sides = x.shape[3], [w.shape[2] for w in weights]
        # what shapes they have, without their memory
        self.weights = [torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device="meta") for w in weights]
        self.dilations, self.channels, self.branches = dilations, C, len(weights)
        self.side, self.count, self.missing = sides[0], x.numel() // C, BRANCHES - len(weights)
        self.firsts = [sum(k * k for k in sides[:i]) for i in range(len(sides))]
        self.taps = sum(k * k for k in sides)
        # for the kernels; beyond the last branch nothing is ever read
        self.sides, self.geometry = _filled(sides, 0), (*_filled(sides, 0), *_filled(dilations, 1))
        given = list(zip(self.weights, dilations, self.firsts, strict=True))
        found = [launch_large.statistics_plan(x, w, x, d, first * C) for w, d, first in given]
        self.statistics, self.programs = zip(*found, strict=True)
        self.convolution = launch.forward_plan(x, self.weights[0], x, None, False, C)
        self._small(x)
        self.backward = Plans(8)  # by what the gradient looks like

    def _small(self, x: Tensor) -> None:
        """The launches between the convolutions of the forward pass."""
        B, H, W, C = x.shape
        images = min(B, max(1, PIXELS // W))
        # the middle row of so many images, as far apart as can be
        integers = (H // 2 * x.stride(1), B // images * x.stride(0), x.stride(2), images * W, W, C, *self.sides)
        grid, constants = (triton.cdiv(C, CHANNELS), self.branches), dict(BLOCK_C=CHANNELS)
        constants.update(BLOCK_N=PIXELS_AT_ONCE, BLOCK_T=VALUES_AT_ONCE)
        self.pack = Launch(kernels_branches.pack_kernel, grid, integers, constants)
        constants = dict(BRANCHES=self.branches, BLOCK_N=STATISTICS_AT_ONCE, BLOCK_C=CHANNELS)
        integers = self.taps, C, self.count, *_filled(self.programs, 0)
        self.fold = Launch(kernels_branches.fold_kernel, grid, integers, constants, num_warps=8)
        grid, constants = (triton.cdiv(self.side**2, 16), triton.cdiv(C, 64)), dict(BLOCK_T=16, BLOCK_C=64)
        constants["BRANCHES"] = self.branches
        self.merge = Launch(kernels_branches.merge_kernel, grid, (self.taps, C, *self.geometry), constants)


def plan(x: Tensor, weights: Sequence[Tensor], dilations: tuple[int, ...]) -> Plan:
    """The launches for a map ``[B, H, W, C]`` with channels side by side, weights and their dilations."""
    key = layout(x), dilations, *[(w.shape, w.stride(), w.dtype) for w in weights]
    return _plans.get(key) or _plans.keep(key, Plan(x, weights, dilations))


def forward(
    plan: Plan,
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    running: Sequence[Sequence[Tensor]],
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """The sum, and what ``backward`` needs beside ``x``: ``kept`` of ``kernels_branches.py``.

    Args:
        plan: ``plan(x, weights, ...)``.
        x: Map, ``[B, H, W, C]``, channels side by side.
        weights: ``[C, 1, k, k]`` each.
        scales: Factors of the norms, ``[C]`` each.
        shifts: Offsets of the norms, ``[C]`` each.
        running: Their running means, variances and numbers of steps, brought up to date.
        eps: Added to the variances.
        momentum: Part of the batch in the running statistics.
    """
    n, C = plan.branches, plan.channels
    options: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
    rows = torch.empty((2 * n + 1, C), **options)  # levels and biases of the branches, and the sum of these
    kept = torch.empty((plan.taps + 3 * n, C), **options)
    row = rows.unbind()
    plan.pack(x, *weights, *[weights[0]] * plan.missing, kept, rows)
    sums = torch.empty((sum(plan.programs), 2, C), **options)
    for find, level, part in zip(plan.statistics, row, sums.split_with_sizes(plan.programs), strict=False):
        find(x, kept, level, x, x, part)
    parameters = [y for group in (scales, shifts, *running) for y in (*group, *[group[0]] * plan.missing)]
    plan.fold(sums, rows, kept, *parameters, eps, momentum)
    merged = torch.empty((plan.side**2, C), **options)
    plan.merge(kept, rows, merged)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve(plan.convolution, x, merged, row[-1], x, out)
    return out, kept


class _Backward:
    """The launches of the backward pass for a gradient, and with ``dy`` like that of a branch's convolution."""

    def __init__(self, plan: Plan, grad: Tensor, x: Tensor, dy: Tensor):
        n, C, taps = plan.branches, plan.channels, plan.taps
        self.merged, programs = launch.weight_grad_plan(grad, x, plan.weights[0], x)
        self.width, self.partial = (plan.side**2 + 1) * C, programs * (plan.side**2 + 1) * C
        self.fold = fold_plan(programs, self.width)
        grid, integers = (triton.cdiv(C, CHANNELS), n), (taps, C, plan.count, *plan.geometry)
        constants = dict(BRANCHES=n, BLOCK_T=VALUES_AT_ONCE, BLOCK_C=CHANNELS)
        self.norms = Launch(kernels_branches.norm_grad_kernel, grid, integers, constants)
        self.dy, self.dx, self.dw, self.sum, self.views, self.total = [], [], [], [], [], 0
        for i, (w, d, first) in enumerate(zip(plan.weights, plan.dilations, plan.firsts, strict=True)):
            self.dy.append(launch.forward_plan(x, w, x, grad, False, C, d, first * C))
            residual = dy if i else None
            self.dx.append(launch.forward_plan(dy, w, None, residual, True, C, d, (taps + first) * C))
            run, programs = launch.weight_grad_plan(dy, x, w, None, d)
            self.dw.append(run)
            values = w.shape[2] ** 2
            self.partial = max(self.partial, programs * (values + 1) * C)
            grid, integers = (values, triton.cdiv(C, 32)), (programs, C, values, (taps + 2 * n + i) * C)
            constants = dict(BLOCK_N=GRADIENTS_AT_ONCE, BLOCK_C=32)
            self.sum.append(Launch(kernels_branches.weight_sum_kernel, grid, integers, constants))
            self.views.append((w.shape, w.stride(), self.total))
            self.total += math.ceil(w.numel() / APART) * APART


def backward(
    plan: Plan, grad: Tensor, x: Tensor, kept: Tensor, kind: torch.dtype, wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None], tuple[Tensor, ...]]:
    """Gradients of the map, of the weights, and of all factors, then offsets, of the norms.

    Args:
        plan: That of ``forward``.
        grad: Gradient of the sum, channels side by side.
        x: The map.
        kept: What ``forward`` gave.
        kind: Dtype of the norms' parameters.
        wanted: Whether the gradient of the map, and of every weight, is wanted; None stands for those that are not.
    """
    n, C, device = plan.branches, plan.channels, x.device
    dy = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, grad.dtype), device=device)
    key = layout(grad)
    launches = plan.backward.get(key) or plan.backward.keep(key, _Backward(plan, grad, x, dy))
    partial = torch.empty(launches.partial, dtype=torch.float32, device=device)
    launches.merged(x, grad, partial)
    merged = torch.empty(launches.width, dtype=torch.float32, device=device)
    launches.fold(partial, merged, merged)
    scaled = torch.empty((2 * plan.taps + n, C), dtype=torch.float32, device=device)
    norms = torch.empty((2 * n, C), dtype=kind, device=device)
    launches.norms(merged, kept, scaled, norms)
    shifts = scaled[2 * plan.taps :].unbind()
    dx = torch.empty_like(dy) if wanted[0] else None
    dweights: list[Tensor | None] = [None] * n
    if any(wanted[1:]):
        flat = torch.empty(launches.total, dtype=plan.weights[0].dtype, device=device)
    for i in range(n):
        if dx is None and not wanted[1 + i]:
            continue
        _convolve(launches.dy[i], x, scaled, shifts[i], grad, dy)
        if dx is not None:
            _convolve(launches.dx[i], dy, scaled, scaled, dx if i else dy, dx)
        if wanted[1 + i]:
            launches.dw[i](x, dy, partial)
            dweights[i] = dweight = flat.as_strided(*launches.views[i])
            launches.sum[i](partial, kept, dweight)
    return dx, dweights, norms.unbind()
