"""Launching the Triton kernels of depthwise convolution: tile sizes and how the work is dealt out."""

from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, layout, sum_programs
from visionattn.ops.depthwise import kernels_depthwise

ROWS = 4  # of a tile
PROGRAMS = 512  # of the weight gradient at most, for all slices of channels together

_forward, _weight_grad = Plans(), Plans()


def _map(x: Tensor) -> Tensor:
    """``x`` itself where channels lie side by side, else a copy."""
    return x if x.stride(3) == 1 else x.contiguous()


def _tile(C: int, values: int) -> dict[str, int]:
    """Pixels and channels of a program's tile of ``values`` values a row."""
    block_c = min(64, triton.next_power_of_2(C))
    return dict(ROWS=ROWS, BLOCK_P=values // block_c, BLOCK_C=block_c)


class _Sizes:
    """What the kernels are told about a map ``[B, H, W, C]`` and its division into tiles."""

    def __init__(self, x: Tensor, weight: Tensor, values: int):
        B, H, W, C = x.shape
        self.kernel = dict(KH=weight.shape[2], KW=weight.shape[3])
        self.blocks = _tile(C, values)
        strips, self.slices = triton.cdiv(H, ROWS), triton.cdiv(C, self.blocks["BLOCK_C"])
        self.tiles = strips * triton.cdiv(B * W, self.blocks["BLOCK_P"])
        self.integers = B, H, W, C, strips, self.slices


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, flip: bool) -> tuple[Launch, Launch]:
    sizes, C, taps = _Sizes(x, weight, 1024), x.shape[3], weight.shape[2] * weight.shape[3]
    arrange = Launch(
        kernels_depthwise.arrange_kernel,
        (taps, triton.cdiv(C, 128)),
        (C,),
        dict(TAPS=taps, FLIP=flip, BLOCK_C=128),
        num_warps=1,
    )
    constants: dict[str, Any] = dict(**sizes.kernel, BIAS=bias is not None, RESIDUAL=residual is not None)
    strides = *x.stride()[:3], *(x if residual is None else residual).stride()[:3]
    convolve = Launch(
        kernels_depthwise.forward_kernel,
        (sizes.tiles * sizes.slices,),
        (*strides, *sizes.integers),
        dict(**constants, **sizes.blocks),
    )
    return arrange, convolve


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, flip: bool = False) -> Tensor:
    """``visionattn::depthwise_conv`` on the device."""
    x, weight = _map(x), weight.contiguous()
    dtype = x.dtype
    if residual is not None:
        residual = _map(residual)
        dtype = torch.promote_types(dtype, residual.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    kinds = weight.dtype, None if bias is None else bias.dtype
    key = layout(x), weight.shape, kinds, None if residual is None else layout(residual), flip
    arrange, convolve = _forward.get(key) or _forward.keep(key, _plan(x, weight, bias, residual, flip))
    arranged = torch.empty((weight.shape[2] * weight.shape[3], x.shape[3]), dtype=torch.float32, device=x.device)
    arrange(weight, arranged)
    convolve(x, arranged, weight if bias is None else bias, x if residual is None else residual, out)
    return out


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, and of the bias if there is one, from that of the result."""
    grad, x = _map(grad), _map(x)
    key = layout(grad), layout(x), weight.shape
    launch, programs = _weight_grad.get(key) or (None, 0)
    if launch is None:
        sizes = _Sizes(x, weight, 512)
        programs = min(sizes.tiles, max(1, PROGRAMS // sizes.slices))
        integers = *x.stride()[:3], *grad.stride()[:3], *sizes.integers, sizes.tiles
        launch = Launch(
            kernels_depthwise.weight_grad_kernel,
            (programs * sizes.slices,),
            integers,
            dict(**sizes.kernel, **sizes.blocks),
        )
        _weight_grad.keep(key, (launch, programs))
    taps = weight.shape[2] * weight.shape[3]
    partial = torch.empty((programs, taps + 1, x.shape[3]), dtype=torch.float32, device=x.device)
    launch(x, grad, partial)
    return sum_programs(partial, weight, bias)
