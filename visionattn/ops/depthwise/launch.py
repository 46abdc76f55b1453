"""Launching the Triton kernels of depthwise convolution: tile sizes and how the work is dealt out.

Kernels up to 5 x 5 without dilation are unrolled; others are those of ``launch_large.py``.
"""

import torch
import triton
from torch import Tensor

from visionattn.ops._launch import Launch, Plans, channels_inside, layout, sum_programs
from visionattn.ops.depthwise import kernels_depthwise, launch_large

ROWS = 4  # of a tile: more would take registers from other programs
PROGRAMS = 396  # of the weight gradient at most, all slices together: three for each of 132 processors

_arrange, _forward, _weight_grad = Plans(), Plans(), Plans()


def _unrolled(weight: Tensor, dilation: int) -> bool:
    return dilation == 1 and max(weight.shape[2:]) <= 5


def _tile(C: int, values: int) -> dict[str, int]:
    """Pixels and channels of a program's tile of ``values`` values a row."""
    block_c = min(64, triton.next_power_of_2(C))
    return dict(ROWS=ROWS, BLOCK_P=values // block_c, BLOCK_C=block_c)


class _Sizes:
    """What the kernels are told about a map ``[B, H, W, C]``, another one, and the division into tiles."""

    def __init__(self, x: Tensor, weight: Tensor, values: int):
        B, H, W, C = x.shape
        blocks = _tile(C, values)
        strips, self.slices = triton.cdiv(H, ROWS), triton.cdiv(C, blocks["BLOCK_C"])
        self.tiles = strips * triton.cdiv(B * W, blocks["BLOCK_P"])
        self.integers = B, H, W, C, strips
        even = C % blocks["BLOCK_C"] == 0
        self.constants = dict(KH=weight.shape[2], KW=weight.shape[3], EVEN=even, **blocks)


def arrange(weight: Tensor) -> Tensor:
    """Weight ``[C, 1, kh, kw]`` as float32 ``[taps, C]``, as ``forward`` wants it."""
    C, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    key = weight.shape, weight.dtype, weight.device
    launch = _arrange.get(key)
    if launch is None:
        grid, integers = (taps, triton.cdiv(C, 128)), (C, taps)
        launch = Launch(kernels_depthwise.arrange_kernel, grid, integers, dict(BLOCK_C=128), num_warps=1)
        _arrange.keep(key, launch)
    arranged = torch.empty((taps, C), dtype=torch.float32, device=weight.device)
    launch(weight.contiguous(), arranged)
    return arranged


def _plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    flip: bool,
    distance: int,
    _: int = 1,
    first: int = 0,
) -> Launch:
    sizes, other = _Sizes(x, weight, 1024), x if residual is None else residual
    terms = 0 if bias is None else x.shape[3], 0 if residual is None else x.shape[1]
    taps = launch_large.order(weight, flip, first)
    integers = *x.stride()[:3], *other.stride()[:3], distance, *taps, *sizes.integers, *terms
    return Launch(kernels_depthwise.forward_kernel, (sizes.tiles * sizes.slices,), integers, sizes.constants)


def forward_plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    flip: bool,
    distance: int,
    dilation: int = 1,
    first: int = 0,
) -> tuple[Launch, bool]:
    """The launch of ``forward``, and whether its last argument is the one for statistics, which are not made.

    Pixels of the result are ``distance`` values apart; ``first`` is where the arranged values of the kernel begin.
    """
    unrolled = _unrolled(weight, dilation)
    plan = _plan if unrolled else launch_large.forward_plan
    return plan(x, weight, bias, residual, flip, distance, dilation, first), not unrolled


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    flip: bool = False,
    arranged: Tensor | None = None,
    out: Tensor | None = None,
    dilation: int = 1,
) -> Tensor:
    """``visionattn::depthwise_conv`` on the device.

    Args:
        x: Map, ``[B, H, W, C]``.
        weight: ``[C, 1, kh, kw]``.
        bias: ``[C]``.
        residual: Shape of ``x``.
        flip: Convolve with the kernel turned around.
        arranged: ``arrange(weight)``, if it is there already.
        out: Where the result goes, ``residual`` itself or a tensor that no argument shares; pixels equally far apart.
        dilation: Distance of the kernel's values on the map.

    Returns:
        ``[B, H, W, C]``, contiguous without ``out``.
    """
    x = channels_inside(x)
    dtype = x.dtype
    if residual is not None:
        residual = channels_inside(residual)
        dtype = torch.promote_types(dtype, residual.dtype)
    distance = x.shape[3]
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    else:
        distance = out.stride(2)
    kind = None if bias is None else bias.dtype
    like = None if residual is None else layout(residual)
    key = layout(x), weight.shape, kind, like, flip, dilation, distance, out.dtype
    plan = _forward.get(key)
    if plan is None:
        plan = _forward.keep(key, forward_plan(x, weight, bias, residual, flip, distance, dilation))
    launch, large = plan
    arranged = arrange(weight) if arranged is None else arranged
    bias, residual = arranged if bias is None else bias.contiguous(), x if residual is None else residual
    if large:
        launch(x, arranged, bias, residual, out, arranged)
    else:
        launch(x, arranged, bias, residual, out)
    return out


def weight_grad_plan(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1
) -> tuple[Launch, int]:
    """The launch that leaves sums ``[number, taps + 1, C]`` of the gradients, see ``weight_grad``, and their number.

    Without ``bias`` the last of the rows may be left as it is.
    """
    if not _unrolled(weight, dilation):
        return launch_large.weight_grad_plan(grad, x, weight, bias, dilation)
    sizes = _Sizes(x, weight, 512)
    programs = min(sizes.tiles, max(1, PROGRAMS // sizes.slices))
    integers = *x.stride()[:3], *grad.stride()[:3], *sizes.integers, sizes.tiles
    grid = (programs * sizes.slices,)
    return Launch(kernels_depthwise.weight_grad_kernel, grid, integers, sizes.constants), programs


def weight_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weight, and of the bias if there is one, from that of the result."""
    grad, x = channels_inside(grad), channels_inside(x)
    key = layout(grad), layout(x), weight.shape, bias is None, dilation
    plan = _weight_grad.get(key) or _weight_grad.keep(key, weight_grad_plan(grad, x, weight, bias, dilation))
    launch, programs = plan
    taps = weight.shape[2] * weight.shape[3]
    partial = torch.empty((programs, taps + 1, x.shape[3]), dtype=torch.float32, device=x.device)
    launch(x, grad, partial)
    return sum_programs(partial, weight, bias)
