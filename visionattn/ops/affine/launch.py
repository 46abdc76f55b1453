"""Launching the Triton kernels of sums of scaled maps."""

from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, fold_programs, rows_apart, slice_width
from visionattn.ops.affine import kernels_affine

TILE = 2048  # values that a program holds at once
PROGRAMS = 792  # of the backward kernel at most, all slices together: six for each of 132 processors

_forward, _backward = Plans(), Plans()


def _blocks(C: int) -> dict[str, Any]:
    width = slice_width(C)
    return dict(ROWS=TILE // width, BLOCK_C=width)


def forward(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    y_weight: Tensor | None,
    y_bias: Tensor | None,
    keep: Tensor | None,
    gain: float,
    dtype: torch.dtype,
) -> Tensor:
    """``x * weight + bias`` in the last channels, as many as ``y`` has, plus ``y``.

    Args:
        x: ``[..., C]``.
        y: ``[..., K]``.
        weight: ``[K]``.
        bias: ``[K]``.
        y_weight: ``[K]``, or None if ``y`` is not scaled.
        y_bias: ``[K]``, together with ``y_weight``.
        keep: A number for each image, by which ``y`` is multiplied.
        gain: Factor on these numbers.
        dtype: Dtype of the result.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    shape, C, device = x.shape, x.shape[-1], x.device
    N, first = x.numel() // C, C - y.shape[-1]
    x, x_distance = rows_apart(x)
    y, y_distance = rows_apart(y)
    out = torch.empty(shape, dtype=dtype, device=device)
    kinds = x.dtype, y.dtype, weight.dtype, None if keep is None else keep.dtype, y_weight is None
    key = N, C, shape[0], first, x_distance, y_distance, dtype, kinds, device
    launch = _forward.get(key)
    if launch is None:
        constants = dict(SCALED=y_weight is not None, DROPS=keep is not None, **_blocks(C))
        grid = triton.cdiv(N, constants["ROWS"]), triton.cdiv(C, constants["BLOCK_C"])
        integers = x_distance, y_distance, N, C, first, N // shape[0]
        launch = _forward.keep(key, Launch(kernels_affine.forward_kernel, grid, integers, constants))
    if y_weight is None or y_bias is None:
        y_weight = y_bias = weight
    else:
        y_weight, y_bias = y_weight.contiguous(), y_bias.contiguous()
    launch(x, y, weight, bias, y_weight, y_bias, weight if keep is None else keep, out, gain)
    return out


def backward(
    grad: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor,
    y_weight: Tensor | None,
    keep: Tensor | None,
    gain: float,
    partial: bool,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    y_shape: torch.Size,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Gradients of both maps, and with ``partial`` those of ``weight``, ``bias`` and ``y_weight``.

    Args:
        grad: Gradient of the sum.
        x: The map with ``partial``.
        y: The other one, if it is scaled and ``partial``.
        weight: As for ``forward``.
        y_weight: As for ``forward``.
        keep: As for ``forward``.
        gain: As for ``forward``.
        partial: Whether the gradients of the parameters are wanted.
        x_dtype: Dtype of ``x``.
        y_dtype: Dtype of ``y``.
        y_shape: Shape of ``y``.
    """
    shape, C, device, scaled = grad.shape, grad.shape[-1], grad.device, y_weight is not None
    N, K, weight = grad.numel() // C, y_shape[-1], weight.contiguous()
    dx = torch.empty(shape, dtype=x_dtype, device=device)
    dy = torch.empty(y_shape, dtype=y_dtype, device=device)
    grad, distance = rows_apart(grad)
    x, x_distance = (grad, 0) if x is None else rows_apart(x)
    y, y_distance = (grad, 0) if y is None else rows_apart(y)
    kinds = grad.dtype, x_dtype, y_dtype, weight.dtype, None if keep is None else keep.dtype, scaled, partial
    key = N, C, K, shape[0], distance, x_distance, y_distance, kinds, device
    launch, programs = _backward.get(key) or (None, 0)
    if launch is None:
        constants = dict(SCALED=scaled, DROPS=keep is not None, PARTIAL=partial, **_blocks(C))
        slices = triton.cdiv(C, constants["BLOCK_C"])
        programs = max(1, min(PROGRAMS // slices, triton.cdiv(N, constants["ROWS"])))
        integers = distance, x_distance, y_distance, N, C, C - K, N // shape[0]
        launch = Launch(kernels_affine.backward_kernel, (slices, programs), integers, constants)
        _backward.keep(key, (launch, programs))
    width = K * (3 if scaled else 2)
    sums = torch.empty((programs, width), dtype=torch.float32, device=device) if partial else dx
    kept = weight if keep is None else keep
    launch(grad, x, y, weight, weight if y_weight is None else y_weight.contiguous(), kept, dx, dy, sums, gain)
    if not partial:
        return dx, dy, (None, None, None)
    found = fold_programs(sums, weight.dtype).split(K)
    return dx, dy, (found[0], found[1], found[2] if scaled else None)
